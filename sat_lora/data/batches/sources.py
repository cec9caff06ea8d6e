"""Where a run's batches come from: files that are read at will, or tar shards that are streamed."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from sat_lora.data.batches.sampler import EpochSampler, eval_batches, make_loader, make_stream_loader
from sat_lora.data.batches.shard_stream import ShardStream
from sat_lora.data.samples import DataCounts, ImageTextDataset, Item, read_items, reading_options, split_items
from sat_lora.data.shards.shards import Shard, count_shards
from sat_lora.files.paths import is_shard
from sat_lora.parallel.agreement import mark
from sat_lora.parallel.distributed import World

SIZES_TRIED = 256  # samples whose files are asked for their size


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


class FileSource:
    """Batches of items.

    samples: how many there are. epoch_samples: as how many an epoch counts, for `total_steps`. make_dataset: the
    ImageTextDataset of a list of items. left_out: (reason, count) of what lies in the paths and is no sample.
    """

    def __init__(
        self,
        items: list,
        make_dataset: Callable[[list], ImageTextDataset],
        options: SourceSettings,
        world: World,
        left_out: Sequence[tuple[str, int]] = (),
    ):
        self.left_out = [*left_out]
        self.dataset, self.options, self.world = make_dataset(items), options, world
        self.samples = self.epoch_samples = len(items)

    def marks(self, option: str) -> dict[str, str]:
        """What all ranks have to have alike, see `agree`; option: the one that gave the paths."""
        return marks_of_samples(option, self.samples, self.dataset.items)

    def description(self) -> dict:
        """Tells these samples, in their order, from others, wherever they lie: their number and a digest of names,
        prompts and answers.
        """
        return {"samples": self.samples, "digest": _digest(map(_entry, self.dataset.items))}

    def files(self) -> str:
        """Tells the files of these samples from others of the same names: a digest of the sizes of some."""
        return sizes_mark(self.dataset.items)

    def training(self, start_step: int) -> DataLoader:
        """Micro-batches of this rank without end, from `start_step` on."""
        options = self.options
        sampler = EpochSampler(
            len(self.dataset),
            batch_size=options.batch_size,
            data_parallel_rank=self.world.data_parallel_rank,
            data_parallel_size=self.world.data_parallel_size,
            seed=options.seed,
            start_step=start_step,
        )
        return make_loader(self.dataset, sampler, num_workers=options.num_workers, seed=options.seed)

    @property
    def validation_batches(self) -> int:
        """Of this rank, in one pass."""
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
        """One pass, every sample on one rank, as many batches on every rank; at most --eval-iters of them."""
        options, batches = self.options, self._validation_indices()
        return make_loader(self.dataset, batches, num_workers=min(1, options.num_workers), seed=options.seed)


class ShardSource:
    """Batches of tar shards; what FileSource says holds here too. An epoch's places without a sample count as one."""

    def __init__(
        self,
        shards: list[Shard],
        make_dataset: Callable[[list], ImageTextDataset],
        options: SourceSettings,
        world: World,
        left_out: Sequence[tuple[str, int]] = (),
    ):
        self.left_out = [*left_out]
        self.shards, self.dataset, self.options, self.world = shards, make_dataset([]), options, world
        self.samples = sum(shard.samples for shard in shards)
        steps = self._stream(options.batch_size, options.num_workers).steps_per_epoch
        self.epoch_samples = steps * options.batch_size * world.data_parallel_size

    def description(self) -> dict:
        """As that of a FileSource, by the names of the shards and how many samples each holds."""
        return {"samples": self.samples, "digest": _digest((Path(one.path).name, one.samples) for one in self.shards)}

    def files(self) -> str:
        """As that of a FileSource, of the shards themselves."""
        return sizes_mark([Item(Path(shard.path), "") for shard in self.shards])

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
            ignore_keys=reading_options(self.options)["ignore_keys"],
            max_pixels=self.dataset.max_pixels,
            **settings,
        )

    def marks(self, option: str) -> dict[str, str]:
        """As those of a FileSource: the names of the shards and how many samples each holds."""
        shards = [(Path(shard.path).name, shard.samples) for shard in self.shards]
        return {f"the shards of {option}": mark([self.samples, *shards])}

    def training(self, start_step: int) -> DataLoader:
        stream = self._stream(self.options.batch_size, self.options.num_workers, start_step=start_step)
        return make_stream_loader(stream, num_workers=self.options.num_workers, seed=self.options.seed)

    @property
    def validation_batches(self) -> int:
        return self._steps_of(self._validation_stream())

    def _steps_of(self, stream: ShardStream) -> int:
        limit = self.options.eval_iters
        return min(limit, stream.steps_per_epoch) if limit else stream.steps_per_epoch

    def _validation_stream(self) -> ShardStream:
        stream = self._stream(self.options.eval_batch_size, min(1, self.options.num_workers), shuffle=False)
        stream.steps = self._steps_of(stream)
        return stream

    def validation(self) -> DataLoader:
        workers = min(1, self.options.num_workers)
        return make_stream_loader(self._validation_stream(), num_workers=workers, seed=self.options.seed)


def marks_of_sources(data: FileSource | ShardSource, valid: FileSource | ShardSource | None) -> dict[str, str]:
    """What all ranks have to have alike of training and validation data, see `agree`."""
    return {**data.marks("--train-data"), **({} if valid is None else valid.marks("--valid-data"))}


def _entry(item: Item) -> tuple:
    """What tells an item from others, wherever its file lies."""
    name = Path(item.image).name if isinstance(item.image, str | Path) else None
    return item.name or name, item.prompt, item.answer


def _digest(entries: Iterable[Sequence]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def open_sources(
    options: SourceSettings, world: World, make_dataset: Callable[[list], ImageTextDataset]
) -> tuple[FileSource | ShardSource, FileSource | ShardSource | None]:
    """(training, validation or None) from their paths; of files, a share of the training data where --split says so.

    Every rank has to call it. DataError on every rank: shards that cannot be read, all of them.
    """

    def source(paths: Sequence[str]) -> FileSource | ShardSource:
        left_out: Counter[str] = Counter()
        if is_shard(paths[0]):
            ranks = dict(data_parallel_rank=world.data_parallel_rank, data_parallel_size=world.data_parallel_size)
            shards = count_shards(paths, **ranks, left_out=left_out)
            return ShardSource(shards, make_dataset, options, world, left_out.most_common())
        counts = DataCounts()
        items = read_items(paths, **reading_options(options), counts=counts)
        return FileSource(items, make_dataset, options, world, counts.left_out())

    if options.valid_data or is_shard(options.train_data[0]):
        return source(options.train_data), source(options.valid_data) if options.valid_data else None
    counts = DataCounts()
    items = read_items(options.train_data, **reading_options(options), counts=counts)
    train, valid, test = split_items(items, options.split, options.seed)
    left_out = counts.left_out() + ([("for test, by --split", len(test))] if test else [])
    return (
        FileSource(train, make_dataset, options, world, left_out),
        FileSource(valid, make_dataset, options, world) if valid else None,
    )


def marks_of_samples(option: str, samples: int, items: Sequence) -> dict[str, str]:
    """How many samples a source has, and which: names, texts and the sizes of some files, not where they lie."""
    digest = hashlib.sha256()
    for item in items:
        image = getattr(item, "image", None)
        name = image.name if isinstance(image, Path) else None
        digest.update(repr((name, getattr(item, "prompt", None), getattr(item, "answer", None))).encode())
    digest.update(sizes_mark(items).encode())
    return {f"the samples of {option}": f"{samples} (digest {digest.hexdigest()[:12]})"}


def sizes_mark(items: Sequence) -> str:
    """A digest of how many bytes some images of the items have: other pictures under the same names are told by it."""
    images = [getattr(item, "image", None) for item in items[:: max(1, len(items) // SIZES_TRIED)]]
    sizes = [_size(image) for image in images if isinstance(image, Path)]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
