"""Chosen tokens, against distributions and penalties worked out in float64 by other means."""

import re

import pytest
import torch

from sat_lora import ConfigError
from sat_lora.cogvlm.decoding.generate import generate
from sat_lora.cogvlm.decoding.sampling import GREEDY, Sampling, TokenChooser
from tests.support.decoding import NEVER, joined, prompts_of_many_kinds, without_cache
from tests.support.ranks import run_ranks
from tests.support.tiny import logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.9, -4.0, 0.0])
DRAWS = 40_000


def drawn_shares(**settings):
    """How often each token is drawn for the same logits, by as many rows."""
    prompts = torch.zeros(DRAWS, 1, dtype=torch.long)
    choose = TokenChooser(Sampling(seed=0, **settings), prompts, torch.ones(DRAWS, 1) > 0, 1)
    return torch.bincount(choose(LOGITS.expand(DRAWS, -1)), minlength=len(LOGITS)) / DRAWS


def shares(logits):
    weights = [2.718281828459045 ** float(value) for value in logits]
    return torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)


def assert_same_shares(got, expected):
    """Within 4.5 standard deviations of so many draws; what cannot be drawn never is."""
    tolerance = 4.5 * (expected * (1 - expected) / DRAWS).sqrt()
    assert ((got - expected).abs() <= tolerance).all(), (got, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_are_drawn_from_the_softmax_at_that_temperature(temperature):
    assert_same_shares(drawn_shares(temperature=temperature), shares(LOGITS / temperature))


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_draws_from_the_likeliest(top_k):
    likeliest, kept = LOGITS.argsort(descending=True)[:top_k], torch.full_like(LOGITS, float("-inf"))
    kept[likeliest] = LOGITS[likeliest]
    assert_same_shares(drawn_shares(temperature=1.0, top_k=top_k), shares(kept))


@pytest.mark.parametrize("top_p, tokens", [(0.5, [3]), (0.7, [3, 0]), (0.85, [3, 0, 4])])
def test_top_p_draws_from_the_fewest_that_reach_it(top_p, tokens):
    whole, kept = shares(LOGITS), torch.full_like(LOGITS, float("-inf"))
    assert whole[tokens].sum() >= top_p > whole[tokens[:-1]].sum()
    kept[tokens] = LOGITS[tokens]
    assert_same_shares(drawn_shares(temperature=1.0, top_p=top_p), shares(kept))


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-6)])
def test_the_narrowest_settings_are_greedy(settings):
    model, batch = tiny_model().eval(), joined(prompts_of_many_kinds())
    greedy = generate(model, batch, max_new_tokens=12, eos_token_id=NEVER)
    sampling = Sampling(**{"temperature": 1.0, "seed": 3, **settings})
    assert generate(model, batch, max_new_tokens=12, eos_token_id=NEVER, sampling=sampling) == greedy


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    model, batch = tiny_model().eval(), tiny_batch((True, False, True))

    def draw(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(model, batch, max_new_tokens=12, eos_token_id=NEVER, sampling=sampling)

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    model, prompts = tiny_model().eval(), prompts_of_many_kinds()

    def draw(batch, seed):
        sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=seed)
        return generate(model, batch, max_new_tokens=10, eos_token_id=NEVER, sampling=sampling)

    assert draw(joined(prompts), 7) == [draw(prompt, 7 + row)[0] for row, prompt in enumerate(prompts)]


def test_the_repetition_penalty_is_on_words_of_the_prompt_and_of_the_answer():
    """Not on the padding id, nor on what stands at the places of an image."""
    model, prompts = tiny_model().eval(), prompts_of_many_kinds()
    expected = [penalised_without_cache(model, prompt, 12, 4.0) for prompt in prompts]
    batch = joined(prompts)
    for row, tokens in enumerate(expected):  # what would be said, stands where it must not count
        no_word = batch["image_embed_mask"][row] == 1
        no_word[batch["lengths"][row] :] = True
        batch["input_ids"][row, no_word] = tokens[0]
    sampling = Sampling(repetition_penalty=4.0)
    tokens = generate(model, batch, max_new_tokens=12, eos_token_id=NEVER, sampling=sampling)
    assert tokens == expected
    assert tokens != [without_cache(model, prompt, 12)[0] for prompt in prompts]


@torch.no_grad()
def penalised_without_cache(model, batch, count, penalty):
    batch, tokens = dict(batch), []
    words = set(batch["input_ids"][batch["image_embed_mask"] == 0].tolist())
    for _ in range(count):
        logits = logits_of(model, batch)[0, -1].double()
        for word in words:
            logits[word] *= 1 / penalty if logits[word] > 0 else penalty
        token = logits.argmax()[None, None]
        words.add(int(token))
        tokens.append(int(token))
        zeros = torch.zeros_like(token)
        grown = dict(input_ids=token, position_ids=batch["position_ids"][:, -1:] + 1)
        grown |= dict(image_embed_mask=zeros, vision_expert_mask=zeros)
        batch |= {key: torch.cat([batch[key], value], 1) for key, value in grown.items()}
    return tokens


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1, top_p=0, top_k=1.5, repetition_penalty=0)
    for name in ("temperature: got -1", "top_p: got 0", "top_k: got 1.5", "repetition_penalty: got 0"):
        assert name in str(caught.value)


@pytest.mark.parametrize("settings", [dict(top_k=5), dict(top_p=0.5)])
def test_a_cut_without_a_temperature_is_refused(settings):
    with pytest.raises(ConfigError, match="temperature 0 draws nothing"):
        Sampling(**settings)


def draw_in_layout(model_parallel):
    """Greedy and drawn tokens; on every rank, with and without a seed."""
    from sat_lora.parallel.distributed import init_distributed, init_model_parallel

    init_model_parallel(init_distributed(), model_parallel)
    model, batch = tiny_model(model_parallel_size=model_parallel), joined(prompts_of_many_kinds())
    torch.manual_seed(torch.distributed.get_rank())
    limits = dict(max_new_tokens=10, eos_token_id=NEVER)
    seeded = Sampling(temperature=1.0, top_k=50, seed=3)
    unseeded = generate(model, batch, **limits, sampling=Sampling(temperature=1.0))
    return [generate(model, batch, **limits, sampling=sampling) for sampling in (GREEDY, seeded)], unseeded


def test_model_parallel_ranks_choose_what_one_rank_does():
    ((alone, _),) = run_ranks(draw_in_layout, 1, 1)
    (first, first_unseeded), (second, second_unseeded) = run_ranks(draw_in_layout, 2, 2)
    assert first == second == alone
    assert first_unseeded == second_unseeded


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-6},
        {"temperature": 1e6, "repetition_penalty": 1e6},
        {"temperature": 1e-6, "repetition_penalty": 1e-6},
        {"temperature": 1, "top_p": 1e-300},
        {"temperature": 1, "top_k": 2**70},
    ],
)
def test_settings_at_their_bounds_draw_tokens_that_there_are(settings):
    prompts = torch.arange(7).expand(50, -1)
    choose = TokenChooser(Sampling(seed=0, **settings), prompts, torch.ones(50, 7) > 0, 1)
    tokens = choose(300 * LOGITS.expand(50, -1))
    assert tokens.min() >= 0 and tokens.max() < len(LOGITS)
    if settings == {"temperature": 1e-6}:
        assert (tokens == LOGITS.argmax()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_end_nothing(value):
    """On CUDA a token that there is not would end the process, and with it a server."""
    choose = TokenChooser(Sampling(temperature=1, seed=0), torch.zeros(9, 1).long(), torch.ones(9, 1) > 0, 1)
    tokens = choose(torch.full((9, 7), value))
    assert tokens.min() >= 0 and tokens.max() < 7


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-7, 1e-320, 1.1e6, 1e308])
def test_factors_that_no_float32_holds_are_refused(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{name}: got {value}, wanted ") + "(0, or )?1e-06 to 1e"):
        Sampling(**{"temperature": 1.0, name: value})
