"""Where a run's batches come from: files that are read at will, or tar shards that are streamed."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import DataLoader

from sat_lora.data.answer_lengths import AnswerLengths, answer_lengths
from sat_lora.data.batches.mixtures import MixtureSampler, Part
from sat_lora.data.batches.sampler import EpochSampler, eval_batches, make_loader, make_stream_loader
from sat_lora.data.batches.shard_stream import ShardStream
from sat_lora.data.reading import Reading
from sat_lora.data.records.record import IMAGE_MARK
from sat_lora.data.samples import DataCounts, ImageTextDataset, Item, read_items, reading_options, split_items
from sat_lora.data.shards.shards import Shard, count_shards, find_records
from sat_lora.files.paths import is_shard, split_weight
from sat_lora.parallel.agreement import mark
from sat_lora.parallel.distributed import World

SIZES_TRIED = 256  # samples whose files are asked for their size
FIRST_OF_SHARDS = 100  # samples of tar shards that are looked at, since their images are read with the rest


class Source(Protocol):
    """Where the batches of a run come from, in whatever way its samples are kept.

    Each method answers for this rank, and so that the answers of all ranks fit together.
    """

    samples: int
    """How many there are, over all ranks."""
    epoch_samples: int
    """The number of samples that an epoch counts as, for `total_steps`."""
    dataset: ImageTextDataset
    """What makes a sample of an item."""
    left_out: list[tuple[str, int]]
    """What lies in the paths and is no sample, as (reason, count)."""
    is_stream: bool
    """Whether nobody looks through the samples before their turn comes."""
    packing: str | None
    """What the samples are kept in, for people; None where the paths say it themselves."""
    layouts: Mapping[str, int]
    """How many samples are of each layout, for people; empty where nobody has looked at all of them."""

    def marks(self, option: str) -> dict[str, str]:
        """Return what all ranks have to have alike, see `agree`. option: the one that gave the paths."""

    def description(self) -> dict:
        """Return what tells these samples, in their order, from others: {"samples": how many, "digest": ...}."""

    def files(self) -> str:
        """Return what tells the files of these samples from others of the same names: a digest of some sizes."""

    def first_items(self, most: int) -> Iterator[Item]:
        """Yield the first items, at most so many; those that cannot be read are passed over."""

    def answer_lengths(self) -> AnswerLengths | None:
        """Return how many answers are cut; None of a stream."""

    def training(self, start_step: int) -> Iterable[dict]:
        """Return a loader of this rank's micro-batches without end, from `start_step` on."""

    @property
    def validation_batches(self) -> int:
        """How many batches of this rank are in one pass."""

    def validation(self) -> Iterable[dict]:
        """Return a loader of one pass: every sample on one rank, as many batches on every rank.

        There are at most --eval-iters of them.
        """


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What decides which batches come: paths, how they are read and divided, and how many samples a batch has."""

    train_data: Sequence[str]
    valid_data: Sequence[str] | None
    split: Sequence[float]
    seed: int
    batch_size: int
    eval_batch_size: int
    eval_iters: int
    num_workers: int
    max_pixels: int
    ignore_keys: Sequence[str] = ()
    images_from: Sequence[str] = ()
    names_are_answers: bool = False
    run_folder: str | None = None
    data_format: str | None = None
    columns: Sequence[str] = ()
    image_mark: str = IMAGE_MARK
    images_per_sample: int = 1


class FileSource(Source):
    """A `Source` of items whose images are files, read at will.

    make_dataset: gives the ImageTextDataset of a list of items. parts: the stretches of the items that are drawn from
    by weight; none: an epoch has each item once.
    """

    is_stream = False
    packing: str | None = None

    def __init__(
        self,
        items: list,
        make_dataset: Callable[[list], ImageTextDataset],
        options: SourceSettings,
        world: World,
        left_out: Sequence[tuple[str, int]] = (),
        layouts: Mapping[str, int] | None = None,
        parts: Sequence[Part] = (),
    ):
        self.left_out = [*left_out]
        self.layouts: Mapping[str, int] = layouts or {}
        self.parts = parts
        self.dataset = make_dataset(items)
        self.options = options
        self.world = world
        self.samples = len(items)
        self.epoch_samples = len(items)

    def marks(self, option: str) -> dict[str, str]:
        return marks_of_samples(option, self.samples, self.dataset.items)

    def description(self) -> dict:
        """Return the number of samples, and a digest of names, prompts and answers."""
        parts = [("part", part.samples, part.weight) for part in self.parts]
        return {"samples": self.samples, "digest": _digest(itertools.chain(map(_entry, self.dataset.items), parts))}

    def files(self) -> str:
        return sizes_mark(self.dataset.items)

    def first_items(self, most: int) -> Iterator[Item]:
        return iter(self.dataset.items[:most])

    def answer_lengths(self) -> AnswerLengths | None:
        return answer_lengths(self.dataset)

    def training(self, start_step: int) -> DataLoader:
        options = self.options
        settings: dict[str, Any] = dict(
            batch_size=options.batch_size,
            data_parallel_rank=self.world.data_parallel_rank,
            data_parallel_size=self.world.data_parallel_size,
            seed=options.seed,
            start_step=start_step,
        )
        sampler = MixtureSampler(self.parts, **settings) if self.parts else EpochSampler(len(self.dataset), **settings)
        return make_loader(self.dataset, sampler, num_workers=options.num_workers, seed=options.seed)

    @property
    def validation_batches(self) -> int:
        return len(self._validation_indices())

    def _validation_indices(self) -> list[list[int]]:
        options = self.options
        return eval_batches(
            len(self.dataset),
            batch_size=options.eval_batch_size,
            data_parallel_rank=self.world.data_parallel_rank,
            data_parallel_size=self.world.data_parallel_size,
            limit=options.eval_iters,
        )

    def validation(self) -> DataLoader:
        options = self.options
        batches = self._validation_indices()
        return make_loader(self.dataset, batches, num_workers=min(1, options.num_workers), seed=options.seed)


class ShardSource(Source):
    """A `Source` of tar shards, which are streamed. An epoch's places without a sample count as one."""

    is_stream = True

    def __init__(
        self,
        shards: list[Shard],
        make_dataset: Callable[[list], ImageTextDataset],
        options: SourceSettings,
        world: World,
        left_out: Sequence[tuple[str, int]] = (),
    ):
        self.left_out = [*left_out]
        self.layouts: Mapping[str, int] = {}
        self.shards = shards
        self.dataset = make_dataset([])
        self.options = options
        self.world = world
        self.packing: str | None = f"{len(shards):,} tar shards"
        self.samples = sum(shard.samples for shard in shards)
        steps = self._stream(options.batch_size, options.num_workers).steps_per_epoch
        self.epoch_samples = steps * options.batch_size * world.data_parallel_size

    def description(self) -> dict:
        """Return the number of samples, and a digest of the names of the shards and how many each holds."""
        entries = ((Path(shard.path).name, shard.samples) for shard in self.shards)
        return {"samples": self.samples, "digest": _digest(entries)}

    def files(self) -> str:
        """Return a digest of the sizes of the shards themselves."""
        return sizes_mark([Item(Path(shard.path), "") for shard in self.shards])

    def first_items(self, most: int) -> Iterator[Item]:
        """Yield what FileSource does, at most FIRST_OF_SHARDS of them."""
        records = itertools.chain.from_iterable(find_records(shard.path) for shard in self.shards)
        for record in itertools.islice(records, min(most, FIRST_OF_SHARDS)):
            item = record.read(self.options.max_pixels, Reading.of(self.options).records)
            if isinstance(item, Item):
                yield item

    def answer_lengths(self) -> AnswerLengths | None:
        return None

    def _stream(self, batch_size: int, num_workers: int, **settings) -> ShardStream:
        return ShardStream(
            self.shards,
            self.dataset.make_sample,
            image_size=self.dataset.image_size,
            batch_size=batch_size,
            data_parallel_rank=self.world.data_parallel_rank,
            data_parallel_size=self.world.data_parallel_size,
            num_workers=num_workers,
            seed=self.options.seed,
            records=Reading.of(self.options).records,
            max_pixels=self.dataset.max_pixels,
            **settings,
        )

    def marks(self, option: str) -> dict[str, str]:
        """Return the names of the shards and how many samples each holds, as marks."""
        shards = [(Path(shard.path).name, shard.samples) for shard in self.shards]
        return {f"the shards of {option}": mark([self.samples, *shards])}

    def training(self, start_step: int) -> DataLoader:
        """Return a loader of this rank's micro-batches without end, from `start_step` on."""
        stream = self._stream(self.options.batch_size, self.options.num_workers, start_step=start_step)
        return make_stream_loader(stream, num_workers=self.options.num_workers, seed=self.options.seed)

    @property
    def validation_batches(self) -> int:
        """How many batches this rank has in one pass of validation."""
        return self._steps_of(self._validation_stream())

    def _steps_of(self, stream: ShardStream) -> int:
        limit = self.options.eval_iters
        return min(limit, stream.steps_per_epoch) if limit else stream.steps_per_epoch

    def _validation_stream(self) -> ShardStream:
        stream = self._stream(self.options.eval_batch_size, min(1, self.options.num_workers), shuffle=False)
        stream.steps = self._steps_of(stream)
        return stream

    def validation(self) -> DataLoader:
        """Return a loader of one pass, in the order of the shards: as many batches on every rank."""
        workers = min(1, self.options.num_workers)
        return make_stream_loader(self._validation_stream(), num_workers=workers, seed=self.options.seed)


def marks_of_sources(data: Source, valid: Source | None) -> dict[str, str]:
    """Return what all ranks have to have alike of training and validation data, see `agree`."""
    return {**data.marks("--train-data"), **({} if valid is None else valid.marks("--valid-data"))}


def _entry(item: Item) -> tuple:
    """Return what tells an item from others, wherever its file lies."""
    name = Path(item.image).name if isinstance(item.image, str | Path) else None
    more = [image.name if isinstance(image, Path) else None for image in item.more_images]
    turns: list[Any] = [item.history, item.system, more] if item.history or item.system or more else []
    turns += [item.unlearnt] if item.unlearnt else []
    own_name = item.name if item.file is None else item.name and item.name.replace(f"{item.file}", item.file.name, 1)
    return own_name or name, item.prompt, item.answer, *turns


def _digest(entries: Iterable[Sequence]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def open_sources(
    options: SourceSettings, world: World, make_dataset: Callable[[list], ImageTextDataset]
) -> tuple[Source, Source | None]:
    """Return the sources of (training, validation), the latter None without any, from their paths.

    Of files, validation may be a share of the training data, as --split says. Every rank has to call it.
    Raises DataError, on every rank, with all shards that cannot be read.
    """

    def source(paths: Sequence[str]) -> Source:
        left_out: Counter[str] = Counter()
        if is_shard(paths[0]):
            ranks = dict(data_parallel_rank=world.data_parallel_rank, data_parallel_size=world.data_parallel_size)
            shards = count_shards(paths, **ranks, left_out=left_out)
            return ShardSource(shards, make_dataset, options, world, left_out.most_common())
        counts = DataCounts()
        items = read_items(paths, **reading_options(options), counts=counts)
        return FileSource(items, make_dataset, options, world, counts.left_out(), counts.layouts)

    if is_shard(options.train_data[0]):
        return source(options.train_data), source(options.valid_data) if options.valid_data else None
    paths, weights = zip(*map(split_weight, options.train_data))
    counts = DataCounts()
    items = read_items(paths, **reading_options(options), counts=counts)
    if any(weight is not None for weight in weights):
        return _mixture(items, weights, counts, options, world, make_dataset, source)
    if options.valid_data:
        data = FileSource(items, make_dataset, options, world, counts.left_out(), counts.layouts)
        return data, source(options.valid_data)
    train, valid, test = split_items(items, options.split, options.seed)
    left_out = counts.left_out() + ([("for test, by --split", len(test))] if test else [])
    return (
        FileSource(train, make_dataset, options, world, left_out, counts.layouts),
        FileSource(valid, make_dataset, options, world) if valid else None,
    )


def _mixture(
    items: list[Item],
    weights: Sequence[float | None],
    counts: DataCounts,
    options: SourceSettings,
    world: World,
    make_dataset: Callable[[list], ImageTextDataset],
    source: Callable[[Sequence[str]], Source],
) -> tuple[Source, Source | None]:
    """Return the sources of (training, validation) of data paths with weights; --split divides each path's items."""
    split = (1.0,) if options.valid_data else options.split
    train: list[Item] = []
    valid: list[Item] = []
    parts = []
    test = 0
    for size, weight in zip(counts.by_path, weights, strict=True):
        own = items[:size]
        items = items[size:]
        of_train, of_valid, of_test = split_items(own, split, options.seed) if len(split) > 1 else (own, [], [])
        train += of_train
        valid += of_valid
        test += len(of_test)
        parts.append(Part(len(of_train), 1.0 if weight is None else weight))
    left_out = counts.left_out() + ([("for test, by --split", test)] if test else [])
    data = FileSource(train, make_dataset, options, world, left_out, counts.layouts, parts)
    if options.valid_data:
        return data, source(options.valid_data)
    return data, FileSource(valid, make_dataset, options, world) if valid else None


def marks_of_samples(option: str, samples: int, items: Sequence) -> dict[str, str]:
    """Return a mark of how many samples a source has, and which: names, texts and some sizes, not where they lie."""
    digest = hashlib.sha256()
    for item in items:
        image = getattr(item, "image", None)
        name = image.name if isinstance(image, Path) else None
        turns = tuple(getattr(item, name) for name in ("history", "system") if getattr(item, name, None))
        digest.update(
            repr((name, getattr(item, "prompt", None), getattr(item, "answer", None), *turns)).encode(
                "utf-8", "replace"
            )
        )
    digest.update(sizes_mark(items).encode())
    return {f"the samples of {option}": f"{samples} (digest {digest.hexdigest()[:12]})"}


def sizes_mark(items: Sequence) -> str:
    """Return a digest of how many bytes some images of the items have: it tells other pictures of the same names."""
    images = [getattr(item, "image", None) for item in items[:: max(1, len(items) // SIZES_TRIED)]]
    sizes = [_size(image) for image in images if isinstance(image, Path)]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
