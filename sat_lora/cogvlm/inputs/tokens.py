"""Texts to token ids, so that a text stays a text, whatever it spells, and a long one costs no more than is kept."""

import itertools
import re
from functools import lru_cache

from sat_lora.errors import DataError

WHOLE = 1 << 16  # characters of a text that is always encoded as a whole
PER_TOKEN = 8  # characters tried first for a token that is kept; tokens of words have fewer
MARGIN = 64  # tokens at the end of a piece that the cut may have changed
MOST_PER_TOKEN = 512  # characters; the longest tokens that tokenizers have are runs of spaces


def text_tokens(tokenizer, text: str, special_tokens: bool = False, what: str = "text") -> list[int]:
    """Return the ids of a text, without BOS and EOS.

    special_tokens: a text that spells one of the tokenizer's special tokens (`</s>`) is that token; else it is encoded
    as the letters it consists of. A text that spells none has the same ids either way.
    Raises DataError, which calls the text `what`, if it cannot be encoded.
    """
    _check(text, what)
    ids = _encode(tokenizer, text, what)
    if special_tokens or not _spells_special(tokenizer, text, ids):
        return ids
    ids = _encode(tokenizer, text, what, split_special_tokens=True)
    if _spells_special(tokenizer, text, ids):
        ids = _in_pieces(tokenizer, text, what)
    return ids


def first_tokens(
    tokenizer, text: str, count: int, special_tokens: bool = False, what: str = "text"
) -> tuple[list[int], int]:
    """Return (the first `count` of `text_tokens`, how many more there are).

    Of a text of more than WHOLE characters only a beginning is encoded: long enough that twice as long a one begins
    with the same tokens, and the number of the others is what their characters would give at the same rate.
    """
    if len(text) <= max(WHOLE, PER_TOKEN * count):
        ids = text_tokens(tokenizer, text, special_tokens, what)
        return ids[:count], max(0, len(ids) - count)
    size = PER_TOKEN * count + WHOLE // 4
    before: list[int] | None = None
    while size < len(text) and size <= MOST_PER_TOKEN * count + WHOLE:
        ids = text_tokens(tokenizer, text[:size], special_tokens, what)
        if len(ids) >= count + MARGIN:
            beginning = ids[:count]
            if beginning == before:
                return beginning, max(1, round(len(ids) * len(text) / size) - count)
            before = beginning
        size *= 2
    if size < len(text):
        raise DataError(f"the {what} of {len(text)} characters has no {count} tokens in its first {size // 2}")
    ids = text_tokens(tokenizer, text, special_tokens, what)
    return ids[:count], max(0, len(ids) - count)


def _check(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            fault = f"byte 0x{code & 0xFF:02X}, which is no UTF-8 (a file name in another encoding? rename the file)"
        else:
            fault = f"half a character, U+{code:04X} (a text that was cut in the middle of one, such as an emoji)"
        raise DataError(f"the {what} holds {fault} at place {error.start + 1}") from None


def _encode(tokenizer, text: str, what: str, **settings) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False, **settings))
    except Exception as error:  # of tokenizers' own kinds, TypeError and ValueError among them
        raise DataError(f"the {what} cannot be encoded by the tokenizer: {str(error)[:200]}") from error


def _spells_special(tokenizer, text: str, ids: list[int]) -> bool:
    """Return whether some id comes from a spelled special token. An unknown word has one of them by right."""
    spellings, unknown = _special_tokens(tokenizer)
    numbers = spellings.keys() & set(ids)
    return any(number != unknown or spellings[number] in text for number in numbers)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer) -> tuple[dict[int, str], int | None]:
    """Return ({id: how it is written} of the special tokens, the id of unknown words)."""
    added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    spellings = {number: token.content for number, token in added.items() if token.special}
    spellings |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return spellings, tokenizer.unk_token_id


def _in_pieces(tokenizer, text: str, what: str) -> list[int]:
    """Return the ids of a text whose special tokens come back even from their letters.

    Each place where one is spelled is cut behind its first letter, and the pieces are encoded on their own.
    """
    spellings, _ = _special_tokens(tokenizer)
    written = sorted((s for s in spellings.values() if s), key=len, reverse=True)
    cuts = {match.start() + 1 for match in re.finditer("|".join(map(re.escape, written)), text)}
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places) if a < b]
    ids = [number for piece in pieces for number in _encode(tokenizer, piece, what, split_special_tokens=True)]
    if _spells_special(tokenizer, text, ids) and _spells_any(tokenizer, ids):
        raise DataError(
            f"the {what} spells a special token that the tokenizer has no other tokens for; take it out, or give "
            "--special-tokens-in-text"
        )
    return ids


def _spells_any(tokenizer, ids: list[int]) -> bool:
    spellings, unknown = _special_tokens(tokenizer)
    return any(number in spellings and number != unknown for number in ids)
