"""The tiny base's tokenizer: the words of CogVLM's prompts, and every printable ASCII character by itself."""

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0 to 3
WORDS = ("CAPTCHA", "Question", "Short", "answer", "Answer", "[INST]", "[/INST]")
CHARACTERS = ("\t", "\n", *map(chr, range(ord(" "), ord("~") + 1)))


def build_tokenizer() -> Tokenizer:
    """Return a tokenizer that splits a text into known words, else characters. Nothing is lost: decoding joins the
    tokens as they are.
    """
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    known_words = "|".join(re.escape(word) for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{known_words}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def write_tokenizer(folder: str | Path, max_length: int, *, pads: bool = True) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` by which transformers' AutoTokenizer finds its way
    offline.

    max_length: the longest sequence, in tokens. pads: whether it names a token for padding, as LLaMA 3's does not.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    if not pads:
        del names["pad_token"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # would take spaces out of decoded text
        "model_max_length": max_length,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
