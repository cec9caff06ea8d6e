from itertools import islice

import pytest
import torch

from sat_lora.data.batches.sampler import EpochSampler, eval_batches, make_loader
from sat_lora.data.samples import ImageTextDataset, read_items
from sat_lora.errors import DataError


def sampler(num_samples=10, *, batch_size=3, rank=0, size=1, seed=7, **settings):
    return EpochSampler(
        num_samples, batch_size=batch_size, data_parallel_rank=rank, data_parallel_size=size, seed=seed, **settings
    )


def test_an_epoch_has_every_sample_once_and_runs_into_the_next():
    stream = [index for batch in islice(sampler(), 10) for index in batch]  # 30 = 3 epochs of 10
    for epoch in (stream[:10], stream[10:20], stream[20:]):
        assert sorted(epoch) == list(range(10))
    assert stream[:10] != stream[10:20]


def test_a_step_has_the_same_samples_however_many_ranks_share_it():
    alone = list(islice(sampler(batch_size=12), 8))
    for size in (2, 3, 4):
        ranks = [islice(sampler(batch_size=12 // size, rank=rank, size=size), 8) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


def test_a_step_depends_on_seed_and_step_only():
    later = sampler(start_step=5)
    whole = list(islice(sampler(), 9))
    assert list(islice(later, 4)) == whole[5:]
    assert sampler().batch(8) == whole[8]
    assert list(islice(sampler(seed=8), 9)) != whole


def test_iterating_twice_starts_over():
    batches = sampler()
    assert list(islice(batches, 3)) == list(islice(batches, 3))


def test_accumulation_sees_the_samples_of_one_larger_batch():
    large = sampler(batch_size=6).batch(2)
    assert sampler().batch(4) + sampler().batch(5) == large


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(sampler(2, batch_size=6).batch(0)) == [0, 0, 0, 1, 1, 1]


def test_without_shuffling_the_order_is_the_datas():
    assert sampler(4, shuffle=False).batch(1) == [3, 0, 1]


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="there are no samples to train on"):
        sampler(0)


@pytest.mark.parametrize("samples", [0, 1, 7, 8, 23])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_sees_every_sample_once_in_as_many_batches_on_every_rank(samples, size):
    ranks = [eval_batches(samples, batch_size=4, data_parallel_rank=r, data_parallel_size=size) for r in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(samples))


def test_a_limited_evaluation_spreads_over_the_data():
    batches = eval_batches(100, batch_size=2, data_parallel_rank=0, data_parallel_size=1, limit=2)
    assert batches == [[0, 25], [50, 75]]


@pytest.fixture
def dataset(tokenizer, image_folder):
    settings = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=32)
    return ImageTextDataset(read_items([image_folder]), tokenizer, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_yields_batches_and_leaves_torchs_generator_alone(dataset, num_workers):
    state = torch.get_rng_state()
    batches = list(islice(make_loader(dataset, sampler(6), num_workers=num_workers, seed=1), 3))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [dataset[index].input_ids for index in sampler(6).batch(2)]
    assert torch.equal(batches[2]["input_ids"], torch.stack(expected))


def test_a_padding_batch_of_evaluation_loads_as_a_neutral_one(dataset):
    batches = eval_batches(6, batch_size=4, data_parallel_rank=2, data_parallel_size=3)
    (batch,) = make_loader(dataset, batches, num_workers=0, seed=1)
    assert (batch["labels"] == -100).all()
    assert batch["images"].shape == (0, 3, 21, 21)
