from itertools import islice

import pytest
import torch

from sat_lora.data.batches.sampler import make_stream_loader
from sat_lora.data.batches.shard_stream import ShardStream
from sat_lora.data.samples import ImageTextDataset
from sat_lora.data.shards.shards import Shard
from sat_lora.errors import DataError
from tests.support.tar_shards import write_numbered_shards

SIZES = [7, 0, 1, 12, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def stream(folder, tokenizer):
    settings = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=32)
    dataset = ImageTextDataset([], tokenizer, **settings)

    def stream(sizes=SIZES, *, rank=0, ranks=1, workers=0, batch_size=3, seed=7, **more):
        paths = write_numbered_shards(folder / "-".join(map(str, sizes)), sizes)
        shards = [Shard(str(path), size) for path, size in zip(paths, sizes, strict=True)]
        return ShardStream(
            shards, dataset.make_sample, image_size=(21, 21), batch_size=batch_size, data_parallel_rank=rank,
            data_parallel_size=ranks, num_workers=workers, seed=seed, **more,
        )  # fmt: skip

    return stream


@pytest.fixture
def answers(tokenizer):
    def answers(batch) -> list[int]:
        rows = [tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in batch["labels"]]
        return [int(text) for text in rows if text.strip()]

    return answers


@pytest.mark.parametrize("sizes", [SIZES, [1], [4, 4], [9]], ids=str)
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_has_every_sample_once_in_as_many_batches_on_every_rank(stream, answers, sizes, ranks, workers):
    streams = [stream(sizes, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
    (steps,) = {one.steps_per_epoch for one in streams}
    readers = ranks * max(1, workers)
    assert steps <= max(1, workers) * -(-sum(sizes) // (3 * readers))
    for epoch in range(2):
        seen = []
        for one in streams:
            one.start_step = epoch * steps
            seen += [number for batch in islice(one, steps) for number in answers(batch)]
        assert sorted(seen) == list(range(sum(sizes)))


def test_a_reader_has_as_many_samples_as_the_next_but_one(stream):
    one = stream([50, 3, 1, 20], ranks=3, workers=2)
    counts = [len(list(one.records(0, reader))) for reader in range(6)]
    assert sum(counts) == 74 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_depends_on_seed_and_step_only(stream, answers, workers):
    def run(start, count, **more):
        one = stream(rank=1, ranks=2, workers=workers, start_step=start, **more)
        loader = make_stream_loader(one, num_workers=workers, seed=1)
        return list(islice(loader, count))

    whole = run(0, 9)
    for start in (1, 4, 7):  # in the first epoch, at its end and in the next
        for batch, expected in zip(run(start, 9 - start), whole[start:], strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(v, batch[k]) for k, v in expected.items() if isinstance(v, torch.Tensor))
    order = [number for batch in whole for number in answers(batch)]
    assert order != [number for batch in run(0, 9, seed=8) for number in answers(batch)]


def test_the_workers_of_a_loader_are_the_turns_of_the_stream(stream, answers):
    processes = make_stream_loader(stream(workers=2, start_step=1), num_workers=2, seed=1)
    assert [answers(batch) for batch in islice(processes, 9)] == [
        answers(batch) for batch in islice(stream(workers=2, start_step=1), 9)
    ]


def test_epochs_differ_and_one_without_shuffling_is_in_the_order_of_the_shards(stream, answers):
    def epoch(number, **more):
        one = stream([20, 20], start_step=number * 14, **more)
        return [number for batch in islice(one, one.steps_per_epoch) for number in answers(batch)]

    assert epoch(0) != epoch(1)
    assert epoch(0, shuffle=False) == epoch(1, shuffle=False) == list(range(40))
    window = epoch(0, shuffle_buffer=4)
    assert window != list(range(40)) and sorted(window) == list(range(40))


def test_a_pass_of_so_many_steps_starts_anew(stream, answers):
    for workers in (0, 1, 2):
        loader = make_stream_loader(stream(steps=5, shuffle=False, workers=workers), num_workers=workers, seed=1)
        first, again = ([answers(batch) for batch in loader] for _ in range(2))
        assert len(first) == 5 and first == again


def test_of_a_shard_that_vanishes_every_sample_is_reported_and_the_run_goes_on(stream, folder, answers):
    one = stream([6, 3], shuffle=False)
    (folder / "6-3" / "s-000.tar").unlink()
    batches = list(islice(one, 3))
    assert [path for batch in batches for path, _ in batch["broken"]] == [str(folder / "6-3" / "s-000.tar")] * 6
    assert [sample for batch in batches for sample in batch["broken_samples"]] == [*"012345"]
    assert sorted(number for batch in batches for number in answers(batch)) == [6, 7, 8]


def test_no_samples_at_all_are_refused(stream):
    with pytest.raises(DataError, match="no samples"):
        stream([0])


def test_skipping_reads_no_image(stream, monkeypatch):
    from sat_lora.data.shards.shards import Record

    read, calls = Record.read, []
    monkeypatch.setattr(Record, "read", lambda record, *limits: calls.append(record) or read(record, *limits))
    next(iter(stream([60], start_step=15)))
    assert len(calls) == 3
