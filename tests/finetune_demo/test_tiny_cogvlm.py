"""The demo's base model, as committed."""

import sys

import pytest
import torch

from sat_lora.cogvlm import build_cogvlm, load_cogvlm
from sat_lora.cogvlm.checkpoints.load import map_weights, read_config, weight_files
from sat_lora.cogvlm.inputs.text import PROMPTS, build_sample, load_tokenizer, prompt_for
from tests.support.paths import DEMO, TINY_BASE

sys.path.insert(0, str(DEMO))
from clean_strings import clean_strings, colour
from make_tiny_cogvlm import CONFIG, SIZE
from tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_BASE)


def read(model, tokenizer, images: torch.Tensor) -> list[str]:
    """Greedy decoding with the whole sequence computed anew for every token."""
    prompt = prompt_for("base", "CAPTCHA:")
    answers = [""] * len(images)
    for _ in range(3):  # characters
        samples = [build_sample(tokenizer, prompt, answer, model.image_length, 64) for answer in answers]

        def stack(name, samples=samples):  # without the end of sequence, which is what we want to know
            return torch.stack([getattr(sample, name) for sample in samples])[:, :-1]

        logits = model(
            stack("input_ids"),
            stack("position_ids"),
            images=images,
            image_embed_mask=stack("image_embed_mask"),
            vision_expert_mask=stack("vision_expert_mask"),
        )[0]
        answers = [old + tokenizer.decode(new) for old, new in zip(answers, logits[:, -1].argmax(-1), strict=True)]
    return answers


def test_it_is_small_enough_to_be_committed():
    assert sum(file.stat().st_size for file in TINY_BASE.rglob("*") if file.is_file()) <= 8 * 2**20


def test_every_weight_is_there_in_bfloat16_and_no_other():
    (file,) = weight_files(TINY_BASE)
    state = map_weights(file)
    model = build_cogvlm(read_config(TINY_BASE))
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in state.values())


def test_the_config_and_the_tokenizer_are_what_the_script_writes(tmp_path, tokenizer):
    config = read_config(TINY_BASE)
    assert config == CONFIG
    write_tokenizer(tmp_path, config["max_sequence_length"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (TINY_BASE / name).read_text()
    ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert ids == (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"], 3)
    assert len(tokenizer) <= config["vocab_size"]


@pytest.mark.parametrize("text", ["123", "0", "CAPTCHA:", "Two  words,\n[INST] a\ttab & a ~", *"0123456789"])
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert min(ids) >= 4, "no special token"


def test_a_digit_is_one_token_and_padding_vanishes(tokenizer):
    ids = tokenizer.encode("470", add_special_tokens=False)
    assert len(ids) == 3
    ends = [tokenizer.bos_token_id], [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ends[0] + ids + ends[1], skip_special_tokens=True).strip() == "470"


@pytest.mark.parametrize("version", PROMPTS)
def test_prompts_use_whole_words(tokenizer, version):
    prompt = prompt_for(version, "CAPTCHA:", (("CAPTCHA:", "12"),) if version.startswith("chat") else ())
    tokens = tokenizer.tokenize(prompt.replace("<EOI>", ""))
    assert not [token for token in tokens if token.isalpha() and len(token) == 1]
    assert "<unk>" not in tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_reads_clean_strings(tokenizer, dtype):
    model, _ = load_cogvlm(TINY_BASE, dtype=dtype)
    masks, texts = clean_strings(200, SIZE, seed=4711)
    with torch.no_grad():
        answers = read(model.eval(), tokenizer, colour(masks, torch.Generator().manual_seed(0)))
    assert sum(map(str.__eq__, answers, texts)) >= 190
