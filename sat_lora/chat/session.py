"""A conversation with a CogVLM and its adapters, from Python.

session = Chat(load_cogvlm("BASE"), adapters={"mine": "runs/mine/adapter"})
session.ask("What is this?", image="cat.png")
session.ask("And what is it doing?")
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sat_lora.adapters.loftq_base import approximate_base, refuse_mixed_bases
from sat_lora.adapters.save_load import load_adapter
from sat_lora.cogvlm.decoding.answer import Answer
from sat_lora.cogvlm.decoding.generate import stream_answers
from sat_lora.cogvlm.decoding.sampling import GREEDY, Sampling
from sat_lora.cogvlm.families import cross_image_size, family_of
from sat_lora.cogvlm.inputs.films import with_frames
from sat_lora.cogvlm.inputs.image import frame_tensor, image_tensor, load_frames, load_sizes
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS
from sat_lora.cogvlm.inputs.prompts import PROMPTS, WITHOUT_HISTORY, turn_texts, version_of
from sat_lora.cogvlm.inputs.text import Sample, build_sample, end_tokens, load_tokenizer
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.cogvlm.sizes import image_length_problem
from sat_lora.data.samples import collate
from sat_lora.errors import CheckpointError, ConfigError, DataError
from sat_lora.files.atomic import replace_text
from sat_lora.lora.apply import mixins_called
from sat_lora.lora.mixin import lora_mixins
from sat_lora.quantized.layers import quantized_weights
from sat_lora.training.steps.step import to_device

BASE = "base"
"""What the base is called among the adapters."""
MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Turn:
    """A question, what answered it ("base", or the name of an adapter), and the answer."""

    query: str
    speaker: str
    answer: str


@dataclass(frozen=True)
class Usage:
    """What an answer took: tokens of its prompt, the places of the image among them, and tokens that were drawn.

    is_whole: whether it ended by itself, and not because there was no room for more.
    """

    prompt_tokens: int
    completion_tokens: int
    is_whole: bool


@dataclass(frozen=True)
class Prepared:
    """A question as the model reads it, with its image and the turns before it, and the answer as far as it came."""

    sample: Sample
    answer: Answer

    @property
    def usage(self) -> Usage:
        """What the answer took so far."""
        return Usage(len(self.sample.input_ids), self.answer.taken, self.answer.is_whole)


class Chat:
    """A conversation, by the prompt format of the base, about one image at most.

    Where the format has a place for earlier turns (`keeps_history`), each question comes with those before it; the
    oldest are left out when they no longer fit. Under model parallelism every rank of the model asks the same.
    """

    def __init__(
        self,
        loaded: tuple[CogVLMModel, dict],
        *,
        adapters: Mapping[str, str | Path] | None = None,
        tokenizer: Any = None,
        version: str | None = None,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_length: int | None = None,
        stop: Sequence[str] = (),
        any_base: bool = False,
        special_tokens: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        """Begin a conversation with what `load_cogvlm` returned.

        adapters: folders by name, loaded beside each other; the first answers. Those that the model has already are
        there as well, by their mixins' names. Where LoftQ began them beside weights of the scheme that the model holds,
        its base becomes the one that they were trained beside, see `adapters.loftq_base`. tokenizer: one of
        `transformers`, or its folder (default: the base's). version: prompt format (default: what the base's config
        names, or chat). max_new_tokens: of an answer. max_length: of question, turns before and answer, in tokens
        (default: the base's max_sequence_length). any_base: takes adapters of another base, too. special_tokens:
        whether a question that spells one of the tokenizer's special tokens means it. max_pixels: of a picture that is
        read.
        Raises ConfigError for a wrong setting or tokenizer, or adapters that were trained beside different bases,
        AdapterError where an adapter does not fit, CheckpointError where the base's config contradicts itself.
        """
        self.model, config = loaded
        folder = getattr(self.model, "base_folder", None)
        if problem := image_length_problem(config):
            raise CheckpointError(f"the base's config: {problem}; copy it again")
        if tokenizer is None and folder is None:
            raise ConfigError("tokenizer: give one, or its folder; the model does not say where its base lies")
        self.version = version or (None if folder is None else version_of(folder)) or "chat"
        if self.version not in PROMPTS:
            raise ConfigError(f"version: got {self.version!r}, wanted one of {', '.join(PROMPTS)}")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {max_new_tokens}, wanted at least 1")
        self.max_length = max_length or int(config.get("max_sequence_length") or 2048)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.stop = tuple(stop)
        self.turns: list[Turn] = []
        """The turns that the next question comes after, the oldest first."""
        self.left_out = 0
        """How many of them the last question came without, since they no longer fitted."""
        source: Any = folder if tokenizer is None else tokenizer
        self._tokenizer = load_tokenizer(source) if isinstance(source, str | Path) else source
        self.usage: Usage | None = None
        """What the last answer took, as far as it came."""
        self._image: torch.Tensor | None = None
        self._image_size = tuple(config["eva_args"]["image_size"])
        self._cross_size = cross_image_size(config)
        self._cross_images: tuple[torch.Tensor, ...] = ()
        self._more_images: tuple[torch.Tensor, ...] = ()
        self.takes_frames = family_of(config).takes_frames
        """Whether the base takes films: a file, or a folder with the frames as pictures."""
        self._image_length = config["image_length"]
        self._ends = end_tokens(self._tokenizer, config)
        self._special_tokens = special_tokens
        self.max_pixels = max_pixels
        if schemes := tuple({weight.scheme.name for _, weight in quantized_weights(self.model)}):
            refuse_mixed_bases(adapters or {}, schemes)
        for number, (name, adapter) in enumerate((adapters or {}).items()):
            if not name or "." in name or name == BASE or name in self.adapters:
                problem = "is taken" if name in (BASE, *self.adapters) else "is no name: it is empty or has a dot"
                raise ConfigError(f"adapters: {name!r} {problem}; give another")
            load_adapter(self.model, adapter, name=name, any_base=any_base)
            if number == 0:  # all of them were trained beside one base
                approximate_base(self.model, adapter, name=name)
            self.use(BASE if number else name)
        if self.adapters:
            self.use(self.adapters[0])
        self.model.eval()

    @property
    def adapters(self) -> list[str]:
        """The names of the model's adapters, in the order in which they came."""
        names = (key.rpartition("mixins.")[2] for key in lora_mixins(self.model))
        return list(dict.fromkeys(names))

    @property
    def speaker(self) -> str:
        """Who answers the next question: "base", or the name of an adapter."""
        enabled = (n for n in self.adapters if any(mixin.enabled for mixin in mixins_called(self.model, n).values()))
        return next(enabled, BASE)

    @property
    def has_image(self) -> bool:
        """Whether the conversation is about an image."""
        return self._image is not None

    @property
    def keeps_history(self) -> bool:
        """Whether the prompt format has a place for earlier turns."""
        return self.version not in WITHOUT_HISTORY

    def use(self, name: str) -> None:
        """Let the adapter of that name answer from now on, or "base". Raises ConfigError if there is none."""
        if name != BASE and name not in self.adapters:
            raise ConfigError(f"there is no adapter {name!r}; there are: {', '.join([BASE, *self.adapters])}")
        for adapter in self.adapters:
            for mixin in mixins_called(self.model, adapter).values():
                mixin.enabled = adapter == name

    def show(self, image: str | Path | bytes | Image.Image) -> None:
        """Begin anew, about this image: its path, the content of its file, or a picture of PIL.

        Raises DataError where it cannot be read; the conversation is then as it was.
        """
        sizes = [self._image_size] if self._cross_size is None else [self._image_size, self._cross_size]
        if self.takes_frames and not isinstance(image, Image.Image):
            tensors = load_frames(image, self._image_size, self.version, max_pixels=self.max_pixels)
        elif self.takes_frames:
            tensors = [frame_tensor(image, self._image_size)]
        elif isinstance(image, Image.Image):
            tensors = [image_tensor(image, size) for size in sizes]
        else:
            name = "the image" if isinstance(image, bytes) else None
            tensors = load_sizes(image, sizes, name, max_pixels=self.max_pixels)
        self.reset()
        self._image = tensors[0]
        more = tuple(tensors[1:])
        self._more_images, self._cross_images = (more, ()) if self.takes_frames else ((), more)

    def reset(self, *, keeps_image: bool = False) -> None:
        """Forget the turns, and the image."""
        self.turns = []
        self.left_out = 0
        self._image = self._image if keeps_image else None
        self._cross_images = self._cross_images if keeps_image else ()
        self._more_images = self._more_images if keeps_image else ()

    def ask(self, query: str, image: str | Path | bytes | Image.Image | None = None) -> str:
        """Return the answer to a question. Arguments and errors are those of `stream`."""
        return "".join(self.stream(query, image))

    def stream(self, query: str, image: str | Path | bytes | Image.Image | None = None) -> Generator[str, None, None]:
        """Yield the answer as it comes, in pieces that end within no character.

        An image begins a new conversation, see `show`. When the iterator ends, or is closed earlier, the turn is kept
        with what was yielded. Raises DataError where the image cannot be read, the question cannot be encoded, or it
        does not fit.
        """
        if image is not None:
            self.show(image)
        speaker = self.speaker
        pieces: list[str] = []
        is_whole = False
        try:
            for piece in self._pieces(query):
                pieces.append(piece)
                yield piece
            is_whole = True
        finally:
            if pieces or is_whole:
                self.turns.append(Turn(query, speaker, "".join(pieces).strip()))

    def compare(self, query: str) -> Generator[tuple[str, Generator[str, None, None]], None, None]:
        """Yield base and every adapter with the pieces of its answer to the same question, which no turn keeps.

        Each one's pieces end when the next is taken. Afterwards whoever answered before answers again.
        """
        speaker = self.speaker
        try:
            for name in (BASE, *self.adapters):
                self.use(name)
                with closing(self._pieces(query)) as pieces:
                    yield name, pieces
        finally:
            self.use(speaker)

    def save(self, file: str | Path) -> None:
        """Write the turns as json. Raises OSError where it cannot be written."""
        content = {
            "base": self.model.base_name,
            "version": self.version,
            "turns": [asdict(turn) for turn in self.turns],
        }
        replace_text(Path(file), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def prepare(self, query: str) -> Prepared:
        """Return a question of this conversation, for `answer_together`. Raises DataError as `stream` does."""
        fitting = self._fitting(query)
        sample = replace(fitting, more_images=self._more_images, cross_images=self._cross_images)
        limit = min(self.max_new_tokens, self.max_length - len(sample.input_ids))
        return Prepared(sample, Answer(frozenset(self._ends), self.stop, self._tokenizer, limit=limit))

    def answer_together(self, questions: Sequence[Prepared]) -> Generator[list[str], None, None]:
        """Yield a new piece of each one's answer, "" where there is none, until all have ended; no turn keeps them.

        They are answered by whoever answers at present, and each as it would be alone.
        """
        device = next(self.model.parameters()).device
        batch = to_device(collate([question.sample for question in questions], image_size=self._image_size), device)
        answers = [question.answer for question in questions]
        longest = max(answer.limit or 0 for answer in answers)
        yield from stream_answers(self.model, batch, answers, max_new_tokens=longest, sampling=self.sampling)

    def _pieces(self, query: str) -> Generator[str, None, None]:
        question = self.prepare(query)
        with closing(self.answer_together([question])) as pieces:
            for (piece,) in pieces:
                self.usage = question.usage
                if piece:
                    yield piece

    def _fitting(self, query: str) -> Sample:
        """Return the question with as many turns before it as leave room for an answer.

        The newest are tried first and twice as many each time, so that what a long history costs is what fits of it.
        """
        needed = min(self.max_new_tokens, self.max_length // 4)
        turns = self.turns if self.keeps_history else []
        kept = 0
        sample = self._laid_out([], query)
        too_many = len(turns) + 1 if len(sample.input_ids) + needed <= self.max_length else 1
        step = 1
        while kept + 1 < too_many:
            number = min(kept + step, too_many - 1)
            longer = self._laid_out(turns[-number:], query)
            if len(longer.input_ids) + needed <= self.max_length:
                kept = number
                sample = longer
                step *= 2
            else:
                too_many = number
                step = max(1, (number - kept) // 2)
        if len(sample.input_ids) < self.max_length:
            self.left_out = len(turns) - kept
            return sample
        raise DataError(
            f"the question takes {len(sample.input_ids)} tokens{' with its image' * self.has_image}, and question and "
            f"answer may have {self.max_length} together; ask a shorter one, or raise max_length"
        )

    def _laid_out(self, turns: Sequence[Turn], query: str) -> Sample:
        *earlier, last = self._parts([*(turn.query for turn in turns), query])
        return build_sample(
            self._tokenizer,
            last,
            None,
            self._image_length,
            self.max_length,
            self._image,
            self._special_tokens,
            earlier=[(parts, turn.answer) for parts, turn in zip(earlier, turns)],
            joins_images=self.takes_frames,
        )

    def _parts(self, queries: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the prompt of each turn, as training lays it out: its text, after the image where there is one."""
        first, *more = turn_texts(self.version, queries)
        first_parts: tuple[str, ...] = ("", first) if self.has_image else (first,)
        if self.takes_frames and self.has_image:
            first_parts = with_frames(first_parts, [1 + len(self._more_images)], self.version)
        return [first_parts, *((text,) for text in more)]
