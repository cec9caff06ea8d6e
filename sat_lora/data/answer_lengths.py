"""How many answers of a data set do not fit into --max_length, and what would hold them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sat_lora.cogvlm.inputs.films import MOST_FRAMES, TOUCHING
from sat_lora.cogvlm.inputs.text import IGNORED, turn_texts
from sat_lora.data.samples import ImageTextDataset, Item
from sat_lora.errors import SatLoraError
from sat_lora.parallel.distributed import gather_lists

LAID_OUT = 20_000  # samples that are tokenised; one that is short enough anyway is not
CHARACTERS = 1 << 25  # the same, of all their answers together
SPECIAL = 2 + 2  # BOS and EOS, and what a tokenizer puts before a text
NUMBER = 2 + 2  # tokens of a frame's number at most, and what a tokenizer puts before it
EXPANSION = 18  # tokens of a character outside ASCII at most, by the normal forms of Unicode and by bytes


@dataclass(frozen=True)
class AnswerLengths:
    """How many answers of a dataset do not fit.

    cut: samples whose answer is cut, of `looked_at`. longest: tokens of the longest of them, were it whole. is_part:
    whether only some of those that could be too long were looked at, and no others.
    """

    looked_at: int
    cut: int
    longest: int
    is_part: bool = False

    def sentence(self, max_length: int) -> str | None:
        """Return how many answers are cut, and what would hold them; None if no answer is cut."""
        if not self.cut:
            return None
        share = f"{self.cut:,} of {self.looked_at:,}{' long' * self.is_part}"
        return f"{share} answers are cut by --max_length {max_length}; {self.longest} would hold them"


def answer_lengths(dataset: ImageTextDataset) -> AnswerLengths:
    """Return how many answers of a dataset do not fit.

    All items are looked at, or, where more than LAID_OUT of them are long, so many, evenly spread. No image is read.
    What cannot be laid out is left to the run, which names it.
    """
    items = dataset.items
    long = [item for item in items if not _surely_fits(dataset, item)]
    every = max(1, -(-len(long) // LAID_OUT))
    cut = 0
    longest = 0
    characters = 0
    looked_at = 0
    for item in long[::every]:
        characters += min(len(item.answer) + sum(len(answer) for _, answer in item.history), CHARACTERS >> 8)
        if characters > CHARACTERS:
            break
        looked_at += 1
        try:
            sample = dataset.lay_out(item)
        except SatLoraError:
            continue
        cut += sample.left_out > 0
        if sample.left_out:
            longest = max(longest, len(sample.input_ids) + sample.left_out)
    is_part = looked_at < len(long)
    return AnswerLengths(looked_at if is_part else len(items), cut, longest, is_part)


class CutAnswers:
    """The batches of a stream, which nobody looks at before, with a count of the answers that are cut.

    The first batch in which an answer is cut is said. Answers count as often as they come: iterating it again, as every
    validation does, counts on.
    """

    def __init__(self, batches: Iterable[dict], say: Callable[[str], None], max_length: int, prefix: str = ""):
        self._batches = batches
        self._say = say
        self._max_length = max_length
        self._prefix = prefix
        self.answers = 0
        self.cut = 0
        self.longest = 0

    def __iter__(self) -> Iterator[dict]:
        for batch in self._batches:
            yield batch
            cut = batch["left_out"] > 0
            self.answers += int((batch["labels"] != IGNORED).any(1).sum())
            if not cut.any():
                continue
            is_first = self.cut == 0
            longest = int((batch["lengths"] + batch["left_out"])[cut].max())
            self.cut = self.cut + int(cut.sum())
            self.longest = max(self.longest, longest)
            if is_first:
                self._say(
                    f"{self._prefix}--max_length {self._max_length}: an answer does not fit and is cut, others may be; "
                    f"{longest} would hold it"
                )

    def say_all(self) -> None:
        """Say how many were cut on all ranks, which all have to call it; nothing if none was."""
        counts = gather_lists([(self.answers, self.cut, self.longest)])
        answers, cut = (sum(column) for column in [*zip(*counts)][:2])
        if cut:
            longest = max(longest for _, _, longest in counts)
            self._say(
                f"{self._prefix}--max_length {self._max_length} has cut {cut:,} of {answers:,} answers that came; "
                f"{longest} would hold them"
            )


def _surely_fits(dataset: ImageTextDataset, item: Item) -> bool:
    """Return whether an item fits by its characters alone, of which each gives few tokens."""
    images = len(item.images) * (MOST_FRAMES if dataset.takes_frames else 1)
    number = NUMBER if dataset.takes_frames and dataset.version != TOUCHING else 0
    places = (dataset.image_length + 2 + number) * images
    queries = [*(query for query, _ in item.history), dataset.prompt if item.prompt is None else item.prompt]
    answers = [*(answer for _, answer in item.history), item.answer]
    try:
        texts = [*turn_texts(dataset.version, queries, item.system), *answers]
    except SatLoraError:
        return False
    return SPECIAL * len(answers) + places + sum(map(_most_tokens, texts)) <= dataset.max_length


def _most_tokens(text: str) -> int:
    return len(text) if text.isascii() else EXPANSION * len(text)
