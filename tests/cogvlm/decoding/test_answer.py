"""Text as it comes against the whole text, with tokenizers whose tokens are single bytes."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sat_lora import ConfigError
from sat_lora.cogvlm.decoding.answer import Answer
from sat_lora.cogvlm.decoding.generate import generate, stream
from sat_lora.cogvlm.decoding.sampling import Sampling
from tests.support.decoding import NEVER, joined, prompts_of_many_kinds
from tests.support.tiny import tiny_model

EOS = 2
TEXT = "A naïve résumé. 漢字 and 👩‍🚀 in space , twice  .\nEnd"


def byte_level_tokenizer():
    """As GPT-2's: every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<bos>", "<eos>", *letters]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def byte_fallback_tokenizer():
    """As Llama's: ASCII letters, a mark for spaces, and bytes for everything else."""
    tokens = ["<pad>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)}, merges=[], byte_fallback=True, unk_token="<pad>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


TOKENIZERS = {"byte level": byte_level_tokenizer(), "byte fallback": byte_fallback_tokenizer()}


@pytest.fixture(params=TOKENIZERS)
def byte_tokenizer(request):
    return TOKENIZERS[request.param]


def pieces_of(tokenizer, text, stop=()):
    answer = Answer(frozenset({EOS}), stop, tokenizer)
    pieces = [answer.take(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    return answer, [*pieces, answer.finish()]


def test_the_pieces_are_the_whole_text_and_whole_characters(byte_tokenizer):
    answer, pieces = pieces_of(byte_tokenizer, TEXT)
    assert "".join(pieces) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(answer.tokens) > len(TEXT) and len([piece for piece in pieces if piece]) > 30
    assert all(len(piece) <= 2 for piece in pieces)  # nothing waits for longer than it has to


def test_bytes_that_are_no_character_come_at_the_end(byte_tokenizer):
    ids = byte_tokenizer.encode("a漢", add_special_tokens=False)[:-1]
    answer = Answer(frozenset({EOS}), (), byte_tokenizer)
    pieces = [answer.take(token) for token in ids]
    whole = byte_tokenizer.decode(ids)
    assert whole.endswith("\N{REPLACEMENT CHARACTER}") and "".join(pieces) == "a"
    assert "".join(pieces) + answer.finish() == whole


def test_special_tokens_are_no_text_and_eos_ends(byte_tokenizer):
    answer = Answer(frozenset({EOS}), (), byte_tokenizer)
    ids = byte_tokenizer.encode("hello", add_special_tokens=False)
    text = "".join(answer.take(token) for token in [1, *ids, EOS, *ids])
    assert (text, answer.tokens, answer.is_finished) == ("hello", [1, *ids], True)


@pytest.mark.parametrize(
    "stop, text",
    [
        (["space"], TEXT[: TEXT.index("space")]),
        (["nothing of this"], TEXT),
        (["twice", "字"], TEXT[: TEXT.index("字")]),
        (["naïve résumX", "résumé. 漢"], "A naïve "),
        (["A"], ""),
    ],
)
def test_a_stop_string_ends_the_text_before_it(byte_tokenizer, stop, text):
    answer, pieces = pieces_of(byte_tokenizer, TEXT, stop)
    assert "".join(pieces) == text
    assert byte_tokenizer.decode(answer.tokens, clean_up_tokenization_spaces=False) == text
    assert answer.is_finished


def test_what_may_become_a_stop_string_waits(byte_tokenizer):
    _, pieces = pieces_of(byte_tokenizer, "ababac", ["abac"])
    assert [piece for piece in pieces if piece] == ["ab"]
    _, pieces = pieces_of(byte_tokenizer, "abaXaba", ["abac"])
    assert [piece for piece in pieces if piece] == ["abaX", "aba"]


class LetterTokenizer:
    """Any token is a letter."""

    def decode(self, tokens, **options):
        return "".join(chr(97 + token % 26) for token in tokens)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)], ids=["greedy", "drawn"])
@pytest.mark.usefixtures("single_process_group")
def test_streaming_gives_what_generating_gives(sampling):
    model, batch = tiny_model().train(), joined(prompts_of_many_kinds())
    limits = dict(max_new_tokens=20, sampling=sampling)
    free = generate(model, batch, eos_token_id=NEVER, **limits)
    texts = ["".join(LetterTokenizer().decode(row)) for row in free]
    stop, eos = [texts[0][4:7], texts[1][9:11]], free[2][5]
    settings = dict(eos_token_id=[eos, NEVER], stop=stop, tokenizer=LetterTokenizer(), **limits)
    tokens = generate(model, batch, **settings)
    pieces = list(stream(model, batch, **settings))
    assert model.training
    assert ["".join(row) for row in zip(*pieces)] == [LetterTokenizer().decode(row) for row in tokens]
    cut = [text[: min([text.index(s) for s in stop if s in text], default=20)] for text in texts]
    ends = [row.index(eos) if eos in row else 20 for row in free]
    assert [LetterTokenizer().decode(row) for row in tokens] == [text[:end] for text, end in zip(cut, ends)]
    assert len(tokens[0]) <= 4 and len(tokens[2]) <= 5


@pytest.mark.usefixtures("single_process_group")
def test_a_stream_that_is_left_gives_the_model_back():
    model, batch = tiny_model().train(), joined(prompts_of_many_kinds())
    pieces = stream(model, batch, max_new_tokens=20, eos_token_id=NEVER, tokenizer=LetterTokenizer())
    assert len(next(pieces)) == 4 and not model.training
    assert torch.is_grad_enabled()
    pieces.close()
    assert model.training


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("stop, message", [("\n", "wanted a list of strings"), ([""], "wanted a list of strings"),
                                           (["x"], "give the tokenizer too")])  # fmt: skip
def test_wrong_stop_strings_are_refused(stop, message):
    with pytest.raises(ConfigError, match=message):
        generate(tiny_model(), joined(prompts_of_many_kinds()), max_new_tokens=3, eos_token_id=EOS, stop=stop)


@pytest.mark.parametrize("limit", [1, 4])  # within no character
def test_a_limit_ends_it_with_all_text_so_far_and_says_so(byte_tokenizer, limit):
    ids = byte_tokenizer.encode("a漢語b", add_special_tokens=False)
    answer = Answer(frozenset({EOS}), (), byte_tokenizer, limit=limit)
    text = "".join(answer.take(token) for token in ids)
    assert text == byte_tokenizer.decode(ids[:limit]) and answer.tokens == ids[:limit]
    assert (answer.taken, answer.is_whole, answer.is_finished) == (limit, False, True)
    assert answer.take(ids[0]) == answer.finish() == "" and answer.taken == limit


def test_an_end_at_the_limit_is_an_end(byte_tokenizer):
    ids = byte_tokenizer.encode("hello", add_special_tokens=False)
    answer = Answer(frozenset({EOS}), (), byte_tokenizer, limit=len(ids) + 1)
    assert "".join(answer.take(token) for token in [*ids, EOS]) == "hello"
    assert (answer.taken, answer.is_whole, answer.is_finished) == (len(ids) + 1, True, True)
