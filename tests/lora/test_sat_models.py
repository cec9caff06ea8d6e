"""LoRA on SAT's own models: the base is left as it is, deltas and gradients are those of a merged weight."""

import pytest
import torch
from sat.model.base_model import BaseMixin, non_conflict
from sat.transformer_defaults import HOOKS_DEFAULT

from sat_lora import LoraMixin, load_adapter, save_adapter
from sat_lora.lora.apply import adapters_of
from tests.support.sat_subjects import GEGLU_IN_TWO_BLOCKS, SUBJECTS, adapt, loss_of, remove
from tests.support.tiny import fill_adapters

pytestmark = [
    pytest.mark.usefixtures("single_process_group"),
    pytest.mark.filterwarnings("ignore:LoRA rank"),  # Mixtral's gates have 4 rows
]
every_model = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def slot_pieces(adapter, slot_rows, chosen=None):
    """(rows of the whole weight, rows of A, rows of B) for each adapted slot.

    `slot_rows`: rows of q, k and v, or of k and v, as written down for the model; empty where the linear has no slots.
    """
    rank, edge, pieces, row = adapter.B.shape[1], 0, [], 0
    names = {0: ("",), 2: ("k", "v"), 3: ("q", "k", "v")}[len(slot_rows)]
    for name, rows in zip(names, slot_rows or (len(adapter.B),)):
        if not name or chosen is None or name in chosen:
            number = len(pieces)
            pieces.append((slice(edge, edge + rows), slice(number * rank, (number + 1) * rank), slice(row, row + rows)))
            row += rows
        edge += rows
    assert row == len(adapter.B) and len(pieces) * rank == len(adapter.A)
    return pieces


def merged_copy(subject, adapted, chosen=None):
    """A base of its own with 8 / rank * B A added to each adapted weight, slot by slot.

    A convolution with (out, channels, height, width) is the linear with (out, channels * height * width).
    """
    merged = subject.build()
    weights = dict(merged.named_parameters())
    with torch.no_grad():
        for name, adapter in adapters_of(adapted).items():
            weight = weights[name + ".weight"].flatten(1)
            for rows, a, b in slot_pieces(adapter, subject.linears[name], chosen):
                weight[rows] += 8 / adapter.B.shape[1] * adapter.B[b] @ adapter.A[a].flatten(1)
    return merged


def assert_close(got, expected, tolerance, name=""):
    """The largest difference, relative to the largest value; a tolerance of 0 means equal."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max(), name


def adapter_gradients(subject, model):
    loss_of(subject.run(model.train())).backward()
    return {
        f"{name}.{leaf}": getattr(adapter, leaf).grad for name, adapter in adapters_of(model).items() for leaf in "AB"
    }


@every_model
def test_every_linear_of_the_model_is_found(subject):
    model = subject.build()
    adapt(model)
    assert set(adapters_of(model)) == set(subject.linears)
    assert len(adapters_of(model)) == subject.count


@every_model
def test_by_default_all_but_the_head_are_adapted(subject):
    model = subject.build()
    adapt(model, target_modules="all-linear")
    assert set(adapters_of(model)) == set(subject.linears) - set(subject.heads) - {"mixins.patch_embedding.proj"}


@every_model
def test_a_fresh_adapter_changes_nothing(subject):
    model = subject.build().eval()
    base = subject.run(model)
    adapt(model)
    assert torch.equal(subject.run(model), base)


@every_model
def test_the_output_is_that_of_merged_weights(subject):
    adapted = subject.build().eval()
    base = subject.run(adapted)
    adapt(adapted)
    fill_adapters(adapted)
    merged = merged_copy(subject, adapted).eval()
    output = subject.run(adapted)
    assert (output - base).abs().max() > 0.05 * base.abs().max()
    assert_close(output, subject.run(merged), subject.tolerance)


@pytest.mark.parametrize("name", ["chatglm2", "encoder-decoder"])
@pytest.mark.parametrize("chosen", ["q", "v", "qv", "kv"])
def test_slots_alone_are_those_of_merged_weights(name, chosen):
    """ChatGLM2 has 32 rows of q and 16 of k and v each; cross-attention has k and v in one linear and no q."""
    subject = SUBJECTS[name]
    adapted = subject.build().eval()
    adapt(adapted, qkv_slots=tuple(chosen))
    fill_adapters(adapted)
    assert_close(subject.run(adapted), subject.run(merged_copy(subject, adapted, chosen).eval()), subject.tolerance)


@pytest.mark.parametrize("chosen", ["q", "v", "qkv"])
def test_fused_gate_and_value_are_not_taken_for_k_and_v(chosen):
    """A linear of two blocks outside attention is adapted in all its rows, whatever `qkv_slots` says."""
    model = GEGLU_IN_TWO_BLOCKS.build()
    adapt(model, qkv_slots=tuple(chosen))
    rows = {name: len(adapter.B) for name, adapter in adapters_of(model).items() if "h_to_4h" in name}
    assert rows == {f"transformer.layers.{layer}.mlp.dense_h_to_4h": 96 for layer in range(2)}


@every_model
def test_every_adapter_gets_the_gradient_that_its_merged_weight_implies(subject):
    """With W + s B A trained as a whole: dA = s B^T dW, dB = s dW A^T."""
    adapted = subject.build()
    adapt(adapted)
    fill_adapters(adapted)
    gradients = adapter_gradients(subject, adapted)
    missing = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert not missing, "no gradient"
    merged = merged_copy(subject, adapted).train()
    loss_of(subject.run(merged)).backward()
    weights = dict(merged.named_parameters())
    for name, adapter in adapters_of(adapted).items():
        weight_grad, scale = weights[name + ".weight"].grad.flatten(1), 8 / adapter.B.shape[1]
        for rows, a, b in slot_pieces(adapter, subject.linears[name]):
            expected_a, expected_b = adapter.B[b].T @ weight_grad[rows], weight_grad[rows] @ adapter.A[a].flatten(1).T
            assert_close(gradients[f"{name}.A"][a].flatten(1), scale * expected_a, 10 * subject.tolerance, f"{name}.A")
            assert_close(gradients[f"{name}.B"][b], scale * expected_b, 10 * subject.tolerance, f"{name}.B")


@every_model
def test_only_adapters_train(subject):
    model = subject.build()
    adapt(model)
    adapters = {id(p) for adapter in adapters_of(model).values() for p in (adapter.A, adapter.B)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == adapters


@every_model
def test_deleting_the_mixin_gives_the_base_bit_for_bit(subject):
    model = subject.build().eval()
    base, state = subject.run(model), {key: value.clone() for key, value in model.state_dict().items()}
    adapt(model)
    fill_adapters(model)
    subject.run(model)
    remove(model)
    assert torch.equal(subject.run(model), base)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@every_model
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_leaves_every_gradient_equal(subject, dropout):
    gradients = []
    for checkpoint in (False, True):
        model = subject.build(checkpoint_activations=checkpoint)
        adapt(model, lora_dropout=dropout)
        fill_adapters(model)
        torch.manual_seed(5)
        gradients.append(adapter_gradients(subject, model))
    plain, recomputed = gradients
    assert all(gradient is not None for gradient in [*plain.values(), *recomputed.values()])
    for name in plain:
        assert_close(recomputed[name], plain[name], subject.recomputed, name)


@every_model
def test_a_saved_adapter_loads_into_another_copy_of_the_base(subject, tmp_path):
    first, second = subject.build().eval(), subject.build().eval()
    adapt(first)
    fill_adapters(first)
    save_adapter(first, tmp_path / "adapter")
    load_adapter(second, tmp_path / "adapter")
    assert torch.equal(subject.run(second), subject.run(first))


def linear_in_hook(hook: str, features: int) -> BaseMixin:
    """A mixin with one linear, which is applied to what the given SAT hook returns, and is called nowhere else."""

    @non_conflict
    def run(self, *args, old_impl=None, **kw_args):
        output = old_impl(*args, **kw_args)
        if isinstance(output, tuple):  # routing: weights and indices
            return self.linear(output[0]), output[1]
        return self.linear(output)

    mixin = type("LinearInHook", (BaseMixin,), {hook: run})()
    mixin.linear = torch.nn.Linear(features, features)
    return mixin


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("hook", sorted(HOOKS_DEFAULT))
def test_a_linear_that_a_mixin_calls_in_any_hook_is_adapted(hook, checkpoint):
    """Whatever hook of SAT a mixin uses: attention_fn sees heads of 8, routing the weights of 2 experts."""
    features = {"attention_fn": 8, "routing_forward": 2, "final_forward": 1024}.get(hook, 32)
    subject = SUBJECTS["mixtral" if hook == "routing_forward" else "encoder-decoder"]
    model = subject.build(checkpoint_activations=checkpoint)
    owner = getattr(model, "decoder", model)
    owner.add_mixin("under-test", linear_in_hook(hook, features).double())
    owner.add_mixin("lora", LoraMixin(owner, r=1, target_modules=["mixins.under-test.linear"]))
    fill_adapters(model)
    loss_of(subject.run(model.train())).backward()
    (adapter,) = adapters_of(model).values()
    assert adapter.A.grad is not None and adapter.A.grad.any() and adapter.B.grad.any()
