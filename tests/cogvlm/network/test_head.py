"""The loss by a head that runs on labelled rows alone, in chunks, against all logits in float64."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.cogvlm.network import head
from sat_lora.cogvlm.network.head import LabelledRows, loss_of_rows
from sat_lora.data.samples import BrokenSample, collate
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import start_engine
from sat_lora.training.steps.loss import answer_loss_sum
from sat_lora.training.steps.step import to_device, validate
from tests.support.ranks import run_ranks
from tests.support.reference_cogvlm import reference_logits
from tests.support.tiny import CONFIG, fill_adapters, logits_of, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, sgd, step_together

ALL_LINEAR_AND_HEAD = LoraConfig(r=4, target_modules=["all-linear", "lm-head"])


def loss_of_all_logits(logits, labels):
    """The loss as it is defined: over the next token of every position that has a label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def scattered_labels(batch):
    """Labels here and there, the first position's, which nothing precedes, and the last's among them."""
    labels = batch["input_ids"].clone()
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = IGNORED
    labels[:, 0], labels[:, -1] = batch["input_ids"][:, 0], batch["input_ids"][:, -1]
    return {**batch, "labels": labels}


def test_labelled_rows_are_those_before_a_label():
    found = LabelledRows.from_labels(torch.tensor([[5, IGNORED, 7, 8], [IGNORED, IGNORED, IGNORED, 9]]))
    assert found.rows.tolist() == [1, 2, 6] and found.labels.tolist() == [7, 8, 9]
    nothing = LabelledRows.from_labels(torch.full((2, 3), IGNORED))
    assert nothing.rows.shape == nothing.labels.shape == (0,)


@pytest.mark.parametrize("chunk_rows", [1024, 3])
@pytest.mark.parametrize("rows", [(True, False), (False, False)], ids=["mixed", "text"])
def test_loss_and_gradients_equal_the_plain_implementation(rows, chunk_rows, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ROWS", chunk_rows)
    model, batch = tiny_model(torch.float64).train(), scattered_labels(tiny_batch(rows))
    batch["images"] = batch["images"].double()
    loss = answer_loss_sum(model, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    state = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    exact = loss_of_all_logits(reference_logits(state, CONFIG, batch), batch["labels"])
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if state[name].grad is None else state[name].grad
        assert (parameter.grad - expected).norm() <= 1e-6 * expected.norm().clamp_min(1e-12), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_chunks_and_recomputation_change_nothing_but_rounding(dtype, checkpoint, monkeypatch):
    def found(dtype, chunk_rows):
        monkeypatch.setattr(head, "CHUNK_ROWS", chunk_rows)
        model = tiny_model(dtype, checkpoint_activations=checkpoint).train()
        add_lora(model, ALL_LINEAR_AND_HEAD)
        fill_adapters(model, std=0.1)
        batch = scattered_labels(tiny_batch())
        loss = answer_loss_sum(model, {**batch, "images": batch["images"].to(dtype)})
        loss.backward()
        return [loss.detach().double()] + [p.grad.double() for p in model.parameters() if p.requires_grad]

    for exact, whole, chunked in zip(found(torch.float64, 1024), found(dtype, 1024), found(dtype, 5), strict=True):
        assert (chunked - exact).norm() <= 1.5 * (whole - exact).norm() + 1e-7 * exact.norm()


def test_dropout_on_the_heads_adapter_is_drawn_again_in_recomputation(monkeypatch):
    """The loss is linear in the adapter's B here, so the gradient at B tells which inputs were dropped."""
    monkeypatch.setattr(head, "CHUNK_ROWS", 4)
    model = tiny_model(torch.float64).train()
    add_lora(model, LoraConfig(r=4, target_modules=["lm-head"], lora_dropout=0.5))
    fill_adapters(model, std=0.1)
    batch = scattered_labels({**tiny_batch(), "images": tiny_batch()["images"].double()})
    (b,) = [p for name, p in model.named_parameters() if name.endswith("lm_head.B")]

    def loss():
        torch.manual_seed(3)
        return answer_loss_sum(model, batch)

    (gradient,) = torch.autograd.grad(loss(), b)
    direction = torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        b += 1e-3 * direction
        above = loss().double()
        b -= 2e-3 * direction
        below = loss().double()
    assert ((above - below) / 2e-3).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


class LogitRows(TorchDispatchMode):
    """Rows of float32 tensors as wide as the vocabulary: of the largest, and of all that are alive at once."""

    largest = alive = 0

    def __init__(self):
        super().__init__()
        self._seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_float32 = isinstance(result, torch.Tensor) and result.dtype == torch.float32
        if is_float32 and result.dim() == 2 and result.shape[1] == CONFIG["vocab_size"]:
            self._seen.append(weakref.ref(result))
            rows = [len(tensor) for tensor in (reference() for reference in self._seen) if tensor is not None]
            self.largest, self.alive = max(self.largest, *rows), max(self.alive, sum(rows))
        return result


@pytest.mark.parametrize("chunk_rows", [7, 1024])
def test_no_more_than_a_chunk_of_logits_is_alive(chunk_rows, monkeypatch):
    model, batch = tiny_model(torch.bfloat16).train(), scattered_labels(tiny_batch((True, False, False, False)))
    monkeypatch.setattr(head, "CHUNK_ROWS", chunk_rows)
    count = len(LabelledRows.from_labels(batch["labels"]).rows)
    with LogitRows() as rows:
        answer_loss_sum(model, batch).backward()
    if chunk_rows == 7:
        assert count > 30 and 0 < rows.largest <= 7 and rows.alive <= 4 * 7
    else:
        assert rows.largest == count


def test_a_parameter_that_all_chunks_use_gets_its_gradient_once(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ROWS", 4)
    model, arrivals = tiny_model().train(), []
    add_lora(model, ALL_LINEAR_AND_HEAD)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrivals.append(name))
    answer_loss_sum(model, scattered_labels(tiny_batch())).backward()
    assert len(arrivals) == len(set(arrivals)) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_batch_without_labels_gives_zeros_and_misses_nothing(chunks):
    weight, rows = torch.randn(6, 3, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    loss = loss_of_rows(lambda part: part @ weight.T, rows, torch.zeros(0, dtype=torch.int64), chunks)
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any() and rows.grad.shape == (0, 3)
    model = tiny_model().train()
    add_lora(model, ALL_LINEAR_AND_HEAD)
    loss = answer_loss_sum(model, collate([BrokenSample("a.png", "torn")], image_size=(21, 21)))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_without_labels_all_logits_come_and_nothing_else_changes():
    model, batch = tiny_model().eval(), tiny_batch()
    assert logits_of(model, batch).shape == (2, 20, CONFIG["vocab_size"])
    assert answer_loss_sum(model, batch).item() == pytest.approx(
        loss_of_all_logits(logits_of(model, batch).double(), batch["labels"]).item(), rel=1e-5
    )


def test_masks_and_labels_stay_on_the_host():
    moved = to_device({**tiny_batch(), "broken": []}, torch.device("meta"))
    on_host = {name for name, tensor in moved.items() if tensor.device.type == "cpu"}
    assert on_host == {"image_embed_mask", "vision_expert_mask", "labels"}


def counted_calls(stage, model_parallel, monkey_chunk):
    """Ranks with other lengths and other numbers of labels: of rank 1 first a few, then none."""
    head.CHUNK_ROWS = monkey_chunk
    world = init_model_parallel(init_distributed(), model_parallel)
    model = tiny_model(model_parallel_size=model_parallel).train()
    add_lora(model, ALL_LINEAR_AND_HEAD)
    fill_adapters(model, std=0.1)
    calls = []
    model.mixins["lm"].lm_head.register_forward_hook(lambda *args: calls.append(1))
    engine = start_engine(model, sgd(model, 0.1), engine_config(stage, 2))
    rank, losses = world.data_parallel_rank, []
    few = tiny_batch((False, False), seed=9, length=12, answer=2)
    none = collate([BrokenSample("a.png", "torn")], image_size=(21, 21))
    for other in (few, none):
        losses.append(step_together(engine, [other if rank else scattered_labels(tiny_batch())], world))
        losses.append(validate(engine, [other if rank else tiny_batch()], world).loss)
    return losses, len(calls)


def test_ranks_with_other_numbers_of_labels_train_alike():
    """A number of head calls that followed the labels would hang ZeRO-3, which gathers the weight at each."""
    expected, _ = run_ranks(counted_calls, 2, 2, 1, 1024)[0]
    for stage, model_parallel, chunk in ((2, 1, 5), (3, 1, 5)):
        ranks = run_ranks(counted_calls, 2, stage, model_parallel, chunk)
        assert all(losses == pytest.approx(expected, rel=1e-5) for losses, _ in ranks)
        if stage == 3:
            assert ranks[0][1] == ranks[1][1]
