"""fixed_order: gradients arrive in one order whatever the batch holds, on a model that skips what has nothing to do."""

import pytest
import torch

from sat_lora import ConfigError, LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.lora.apply import adapters_of
from sat_lora.training.steps.engine import start_engine
from tests.support.branching_cogvlm import branch_on_data
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, sgd

pytestmark = [
    pytest.mark.usefixtures("single_process_group"),
    pytest.mark.filterwarnings("ignore:LoRA rank"),
]
BATCHES = {
    "images": tiny_batch((True, True), seed=1),
    "mixed": tiny_batch((True, False), seed=2),
    "text-only": tiny_batch((False, False), seed=3),
}
EVERYTHING = ["all-linear", "lm-head", "patch-embedding", "word_embeddings"]


def adapted_model(checkpoint=False, fixed_order=False, dtype=torch.float32, **fields):
    model = tiny_model(dtype, checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint)
    add_lora(model, LoraConfig(**{"r": 4, "target_modules": EVERYTHING, **fields}), fixed_order=fixed_order)
    fill_adapters(model)
    return model.train()


def arrivals(model, batch) -> list[str]:
    """The names of the parameters, in the order in which their gradients come in one backward pass."""
    order, handles = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name)))
    model.zero_grad()
    logits_of(model, batch).float().square().mean().backward()
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_the_order_is_one_for_every_batch_and_misses_nothing(monkeypatch, checkpoint):
    branch_on_data(monkeypatch.setattr)
    model = adapted_model(checkpoint, fixed_order=True)
    orders = {kind: arrivals(model, batch) for kind, batch in BATCHES.items()}
    assert orders["images"] == orders["mixed"] == orders["text-only"]
    assert sorted(orders["images"]) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_without_it_the_orders_differ(monkeypatch):
    """The fault that it cures is there."""
    branch_on_data(monkeypatch.setattr)
    model = adapted_model()
    orders = {kind: arrivals(model, batch) for kind, batch in BATCHES.items()}
    assert len(set(map(tuple, orders.values()))) > 1
    assert len(orders["text-only"]) < len(orders["mixed"])


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True, "target_modules": ["all-linear"]},
        {"freeze_a": True, "target_modules": ["all-linear"]},
        {"init_lora_weights": "olora", "target_modules": ["all-linear"]},
    ],
    ids=["lora", "dora", "frozen A", "olora"],
)
def test_gradients_are_those_of_the_model_without_it(monkeypatch, kind, checkpoint, fields):
    branch_on_data(monkeypatch.setattr)
    plain = adapted_model(**fields)
    arrivals(plain, BATCHES[kind])
    ordered = adapted_model(checkpoint, fixed_order=True, **fields)
    arrivals(ordered, BATCHES[kind])
    for (name, one), other in zip(plain.named_parameters(), ordered.parameters()):
        if one.requires_grad:
            expected = torch.zeros_like(one) if one.grad is None else one.grad
            torch.testing.assert_close(
                other.grad, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()), msg=name
            )


def test_the_output_is_the_same_and_evaluation_needs_no_chain():
    plain, ordered = adapted_model().eval(), adapted_model(fixed_order=True).eval()
    with torch.no_grad():
        assert torch.equal(logits_of(plain, BATCHES["mixed"]), logits_of(ordered, BATCHES["mixed"]))
    assert not any(adapter.in_graph for adapter in adapters_of(ordered).values())


def test_an_evaluation_lets_go_of_the_graph_of_the_step_before_it():
    """What lies outside of layers too: it would be computed with the tensors of that step, and keep their memory."""
    model = adapted_model(fixed_order=True)
    arrivals(model, BATCHES["mixed"])
    outside = [adapter for adapter in adapters_of(model).values() if adapter.target.site.layer is None]
    assert outside and all(adapter.in_graph for adapter in outside)
    with torch.no_grad():
        logits_of(model.eval(), BATCHES["mixed"])
    assert not any(adapter.in_graph for adapter in adapters_of(model).values())


def test_a_layer_lets_go_of_the_graph_of_those_before_it():
    """Else every layer's chain would keep its memory until the next step."""
    model = adapted_model(fixed_order=True)
    logits_of(model, BATCHES["mixed"])
    with_graph = {
        (adapter.target.site.tower, adapter.target.site.layer)
        for adapter in adapters_of(model).values()
        if adapter.in_graph and adapter.target.site.layer is not None
    }
    assert {number for _, number in with_graph} == {1} and len(with_graph) == 2  # the last of each tower


def test_what_does_not_run_is_chained_and_leaves_nothing_behind(monkeypatch):
    """The vision transformer without images: zeros for its parameters, and no delta of a later step uses them."""
    branch_on_data(monkeypatch.setattr)
    model = adapted_model(fixed_order=True)
    arrivals(model, BATCHES["text-only"])
    vit = [adapter for adapter in adapters_of(model).values() if adapter.target.site.tower == "vit"]
    assert vit and not any(adapter.in_graph for adapter in vit)
    assert all(adapter.B.grad is not None and not adapter.B.grad.any() for adapter in vit)


def test_a_file_is_written_from_the_parameters_and_loads_with_the_order(tmp_path):
    ordered = adapted_model(fixed_order=True)
    arrivals(ordered, BATCHES["mixed"])
    save_adapter(ordered, tmp_path / "adapter")
    again = tiny_model().train()
    load_adapter(again, tmp_path / "adapter", fixed_order=True)
    assert arrivals(again, BATCHES["text-only"]) == arrivals(ordered, BATCHES["text-only"])


def test_parameters_of_the_base_are_refused():
    with pytest.raises(ConfigError, match="fixed_order: mixins.eva.boi would train whole.*modules_to_save"):
        add_lora(tiny_model(), LoraConfig(r=4, modules_to_save=["boi"]), fixed_order=True)


def test_zero_3_is_refused_with_the_reason():
    model = adapted_model(fixed_order=True)
    with pytest.raises(ConfigError, match="(?s)ZeRO stage 3: mixins.*lora was added with fixed_order.*Use stage 2"):
        start_engine(model, sgd(model, 0.1), engine_config(3, 2))


def test_a_layer_may_change_its_input_in_place(monkeypatch):
    model = adapted_model(fixed_order=True)
    attention = model.hooks["attention_forward"]
    monkeypatch.setitem(model.hooks, "attention_forward", lambda x, *args, **kw: attention(x.mul_(2), *args, **kw))
    plain = arrivals(model, BATCHES["mixed"])
    inner = attention.keywords["old_impl"]
    doubled = type(attention)(
        attention.func, **{**attention.keywords, "old_impl": lambda x, *a, **kw: inner(x.mul_(2), *a, **kw)}
    )
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    monkeypatch.setitem(model.hooks, "attention_forward", doubled)
    assert arrivals(model, BATCHES["mixed"]) == plain
    for gradient, parameter in zip(gradients, (p for p in model.parameters() if p.requires_grad)):
        torch.testing.assert_close(parameter.grad, gradient)
