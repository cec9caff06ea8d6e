"""Which samples of tar shards a rank takes at which step: a pure function of seed and step, read as a stream."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy
from torch.utils.data import IterableDataset, get_worker_info

from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS
from sat_lora.cogvlm.inputs.text import Sample
from sat_lora.data.records.record import PLAIN, RecordOptions
from sat_lora.data.samples import BrokenSample, Item, collate
from sat_lora.data.shards.shards import Record, Shard, find_records
from sat_lora.errors import DataError
from sat_lora.printable import printable

SHUFFLE_BUFFER = 1000  # samples; the buffer holds their places in the shards, not their images


class ShardStream(IterableDataset):
    """Yields this rank's collated batches, without end or for `steps` of them, from `start_step` on.

    In every epoch the shards are laid end to end, in an order drawn from (seed, epoch), and cut into as many equal
    stretches as there are readers: data_parallel_size * workers. So every sample comes once in an epoch, a shard is
    read by one reader (by two where a cut goes through it, by more where there are fewer shards than readers), and
    each reader has as many samples as the next, but one. A reader goes through its stretch with a shuffle buffer.

    Batch k of an epoch is batch k // workers of this rank's reader k % workers. Every reader gives
    ceil(largest stretch / batch_size) batches; one that runs out gives batches without a label. In the place of every
    sample of a shard that can no longer be read stands a broken one, and the reader goes on with its next.
    A step is one forward pass: with gradient accumulation, start_step counts micro-batches.
    make_sample: decodes an Item. num_workers: the DataLoader's; 0 reads as 1 does. max_pixels, records: see
    `Record.read`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        make_sample: Callable[[Item], Sample | BrokenSample],
        *,
        image_size: tuple[int, int],
        batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int,
        seed: int,
        start_step: int = 0,
        steps: int | None = None,
        shuffle: bool = True,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        max_pixels: int = MAX_PIXELS,
        records: RecordOptions = PLAIN,
    ):
        self.shards = list(shards)
        self.make_sample = make_sample
        self.image_size = image_size
        self.batch_size = batch_size
        self.rank = data_parallel_rank
        self.workers = max(1, num_workers)
        self.readers = data_parallel_size * self.workers
        self.seed = seed
        self.start_step = start_step
        self.steps = steps
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.max_pixels = max_pixels
        self.record_options = records
        self.total = sum(shard.samples for shard in self.shards)
        if self.total < 1:
            raise DataError("there are no samples to train on")

    @property
    def batches_per_reader(self) -> int:
        """Batches of each reader in an epoch."""
        return -(-self.total // (self.readers * self.batch_size))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in an epoch, the same on every rank."""
        return self.workers * self.batches_per_reader

    def __iter__(self) -> Iterator[dict]:
        # A DataLoader takes turns among its workers and begins with the first, whatever start_step is.
        info = get_worker_info()
        if info is None:
            streams = [self._batches(self.start_step + turn) for turn in range(self.workers)]
            batches = (next(stream) for stream in itertools.cycle(streams))
            return batches if self.steps is None else itertools.islice(batches, self.steps)
        own_batches = self._batches(self.start_step + info.id)
        if self.steps is None:
            return own_batches
        return itertools.islice(own_batches, len(range(info.id, self.steps, self.workers)))

    def _batches(self, step: int) -> Iterator[dict]:
        """Yield the batches of the reader whose turn `step` is, from there on."""
        first_epoch, place = divmod(step, self.steps_per_epoch)
        skipped, reader = divmod(place, self.workers)
        for epoch in itertools.count(first_epoch):
            records = self.records(epoch, self.rank * self.workers + reader)
            records = itertools.islice(records, skipped * self.batch_size, None)
            for _ in range(skipped, self.batches_per_reader):
                samples = [self._sample(record) for record in itertools.islice(records, self.batch_size)]
                yield collate(samples, image_size=self.image_size)
            skipped = 0

    def _sample(self, record: Record | BrokenSample) -> Sample | BrokenSample:
        item = record.read(self.max_pixels, self.record_options) if isinstance(record, Record) else record
        return self.make_sample(item) if isinstance(item, Item) else item

    def records(self, epoch: int, reader: int) -> Iterator[Record | BrokenSample]:
        """Yield what one of all readers goes through in an epoch; no image is read."""
        records = self._stretch(epoch, reader)
        if self.shuffle:
            return _shuffled(records, self.shuffle_buffer, numpy.random.default_rng([self.seed, epoch, reader]))
        return records

    def _stretch(self, epoch: int, reader: int) -> Iterator[Record | BrokenSample]:
        begin, end = (self.total * cut // self.readers for cut in (reader, reader + 1))
        order = range(len(self.shards))
        if self.shuffle:
            order = numpy.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        start = 0
        for shard in (self.shards[number] for number in order):
            first = max(0, begin - start)
            last = min(shard.samples, end - start)
            start += shard.samples
            if first < last:
                count = first
                reason = f"{printable(shard.path)}: has fewer samples than when the run began"
                try:
                    for record in itertools.islice(find_records(shard.path), first, last):
                        count += 1
                        yield record
                except DataError as error:
                    reason = str(error)
                for number in range(count, last):
                    yield BrokenSample(shard.path, reason, str(number))


def _shuffled(records: Iterator, size: int, generator: numpy.random.Generator) -> Iterator:
    """Yield all of `records`, each drawn from the `size` that come next."""
    buffer = list(itertools.islice(records, size))
    while buffer:
        place = int(generator.integers(len(buffer)))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()
        buffer.extend(itertools.islice(records, 1))
