"""Which samples a rank takes at which step: a pure function of seed and step, so that a run can stop and go on."""

import atexit
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from functools import partial

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from sat_lora.data.samples import ImageTextDataset, collate
from sat_lora.errors import DataError
from sat_lora.parallel.stop_signals import serve_until


class EpochSampler(Sampler):
    """Yields this rank's index batches, without end, from `start_step` on.

    One stream of samples is laid out for all ranks: permutation after permutation of the data, each drawn from (seed,
    epoch). Step s takes the next batch_size * data_parallel_size of it and rank k the k-th slice of those. So the
    samples of a step are the same however many ranks share them, every rank has as many steps, and no sample is left
    out: a step at the end of an epoch reaches into the next.
    A step is one forward pass: with gradient accumulation, start_step counts micro-batches.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        start_step: int = 0,
        shuffle: bool = True,
    ):
        if num_samples < 1:
            raise DataError("there are no samples to train on")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = data_parallel_rank
        self.size = data_parallel_size
        self.seed = seed
        self.start_step = start_step
        self.shuffle = shuffle
        self._epoch: int | None = None
        self._order: Sequence[int] = ()

    def batch(self, step: int) -> list[int]:
        """Return the indices of this rank at `step`."""
        first = (step * self.size + self.rank) * self.batch_size
        return [self._sample_at(place) for place in range(first, first + self.batch_size)]

    def _sample_at(self, place: int) -> int:
        epoch, index = divmod(place, self.num_samples)
        if not self.shuffle:
            return index
        if epoch != self._epoch:
            generator = numpy.random.default_rng([self.seed, epoch])
            self._epoch = epoch
            self._order = generator.permutation(self.num_samples)
        return int(self._order[index])

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1


def eval_batches(
    num_samples: int, *, batch_size: int, data_parallel_rank: int, data_parallel_size: int, limit: int = 0
) -> list[list[int]]:
    """Return this rank's index batches for one pass: every sample on exactly one rank, as many batches on every rank.

    An empty batch is padding, for which `collate` makes a batch without labels. limit: at most that many batches per
    rank, of samples spread evenly over the data; 0 is all.
    """
    capacity = limit * batch_size * data_parallel_size
    count = min(num_samples, capacity) if limit else num_samples
    indices = [number * num_samples // count for number in range(count)]
    batches = [indices[first : first + batch_size] for first in range(0, count, batch_size)]
    batches += [[]] * (-len(batches) % data_parallel_size)
    return batches[data_parallel_rank::data_parallel_size]


def make_loader(
    dataset: ImageTextDataset, batches: EpochSampler | Sequence[list[int]], *, num_workers: int, seed: int
) -> DataLoader:
    """Return a loader of collated batches, in the order of `batches`.

    It draws nothing from torch's global generator.
    """
    fetching = dict(batch_sampler=batches, collate_fn=partial(collate, image_size=dataset.image_size))
    return _loader(dataset, num_workers, seed, **fetching)


def make_stream_loader(stream: IterableDataset, *, num_workers: int, seed: int) -> DataLoader:
    """Return a loader of the batches that `stream` gives, already collated, one from each worker in turn."""
    return _loader(stream, num_workers, seed, batch_size=None, collate_fn=_as_it_is)


def _loader(dataset: Dataset, num_workers: int, seed: int, **fetching) -> DataLoader:
    ending = multiprocessing.Event()
    atexit.register(ending.set)
    return DataLoader(
        dataset,
        **fetching,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=partial(_start_worker, ending),
        # Without a generator of its own, each iterator takes a number from the global one and a resumed run,
        # which starts one iterator more, would drop out (LoRA dropout) differently from an uninterrupted one.
        generator=torch.Generator().manual_seed(seed),
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(batch: dict) -> dict:
    return batch


def _start_worker(ending, number: int) -> None:
    # A worker is a fork; tokenizers warns about its threads unless it is told that none are wanted.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    serve_until(ending)
