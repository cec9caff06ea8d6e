"""Data sets by weights: shares, order and resuming."""

from collections import Counter
from itertools import islice

import pytest
import torch

from sat_lora.data.batches.mixtures import BLOCK, MixtureSampler, Part, quotas
from sat_lora.data.batches.sources import SourceSettings, open_sources
from sat_lora.errors import DataError
from sat_lora.files.paths import split_weight
from sat_lora.parallel.distributed import World
from sat_lora.training.early import data_problems
from sat_lora.training.preflight import option_problems
from tests.support.configs import parse_options
from tests.support.datasets import dataset
from tests.support.picture_files import write_images

PARTS = (Part(5, 0.7), Part(300, 0.3))


def sampler(parts=PARTS, *, batch_size=4, rank=0, size=1, seed=7, **settings):
    return MixtureSampler(
        parts, batch_size=batch_size, data_parallel_rank=rank, data_parallel_size=size, seed=seed, **settings
    )


@pytest.mark.parametrize(
    "weights, counts",
    [
        ([0.7, 0.3], [700, 300]),
        ([7, 3], [700, 300]),
        ([1, 1, 1], [334, 333, 333]),
        ([1, 1e-9], [999, 1]),
        ([0.1234, 0.8766], [123, 877]),
        ([1], [1000]),
    ],
)
def test_a_block_is_shared_by_weight(weights, counts):
    assert quotas(weights) == counts


def test_each_block_has_its_share_and_a_part_comes_whole_before_it_comes_again():
    stream = [index for batch in islice(sampler(), 2 * BLOCK // 4) for index in batch]
    for block in (stream[:BLOCK], stream[BLOCK:]):
        assert sum(index < 5 for index in block) == 700
    small = [index for index in stream if index < 5]
    large = [index for index in stream if index >= 5]
    assert all(sorted(small[first : first + 5]) == [0, 1, 2, 3, 4] for first in range(0, 1400, 5))
    assert sorted(large[:300]) == sorted(large[300:]) == list(range(5, 305)) and large[:300] != large[300:]
    assert len({tuple(small[first : first + 5]) for first in range(0, 1400, 5)}) > 50


def test_a_step_is_a_function_of_seed_and_step_alone():
    whole = list(islice(sampler(), 600))
    assert list(islice(sampler(start_step=249), 351)) == whole[249:]
    jumping = sampler()
    assert [jumping.batch(step) for step in (599, 3, 251, 250)] == [whole[step] for step in (599, 3, 251, 250)]
    assert list(islice(sampler(seed=8), 600)) != whole


def test_ranks_share_the_stream():
    alone = list(islice(sampler(batch_size=8), 200))
    ranks = [islice(sampler(batch_size=4, rank=rank, size=2), 200) for rank in range(2)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


def test_a_part_without_samples_is_refused():
    with pytest.raises(DataError, match="a part of the mixture has no samples"):
        sampler([Part(3, 1), Part(0, 1)])


def test_a_weight_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_weight("a:0.7") == ("a", 0.7) and split_weight("a/b.jsonl:2") == ("a/b.jsonl", 2.0)
    assert split_weight("a") == ("a", None) and split_weight("C:\\x") == ("C:\\x", None)
    assert split_weight("a:b") == ("a:b", None) and split_weight(":3") == (":3", None)
    (tmp_path / "a:0.7").touch()
    assert split_weight("a:0.7") == ("a:0.7", None)


def sources(tokenizer, paths, split=(1.0,)):
    numbers = dict(seed=3, batch_size=4, eval_batch_size=4, eval_iters=0, num_workers=0, max_pixels=10**6)
    options = SourceSettings(train_data=paths, valid_data=None, split=split, **numbers)
    return open_sources(options, World(0, 1, torch.device("cpu"), 0, 1), lambda items: dataset(items, tokenizer))


def test_a_run_draws_by_weight_and_another_weight_is_other_data(tmp_path, tokenizer):
    few = str(write_images(tmp_path / "few", ["1.png", "2.png"]))
    many = str(write_images(tmp_path / "many", [f"{number}.png" for number in range(3, 23)]))
    data, _ = sources(tokenizer, [f"{few}:0.8", f"{many}:0.2"])
    drawn = Counter(index < 2 for batch in islice(data.training(0).batch_sampler, 250) for index in batch)
    assert drawn[True] == 800 and data.samples == 22
    assert data.description() != sources(tokenizer, [f"{few}:0.7", f"{many}:0.3"])[0].description()
    train, valid = sources(tokenizer, [f"{few}:0.8", f"{many}:0.2"], split=(0.5, 0.5))
    assert (train.samples, valid.samples) == (11, 11) and [part.samples for part in train.parts] == [1, 10]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--train-data", "a:0.5", "b"], "a:0.5 has a weight and b has none; give each path one, or none"),
        (["--train-data", "a:0", "b:1"], "a: a weight of 0; leave the path out"),
        (["--train-data", "s.tar:0.5", "t.tar:1"], "tar shards are streamed"),
        (["--train-data", "a", "--valid-data", "b:0.5"], "--valid-data: b:0.5: a weight is for --train-data"),
        (["--train-data", "a:-1", "b:1"], "a:-1 does not exist; a does: a weight is a number above 0, as in a:0.7"),
        (["--train-data", "a:nan", "b:1"], "got 'nan'"),
        (["--train-data", "a:1e3", "b:1"], "got '1e3'"),
        (["--train-data", "a:70%", "b:30%"], "got '70%'"),
        (["--train-data", "a:", "b:1"], "got ''"),
        (["--train-data", "a=0.5", "b=0.5"], "as in a:0.7, got '0.5'"),
        (["--train-data", "a:0.7,b:0.3"], "several paths have spaces between them, not commas"),
        (["--train-data", f"a:{'9' * 400}", "b:1"], "a: its weight is too large to be a number"),
        (["--train-data", "a:0.0001", "b:1"], "a: its weight is 0.0001 of all weights, and 0.001 is the least"),
    ],
)
def test_weights_that_cannot_be_meant_are_named(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "a", ["1.png"])
    write_images(tmp_path / "b", ["1.png"])
    config = parse_options(argv, environ={})
    for problems in (option_problems(config, {}, "cpu")[1], [*data_problems(config)]):
        assert any(words in problem for problem in problems), problems
