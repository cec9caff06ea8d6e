"""The hook's two ways: the direct one where nothing stands against it, else the one through the adapter's module."""

import copy
import dataclasses
import gc
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sat_lora import LoraConfig, add_lora
from sat_lora.lora.delta_hook import DeltaHook, DeltaState
from tests.support.single_layer import LINEAR, adapter_for, build_layer, inputs_for
from tests.support.tiny import fill_adapters, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches, views left out."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "detach" not in str(function):
            self.counts[function.overloadpacket.__name__] += 1
        return result


def hooked(layer_name: str, dtype=torch.float64, **fields):
    """(layer with the hook in an open scope, adapter, whether the adapter's module is called: a list that grows)."""
    layer = build_layer(layer_name, dtype)
    adapter = adapter_for(layer, LoraConfig(r=4, lora_alpha=8, **fields), seed=5)
    state = DeltaState(fixed_order=False)
    state.scope_is_open = True
    DeltaHook(state, adapter).attach(layer)
    calls = []
    forward = adapter.forward

    def noted(*args):
        calls.append(1)
        return forward(*args)

    adapter.forward = noted  # on the instance: the hook looks at the class
    return layer, adapter, calls


def merged_output(layer, adapter, x: torch.Tensor) -> torch.Tensor:
    """The output of the layer's weight with the delta in it, by plain autograd."""
    weight = layer.weight + adapter.scale * adapter.B @ adapter.A
    return nn.functional.linear(x, weight, layer.bias)


def assert_is_the_merged_layer(layer, adapter, wanted, *, rtol=1e-10) -> None:
    """Output and gradients of what is `wanted`, and the output without grad."""
    x = inputs_for(layer).to(layer.weight.dtype).detach().requires_grad_()
    wanted = [x, *wanted]
    expected = merged_output(layer, adapter, x)
    results = []
    for out in (layer(x), expected):
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), wanted)])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("layer_name", LINEAR)
def test_every_linear_goes_directly(layer_name):
    layer, adapter, calls = hooked(layer_name)
    assert_is_the_merged_layer(layer, adapter, [adapter.A, adapter.B])
    assert not calls


def unfreeze_weight(layer, adapter):
    layer.weight.requires_grad_(True)


def unfreeze_bias(layer, adapter):
    layer.bias.requires_grad_(True)


def hook_the_adapter(layer, adapter):
    adapter.register_forward_hook(lambda adapter, args, out: None)


def hook_before_the_adapter(layer, adapter):
    adapter.register_forward_pre_hook(lambda adapter, args: None)


def parametrize_the_weight(layer, adapter):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


def parametrize_the_bias(layer, adapter):
    layer.bias.requires_grad_(True)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())


CHANGES = [
    unfreeze_weight,
    unfreeze_bias,
    hook_the_adapter,
    hook_before_the_adapter,
    parametrize_the_weight,
    parametrize_the_bias,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_around_a_layer_is_seen_at_its_next_call(change):
    """After calls that went directly; whatever trains in the layer by then gets its gradient."""
    layer, adapter, calls = hooked("linear")
    assert_is_the_merged_layer(layer, adapter, [adapter.A, adapter.B])
    change(layer, adapter)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert_is_the_merged_layer(layer, adapter, [adapter.A, adapter.B, *trained])
    assert len(calls) == 2


def test_a_weight_that_was_exchanged_is_used():
    layer, adapter, calls = hooked("linear")
    layer(inputs_for(layer))
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    assert_is_the_merged_layer(layer, adapter, [adapter.A, adapter.B])
    adapter.B = nn.Parameter(torch.randn_like(adapter.B))
    assert_is_the_merged_layer(layer, adapter, [adapter.A, adapter.B])
    assert not calls


def test_hooks_that_come_later_see_the_delta_and_may_change_it():
    layer, adapter, calls = hooked("linear")
    seen = []
    layer.register_forward_hook(lambda layer, args, out: seen.append(out) or 2 * out)
    layer.register_forward_pre_hook(lambda layer, args: (3 * args[0],))
    x = inputs_for(layer)
    expected = 2 * merged_output(layer, adapter, 3 * x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen[0], expected / 2, rtol=1e-10, atol=1e-10)
    wanted = [x, adapter.A, adapter.B]
    ours, plain = (torch.autograd.grad(out.pow(2).sum(), wanted) for out in (layer(x), expected))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    assert not calls


def test_a_forward_that_was_set_before_runs_and_gets_the_delta_on_top():
    """As `accelerate` sets one."""
    layer = build_layer("linear")
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    adapter = adapter_for(layer, LoraConfig(r=4), seed=5)
    state = DeltaState(fixed_order=False)
    state.scope_is_open = True
    take_away = DeltaHook(state, adapter).attach(layer)
    x = inputs_for(layer)
    expected = merged_output(layer, adapter, x) + 1
    wanted = [x, adapter.A, adapter.B]
    ours, plain = (torch.autograd.grad(out.pow(2).sum(), wanted) for out in (layer(x), expected))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    take_away()
    assert torch.equal(layer(x), own(x) + 1)


def test_a_forward_that_is_set_over_ours_stays_and_is_the_base_once_ours_is_gone():
    layer = build_layer("linear")
    adapter = adapter_for(layer, LoraConfig(r=4), seed=5)
    state = DeltaState(fixed_order=False)
    state.scope_is_open = True
    x = inputs_for(layer).detach()
    base, take_away = layer(x), DeltaHook(state, adapter).attach(layer)
    ours = layer.forward
    layer.forward = lambda x: ours(x) + 1
    torch.testing.assert_close(layer(x), merged_output(layer, adapter, x) + 1, rtol=1e-10, atol=1e-10)
    take_away()
    del adapter
    gc.collect()
    assert torch.equal(layer(x), base + 1)


def test_two_adapters_on_one_layer_add_up_and_leave_one_by_one():
    layer = build_layer("linear")
    x = inputs_for(layer)
    adapters = [adapter_for(layer, LoraConfig(r=4), seed=seed) for seed in (5, 6)]
    state = DeltaState(fixed_order=False)
    state.scope_is_open = True
    leave = [DeltaHook(state, adapter).attach(layer) for adapter in adapters]
    expected = sum(merged_output(layer, adapter, x) for adapter in adapters)
    expected = expected - nn.functional.linear(x, layer.weight, layer.bias)
    wanted = [x, *(factor for adapter in adapters for factor in (adapter.A, adapter.B))]
    ours, plain = (torch.autograd.grad(out.pow(2).sum(), wanted) for out in (layer(x), expected))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    leave[0]()
    torch.testing.assert_close(layer(x), merged_output(layer, adapters[1], x), rtol=1e-10, atol=1e-10)
    leave[1]()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("layer_name, keyword", [("linear", "input"), ("column", "input_"), ("row", "input_")])
def test_a_layer_may_be_called_by_keyword(layer_name, keyword):
    layer, adapter, calls = hooked(layer_name)
    x = inputs_for(layer)
    torch.testing.assert_close(layer(**{keyword: x}), merged_output(layer, adapter, x), rtol=1e-10, atol=1e-10)
    assert not calls


@pytest.mark.parametrize("layer_name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_grad", [False, True])
def test_with_b_at_zero_a_layer_gives_its_own_bits(layer_name, dtype, with_grad):
    layer, adapter, calls = hooked(layer_name, dtype)
    nn.init.zeros_(adapter.B)
    x = inputs_for(layer).to(dtype)
    for rows in (x, x[0], x[0, 0], x[:0], x.transpose(0, 1)):
        with torch.set_grad_enabled(with_grad):
            assert torch.equal(layer(rows), type(layer).forward(layer, rows))
    assert not calls


def test_the_slots_of_a_saved_output_survive_hooks_on_saved_tensors():
    """As of `save_on_cpu`, whose tensors come back with strides of their own."""
    model = tiny_model(torch.float64)
    add_lora(model, r=4, target_modules=["language-attention"])
    fill_adapters(model)
    layer = model.transformer.layers[0].attention.query_key_value
    mixin = model.get_mixin("lora")
    mixin._state.scope_is_open = True
    adapter = next(iter(mixin.adapters.values()))
    x = torch.randn(7, layer.weight.shape[1], dtype=torch.float64, requires_grad=True)
    wanted = [x, adapter.A, adapter.B]
    plain = torch.autograd.grad(layer(x).pow(2).sum(), wanted)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        out = layer(x)
    torch.testing.assert_close(torch.autograd.grad(out.pow(2).sum(), wanted), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_name", LINEAR)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_tokens_make_no_product_and_gradients_of_zero_in_the_usual_order(layer_name, dropout):
    layer, adapter, calls = hooked(layer_name, lora_dropout=dropout)
    adapter.train()
    orders = []
    for rows in (inputs_for(layer), inputs_for(layer)[:0]):
        order, x = [], rows.detach().requires_grad_()
        handles = [
            factor.register_post_accumulate_grad_hook(lambda p, name=name, order=order: order.append(name))
            for name, factor in adapter.named_parameters()
        ]
        with Operations() as operations:
            out = layer(x)
            out.sum().backward()
        for handle in handles:
            handle.remove()
        orders.append(order)
        gradients = [x.grad, adapter.A.grad, adapter.B.grad]
        adapter.zero_grad()
    assert orders[0] == orders[1] and sorted(orders[1]) == ["A", "B"]
    assert out.shape == (0, 5, 10) and out.dtype == torch.float64 and not calls
    assert not [name for name in operations.counts if "mm" in name]
    for gradient, tensor in zip(gradients, [x, adapter.A, adapter.B]):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_goes_through_the_adapter(dtype):
    layer, _, calls = hooked("linear", torch.float32)
    x = inputs_for(layer).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.to(dtype))
    assert out.dtype == torch.bfloat16 and len(calls) == 1


def test_another_dtype_of_the_adapter_goes_through_it():
    layer, _, calls = hooked("linear", torch.bfloat16, adapter_dtype="float32")
    layer(inputs_for(layer).bfloat16())
    assert len(calls) == 1


@pytest.mark.parametrize("fields", [dict(use_dora=True), dict(init_lora_weights="pissa")], ids=["DoRA", "PiSSA"])
def test_what_is_no_plain_pair_goes_through_the_adapter(fields):
    layer, _, calls = hooked("linear", **fields)
    layer(inputs_for(layer))
    assert len(calls) == 1


def test_an_adapter_class_with_a_forward_of_its_own_keeps_it():
    layer = build_layer("linear")
    adapter = adapter_for(layer, LoraConfig(r=4), seed=5)
    adapter.__class__ = type("Silent", (type(adapter),), {"forward": lambda self, y, *rest: y})
    state = DeltaState(fixed_order=False)
    state.scope_is_open = True
    base = layer(inputs_for(layer))
    DeltaHook(state, adapter).attach(layer)
    assert torch.equal(layer(inputs_for(layer)), base)


def test_the_scale_of_the_mixin_and_dropout_in_training_alone():
    layer, adapter, _ = hooked("linear", lora_dropout=0.5)
    x = inputs_for(layer).detach()
    state = layer.forward._state
    base, whole = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
    state.scale = 0.25
    torch.testing.assert_close(layer(x) - base, 0.25 * (whole - base))
    state.scale = 1.0
    adapter.train()
    torch.manual_seed(0)
    dropped = layer(x)
    torch.manual_seed(0)
    with torch.no_grad():  # the first pass of a checkpointed layer: the mask and the bits that recomputation will have
        assert torch.equal(layer(x), dropped)
    assert not torch.allclose(dropped, whole)


@pytest.mark.parametrize("layer_name", ["linear", "column", "row"])
def test_two_products_forward_and_four_backward_beside_the_frozen_one(layer_name):
    layer, adapter, _ = hooked(layer_name)
    x = inputs_for(layer)
    with torch.no_grad(), Operations() as frozen:
        type(layer).forward(layer, x)
    with torch.no_grad(), Operations() as without_grad:
        layer(x)
    with Operations() as forward:
        out = layer(x)
    with Operations() as backward:
        torch.autograd.grad(out, [x, adapter.A, adapter.B], torch.ones_like(out))
    assert without_grad.counts - frozen.counts == forward.counts - frozen.counts == Counter(mm=1, addmm_=1)
    # dS, dS A and dy W in one buffer, dA, dB
    assert backward.counts - Counter(ones_like=1) == Counter(mm=2, addmm_=1, addmm=2)


@pytest.mark.parametrize("slots, runs", [("qkv", 1), ("qv", 1), ("v", 1), ("qk", 1)])
def test_slots_at_equal_distances_are_one_batched_product(slots, runs):
    model = tiny_model(torch.float64)
    add_lora(model, r=4, target_modules=["language-attention"], qkv_slots=slots)
    fill_adapters(model)
    layer = model.transformer.layers[0].attention.query_key_value
    mixin = model.get_mixin("lora")
    mixin._state.scope_is_open = True
    x = torch.randn(7, layer.weight.shape[1], dtype=torch.float64, requires_grad=True)
    adapter = next(iter(mixin.adapters.values()))
    with torch.no_grad(), Operations() as forward:
        layer(x)
    out = layer(x)
    with Operations() as backward:
        torch.autograd.grad(out, [x, adapter.A, adapter.B], torch.ones_like(out))
    assert forward.counts["baddbmm_"] == runs and len(adapter.layout.runs) == runs
    assert backward.counts["bmm"] == backward.counts["baddbmm"] == runs and "cat" not in backward.counts


def test_a_deep_copy_has_hooks_of_its_own():
    model = tiny_model(torch.float32)
    add_lora(model, r=4)
    twin = copy.deepcopy(model)
    hooks = [layer.forward for layer in twin.modules() if isinstance(layer.forward, DeltaHook)]
    own = {id(mixin._state) for mixin in twin.modules() if hasattr(mixin, "_state")}
    assert hooks and {id(hook._state) for hook in hooks} == own
    assert {id(hook._adapter()) for hook in hooks} <= {id(module) for module in twin.modules()}
    assert all(hook._layer().forward is hook for hook in hooks)


def with_its_hook(layer_name):
    """A layer, its adapter and the hook between them, outside of any model."""
    layer = build_layer(layer_name)
    adapter = adapter_for(layer, LoraConfig(r=4), seed=5)
    hook = DeltaHook(DeltaState(fixed_order=False), adapter)
    hook.attach(layer)
    return layer, adapter, hook


@pytest.mark.parametrize("layer_name", ["linear", "column", "row"])
@pytest.mark.parametrize(
    "attribute", ["weight is trained", "bias is trained", "ds_id", "forward hook", "pre hook", "dtype"]
)
def test_a_layer_whose_product_is_not_its_own_alone_goes_through_the_adapter(layer_name, attribute):
    layer, adapter, hook = with_its_hook(layer_name)
    x = inputs_for(layer)
    assert hook._goes_directly(adapter, layer, x) is True
    changes = {
        "weight is trained": lambda: layer.weight.requires_grad_(),
        "bias is trained": lambda: layer.bias.requires_grad_(),
        "ds_id": lambda: setattr(layer.weight, "ds_id", 0),
        "forward hook": lambda: adapter.register_forward_hook(lambda *args: None),
        "pre hook": lambda: adapter.register_forward_pre_hook(lambda *args: None),
        "dtype": lambda: adapter.float(),
    }
    changes[attribute]()
    assert hook._goes_directly(adapter, layer, x) is False


@pytest.mark.parametrize("layer_name, on_one_rank, on_two", [("linear", 1, 1), ("column", 1, 1), ("row", 1, 0)])
def test_the_product_of_a_cut_input_is_the_layers_own_to_make(layer_name, on_one_rank, on_two):
    """It is summed over the ranks before the bias."""
    _, adapter, hook = with_its_hook(layer_name)
    assert hook._is_one_product == bool(on_one_rank) and hook._may_add_bias == (layer_name == "row")
    adapter.layout = dataclasses.replace(adapter.layout, mp_size=2)
    assert DeltaHook(DeltaState(fixed_order=False), adapter)._is_one_product == bool(on_two)
