"""The step of one token as a CUDA graph, against the same step run eagerly."""

import gc

import pytest
import torch

from sat_lora.cogvlm.decoding import generate as generation
from sat_lora.cogvlm.decoding.captured_step import CapturedStep, _first_cause, _no_garbage_collection, can_be_captured
from sat_lora.cogvlm.decoding.generate import Decoder, generate, inference
from sat_lora.cogvlm.decoding.sampling import Sampling
from sat_lora.lora.mixin import lora_mixins
from tests.support.decoding import NEVER, adapted_model, joined, prompts_of_many_kinds, without_cache
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_without_capture_every_call_is_the_step():
    calls = []

    def step():
        calls.append(None)
        return torch.tensor(len(calls))

    captured = CapturedStep(step, capture=False)
    assert [int(captured()) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert not captured.is_captured


def test_partitioned_weights_are_not_captured():
    """Nor is anything on a CPU."""
    model, gpu = tiny_model(), torch.device("cuda")
    assert can_be_captured(model, gpu) and not can_be_captured(model, torch.device("cpu"))
    model.transformer.layers[0].attention.dense.weight.ds_id = 7
    assert not can_be_captured(model, gpu)


def on_gpu(model, batch):
    return model.to("cuda"), {key: value.to("cuda") for key, value in batch.items()}


def decode(model, batch, count=20):
    """(logits of every step, whether the last was a replay), greedily."""
    with torch.no_grad(), inference(model):
        decoder = Decoder(model, batch, count)
        logits = [decoder.read_prompts()]
        for _ in range(count - 1):
            logits.append(decoder.step(logits[-1].argmax(-1)).clone())
    return torch.stack(logits), decoder.captured_step.is_captured


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["base", "adapter", "disabled", "merged"])
def test_replayed_steps_give_the_logits_of_eager_ones(dtype, state, monkeypatch):
    model = tiny_model(dtype) if state == "base" else adapted_model(dtype)
    model, batch = on_gpu(model, joined(prompts_of_many_kinds()))
    for mixin in lora_mixins(model).values():
        if state == "disabled":
            mixin.disable()
        if state == "merged":
            mixin.merge()
    captured, is_captured = decode(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(CapturedStep, "__call__", lambda self: self._step())
        eager, is_replayed = decode(model, batch)
    assert is_captured and not is_replayed
    assert torch.equal(captured, eager)


@pytest.mark.cuda
@needs_gpu
def test_tokens_are_those_of_the_cpu():
    model, batch = adapted_model(), joined(prompts_of_many_kinds())
    expected = [without_cache(model, prompt, 20)[0] for prompt in prompts_of_many_kinds()]
    model, batch = on_gpu(model, batch)
    assert generate(model, batch, max_new_tokens=20, eos_token_id=NEVER) == expected
    eos = expected[0][6]
    cut = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert generate(model, batch, max_new_tokens=20, eos_token_id=eos) == cut


@pytest.mark.cuda
@needs_gpu
def test_drawn_tokens_do_not_depend_on_the_graph(monkeypatch):
    model, batch = on_gpu(adapted_model(), joined(prompts_of_many_kinds()))
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=5)
    tokens = [generate(model, batch, max_new_tokens=20, eos_token_id=NEVER, sampling=sampling)]
    monkeypatch.setattr(generation, "can_be_captured", lambda *_: False)
    tokens.append(generate(model, batch, max_new_tokens=20, eos_token_id=NEVER, sampling=sampling))
    assert tokens[0] == tokens[1]


@pytest.mark.cuda
@needs_gpu
def test_a_switched_adapter_is_seen_by_the_next_call():
    model, batch = on_gpu(adapted_model(), joined(prompts_of_many_kinds()))
    with_adapter = decode(model, batch)[0]
    for mixin in lora_mixins(model).values():
        mixin.enabled = False
    base = decode(model, batch)[0]
    for mixin in lora_mixins(model).values():
        mixin.enabled = True
    assert not torch.equal(with_adapter, base)
    assert torch.equal(with_adapter, decode(model, batch)[0])


@pytest.mark.cuda
@needs_gpu
def test_a_step_that_waits_for_the_device_stays_eager():
    """And leaves the device's random generator and allocator as they were."""
    model, batch = on_gpu(adapted_model(), joined(prompts_of_many_kinds()))
    expected = decode(model, batch)[0]
    handle = model.transformer.layers[1].register_forward_hook(lambda layer, args, output: print(output.sum().item()))
    logits, is_captured = decode(model, batch)
    handle.remove()
    assert not is_captured and torch.equal(logits, expected)
    assert torch.rand(3, device="cuda").isfinite().all()


@pytest.mark.cuda
@needs_gpu
def test_no_memory_is_taken_after_the_capture():
    model, batch = on_gpu(adapted_model(torch.bfloat16), joined(prompts_of_many_kinds()))
    with torch.no_grad(), inference(model):
        decoder = Decoder(model, batch, 40)
        tokens, allocated = decoder.read_prompts().argmax(-1), []
        for _ in range(39):
            tokens = decoder.step(tokens).argmax(-1)
            allocated.append(torch.cuda.memory_allocated())
    assert len(set(allocated[5:])) == 1


def test_no_garbage_is_collected_during_a_capture_and_then_as_before():
    with pytest.raises(KeyboardInterrupt), _no_garbage_collection():
        assert not gc.isenabled()
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_the_first_cause_of_a_failed_capture_is_told():
    with pytest.raises(RuntimeError) as end:
        try:
            raise ValueError("not while a stream is captured")
        finally:
            raise RuntimeError("the capture has failed")
    assert str(_first_cause(end.value)) == "not while a stream is captured"
