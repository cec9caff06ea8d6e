"""Greedy decoding with the cache, against computing the whole sequence again for every token and against SAT's."""

import pytest
import torch
from sat.generation.autoregressive_sampling import update_mems
from sat.model.cached_autoregressive_model import CachedAutoregressiveMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sat_lora import ConfigError, DataError
from sat_lora.cogvlm.decoding.generate import Decoder, generate, inference
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.partitioned import Partitioning
from sat_lora.training.steps.engine import set_up_deepspeed, start_engine
from tests.support.decoding import NEVER, adapted_model, joined, prompts_of_many_kinds, without_cache
from tests.support.ranks import run_ranks
from tests.support.tiny import PATCHES, logits_of, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, sgd

pytestmark = pytest.mark.usefixtures("single_process_group")
ROWS = {"mixed": (True, False, True), "images": (True, True), "text": (False, False)}


@torch.no_grad()
def with_sat_cache(model, batch, count):
    """The same tokens with SAT's cached autoregressive mixin, which concatenates keys and values."""
    positions, vision = batch["position_ids"], ("images", "image_embed_mask", "vision_expert_mask")
    place, tokens = positions[:, -1:], []
    model.add_mixin("auto-regressive", CachedAutoregressiveMixin())
    try:
        logits, *layers = model(batch["input_ids"], positions, -1, **{key: batch[key] for key in vision})
        mems = None
        for _ in range(count):
            mems = update_mems([layer["mem_kv"] for layer in layers], mems, max_memory_length=2**31)
            tokens.append(logits[:, -1].argmax(-1))
            place = place + 1
            logits, *layers = model(tokens[-1][:, None], place, None, mems=mems)
    finally:
        model.del_mixin("auto-regressive")
    return torch.stack(tokens, 1).tolist()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("state", ["base", "adapter", "disabled", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_tokens_are_those_with_sats_cache(rows, state, dtype):
    model = tiny_model(dtype).eval() if state == "base" else adapted_model(dtype)
    for mixin in lora_mixins(model).values():
        if state == "disabled":
            mixin.disable()
        if state == "merged":
            mixin.merge()
    batch = tiny_batch(ROWS[rows])
    assert generate(model, batch, max_new_tokens=12, eos_token_id=NEVER) == with_sat_cache(model, batch, 12)


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_prompts_of_several_lengths_are_answered_as_each_alone(adapter):
    model = adapted_model() if adapter else tiny_model().eval()
    prompts = prompts_of_many_kinds()
    alone = [without_cache(model, prompt, 12)[0] for prompt in prompts]
    assert len({tuple(row) for row in alone}) == len(alone)
    assert generate(model, joined(prompts), max_new_tokens=12, eos_token_id=NEVER) == alone
    backwards = generate(model, joined(prompts[::-1]), max_new_tokens=12, eos_token_id=NEVER)
    assert backwards == alone[::-1]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_decoding_with_the_cache_equals_full_recomputation(rows, adapter):
    model = adapted_model() if adapter else tiny_model().eval()
    batch = tiny_batch(ROWS[rows])
    tokens = generate(model, batch, max_new_tokens=12, eos_token_id=NEVER)
    assert tokens == without_cache(model, batch, 12)
    assert len({tuple(row) for row in tokens}) == len(tokens) and all(len(set(row)) > 2 for row in tokens)


def test_the_adapter_takes_part_in_every_step():
    """Switched off after the prompt, or for it, the answers are others."""
    model, batch = adapted_model(), tiny_batch(ROWS["mixed"])
    whole = generate(model, batch, max_new_tokens=12, eos_token_id=NEVER)
    for on_prompt in (True, False):

        def switch(module, args, kwargs, on_prompt=on_prompt):
            for mixin in (module.mixins["lora"], module.mixins["eva"].vit_model.mixins["lora"]):
                mixin.enabled = kwargs["cache"].holds_prompts != on_prompt

        handle = model.register_forward_pre_hook(switch, with_kwargs=True)
        assert generate(model, batch, max_new_tokens=12, eos_token_id=NEVER) != whole
        handle.remove()


def test_a_prompt_may_end_with_its_image():
    model, batch = tiny_model().eval(), tiny_batch((True,), length=PATCHES + 3)
    assert generate(model, batch, max_new_tokens=6, eos_token_id=NEVER) == without_cache(model, batch, 6)


def test_an_answer_ends_before_its_eos_and_the_others_go_on():
    model, batch = tiny_model().eval(), tiny_batch(ROWS["mixed"])
    free = without_cache(model, batch, 12)
    eos = free[0][4]
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert len(expected[0]) <= 4 and max(map(len, expected)) > len(expected[0])
    assert generate(model, batch, max_new_tokens=12, eos_token_id=eos) == expected


def test_decoding_stops_when_every_answer_has_ended(monkeypatch):
    model, batch = tiny_model().eval(), tiny_batch((True,))
    first, second, third = without_cache(model, batch, 3)[0]
    steps = []
    model.register_forward_pre_hook(lambda module, args: steps.append(args[0].shape[1]))
    assert generate(model, batch, max_new_tokens=50, eos_token_id=third) == [[first, second]]
    assert steps == [batch["input_ids"].shape[1], 1, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_no_more_tokens_than_asked_for(count):
    model, batch = tiny_model().eval(), tiny_batch((True, False))
    assert generate(model, batch, max_new_tokens=count, eos_token_id=NEVER) == [
        row[:count] for row in without_cache(model, batch, 1)
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_afterwards_as_it_was_before(training):
    model, batch = adapted_model().train(training), tiny_batch()
    mixins, before = list(model.mixins), logits_of(model, batch)
    first = generate(model, batch, max_new_tokens=3, eos_token_id=NEVER)
    assert list(model.mixins) == mixins and {m.training for m in model.modules()} == {training}
    after = logits_of(model, batch)
    assert torch.equal(before, after) and after.requires_grad
    assert generate(model, batch, max_new_tokens=3, eos_token_id=NEVER) == first


def test_the_model_is_as_it_was_after_an_exception_too():
    model = tiny_model().train()
    with pytest.raises(KeyboardInterrupt), inference(model):
        assert not model.training
        raise KeyboardInterrupt
    assert model.training


def test_the_head_reads_one_token_of_each_row():
    model, rows = tiny_model(), []
    model.mixins["lm"].lm_head.register_forward_pre_hook(lambda head, args: rows.append(args[0].shape[:2]))
    generate(model, joined(prompts_of_many_kinds()), max_new_tokens=3, eos_token_id=NEVER)
    assert rows == [(4, 1)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_as_large_as_its_formula(dtype):
    """2 x layers x rows x heads x places x head_dim x bytes, and not a byte more while it is used."""
    model, batch = tiny_model(dtype).eval(), tiny_batch((True, False, True), length=20)
    decoder = Decoder(model, batch, 10)
    cache = decoder.cache
    places = 32  # 20 + 10, to the next multiple of 8
    size = 2 * 2 * 3 * 4 * places * 16 * dtype.itemsize
    addresses = cache.keys.data_ptr(), cache.values.data_ptr()
    with torch.no_grad():
        tokens = decoder.read_prompts().argmax(-1)
        for _ in range(9):
            tokens = decoder.step(tokens).argmax(-1)
    assert cache.keys.nbytes + cache.values.nbytes == size
    assert addresses == (cache.keys.data_ptr(), cache.values.data_ptr())
    assert cache.lengths.tolist() == [29] * 3
    used = cache.keys.abs().sum((0, 1, 2, 4)) > 0
    assert used.tolist() == [True] * 29 + [False] * 3


@torch.no_grad()
def test_every_shape_of_a_step_can_be_fixed():
    """As a CUDA graph needs it: the same operations on the same shapes and addresses in every step."""
    model, batch = adapted_model(), joined(prompts_of_many_kinds())
    expected = generate(model, batch, max_new_tokens=8, eos_token_id=NEVER)
    decoder = Decoder(model, batch, 8)
    decoder.cache.fixed_shapes = True
    tokens, steps = [decoder.read_prompts().argmax(-1)], []
    for _ in range(7):
        with SeenOperations() as seen:
            logits = decoder.step(tokens[-1])
        tokens.append(logits.argmax(-1))
        steps.append(seen.operations)
    assert torch.stack(tokens, 1).tolist() == expected
    assert len(steps[0]) > 50 and all(step == steps[0] for step in steps)


class SeenOperations(TorchDispatchMode):
    """While entered, notes each operation with the shapes of its tensors, and the addresses of what it writes into."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        written = tensors[0].data_ptr() if function._schema.name.endswith("scatter_") else None
        self.operations.append((function, [(one.shape, one.stride()) for one in tensors], written))
        return function(*args, **(kwargs or {}))


def decode_partitioned():
    """Tokens that this rank decodes with weights that ZeRO-3 has partitioned."""
    world = init_model_parallel(init_distributed())
    config = engine_config(3, 4)
    set_up_deepspeed()
    model, partitioning = adapted_model(), Partitioning(config)
    for parameter in model.parameters():
        partitioning.partition(parameter)
    start_engine(model, sgd(model, 0.1), config)
    prompts = prompts_of_many_kinds()
    batch = joined(prompts if world.rank == 0 else prompts[::-1])
    return generate(model, batch, max_new_tokens=8, eos_token_id=NEVER)


def test_partitioned_weights_decode_the_same_tokens():
    model = adapted_model()
    alone = [without_cache(model, prompt, 8)[0] for prompt in prompts_of_many_kinds()]
    assert run_ranks(decode_partitioned, 2) == [alone, alone[::-1]]


@pytest.mark.parametrize("lengths", [[20], [20, 21], [0, 20], [[20, 20]]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    batch = {**tiny_batch(), "lengths": torch.tensor(lengths)}
    with pytest.raises(DataError, match=r"lengths .* do not fit a batch of 2 rows of 20 tokens"):
        generate(tiny_model(), batch, max_new_tokens=3, eos_token_id=NEVER)


def test_any_of_several_eos_tokens_ends_an_answer():
    model, batch = tiny_model().eval(), tiny_batch(ROWS["mixed"])
    free = without_cache(model, batch, 12)
    ends = [free[0][4], free[1][2]]
    expected = [row[: min(row.index(end) for end in ends if end in row)] if {*ends} & {*row} else row for row in free]
    assert generate(model, batch, max_new_tokens=12, eos_token_id=ends) == expected
    assert len(expected[1]) <= 2


@pytest.mark.parametrize("eos", [[], "2", [2.0]])
def test_a_wrong_eos_is_refused(eos):
    with pytest.raises(ConfigError, match="eos_token_id: got .* wanted a token id or several"):
        generate(tiny_model(), tiny_batch(), max_new_tokens=3, eos_token_id=eos)


def test_fewer_tokens_than_none_are_refused():
    with pytest.raises(ConfigError, match="max_new_tokens: got -1, wanted at least 0"):
        generate(tiny_model(), tiny_batch(), max_new_tokens=-1, eos_token_id=NEVER)
