"""Kind 15, attack 2: ranks that were not started alike get one error that names what differs, before anything hangs."""

import os
from dataclasses import replace

import pytest

from sat_lora.data.batches.sources import marks_of_samples
from sat_lora.data.samples import Item
from sat_lora.errors import ConfigError
from sat_lora.parallel.agreement import SHOWN, differences, disagreement, mark
from sat_lora.parallel.distributed import agree, init_distributed
from sat_lora.parallel.launch import find_place
from sat_lora.training.marks import (
    marks_of_config,
    marks_of_engine,
    marks_of_options,
    marks_of_tokenizer,
)
from tests.support.configs import parse_options
from tests.support.paths import TINY_BASE
from tests.support.ranks import run_ranks

ALIKE = ["--train-data", "images", "--lr", "1e-3"]


def marks(*options):
    return marks_of_options(parse_options([*ALIKE, *options], environ={}))


@pytest.mark.parametrize(
    "options, said",
    [
        (("--lr", "1e-2"), "--lr: 0.001 on rank 0, 0.01 on rank 1"),
        (("--r", "4"), "--r: 16 on rank 0, 4 on rank 1"),
        (("--lora_dropout", "0.1"), "--lora_dropout: 0.0 on rank 0, 0.1 on rank 1"),
        (("--target_modules", "vit-mlp"), '--target_modules: "all-linear" on rank 0, ["vit-mlp"] on rank 1'),
        (("--train-iters", "5"), "--train-iters: null on rank 0, 5 on rank 1"),
        (("--save-interval", "7"), "--save-interval: 200 on rank 0, 7 on rank 1"),
        (("--eval-interval", "0"), "--eval-interval: 200 on rank 0, 0 on rank 1"),
        (("--gradient-accumulation-steps", "2"), "--gradient-accumulation-steps: 1 on rank 0, 2 on rank 1"),
        (("--zero-stage", "3"), "--zero-stage: 0 on rank 0, 3 on rank 1"),
        (("--distributed-backend", "gloo"), '--distributed-backend: null on rank 0, "gloo" on rank 1'),
        (("--seed", "5"), "--seed: 1234 on rank 0, 5 on rank 1"),
        (("--save", "/scratch"), "--save: null on rank 0, \"/scratch\" on rank 1"),
        (("--valid-data", "more"), "which data of --valid-data"),
        (("--watchdog-limit", "0"), "--watchdog-limit: 120.0 on rank 0, 0.0 on rank 1"),
    ],
)  # fmt: skip
def test_every_option_is_named_with_its_values_and_ranks(options, said):
    first, own = marks(), marks(*options)
    assert said in str(disagreement(first, {1: differences(own, first)}))


@pytest.mark.parametrize(
    "options", [("--local_rank", "1"), ("--num-workers", "0"), ("--from_pretrained", "a"), ("--train-data", "/mnt/b")]
)
def test_what_belongs_to_a_machine_may_differ(options):
    base = ("--from_pretrained", "b") if options[0] == "--from_pretrained" else ()
    assert differences(marks(*base, *options), marks(*base)) == {}


def test_what_a_base_computes_with_beside_its_weights_is_compared():
    config = {"layernorm_epsilon": 1e-5, "num_layers": 2, "eva_args": {"layernorm_epsilon": 1e-6}}
    first = marks_of_config(config)
    for other, said in (
        ({**config, "layernorm_epsilon": 1e-3}, "- layernorm_epsilon in the config of --from_pretrained: 1e-05 on"),
        ({**config, "rotary_base": 500}, "- rotary_base in the config of --from_pretrained: 10000.0 on rank 0, 500.0"),
        ({**config, "eva_args": {}}, "- eva_args.layernorm_epsilon in the config of --from_pretrained: 1e-06"),
    ):
        assert said in str(disagreement(first, {1: differences(marks_of_config(other), first)}))
    same = {"model_parallel_size": 2, "rotary_base": 10000, "hidden_dropout": 0, "eva_args": config["eva_args"]}
    assert differences(marks_of_config(same), first) == {}  # as another tool writes it


def test_data_workers_may_not_differ_where_they_decide_who_reads_what():
    shards = ("--train-data", "shards-{0..3}.tar")
    assert "--num-workers" in differences(marks(*shards, "--num-workers", "0"), marks(*shards))


def test_samples_are_known_by_what_they_are_not_by_where_they_lie(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.png", "2.png"):
            (tmp_path / folder / name).write_bytes(b"same")
    here, there = ([Item(tmp_path / f / n, n[:1], "what?") for n in ("1.png", "2.png")] for f in ("a", "b"))
    expected = marks_of_samples("--train-data", 2, here)
    assert marks_of_samples("--train-data", 2, there) == expected
    (tmp_path / "b" / "2.png").write_bytes(b"another")
    for other in (there, here[::-1], here[:1], [here[0], replace(here[1], answer="no")]):
        assert marks_of_samples("--train-data", len(other), other) != expected


def test_texts_alone_and_images_in_memory_are_samples_too():
    items = [Item(None, "a", "q"), Item(b"png", "b")]
    assert marks_of_samples("--x", 2, items) != marks_of_samples("--x", 2, items[::-1])


def test_a_tokenizer_is_its_files(tmp_path):
    folder = TINY_BASE
    for file in folder.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert marks_of_tokenizer(tmp_path) == marks_of_tokenizer(folder) != {}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert marks_of_tokenizer(tmp_path) != marks_of_tokenizer(folder)
    assert marks_of_tokenizer("lmsys/vicuna-7b-v1.5") == {}


def test_a_section_of_a_deepspeed_file_on_a_local_disk_is_named():
    first = marks_of_engine({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0})
    own = marks_of_engine({"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_clipping": 1.0})
    assert list(differences(own, first)) == ['"zero_optimization" of --deepspeed_config']


def test_a_value_of_any_length_is_shown_short_and_told_apart():
    long = ["x" * 10_000, "y" * 10_000 + "\x1b"]
    assert mark(long[0]) != mark(long[0] + "z") and len(mark(long[1])) < SHOWN + 40 and mark(long[1]).isprintable()


def test_ranks_that_agree_with_each_other_are_listed_together():
    first = {"--lr": "1"}
    error = disagreement(first, {rank: {"--lr": "2"} for rank in range(1, 20)} | {20: {"--lr": "3"}})
    assert "--lr: 1 on rank 0, 2 on ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more, 3 on rank 20" in str(error)


def meet_and_differ(own, later):
    """What each of two ranks is told, before and after there is a process group."""
    told = []
    rank = int(os.environ["RANK"])
    try:
        init_distributed(marks=own[rank])
    except ConfigError as error:
        told.append(str(error))
        init_distributed()
    try:
        agree(later[rank])
    except ConfigError as error:
        told.append(str(error))
    return told, find_place().size


def test_both_ranks_are_told_the_same_and_nothing_hangs():
    own = [{"--lr": "1e-3", "--r": "8"}, {"--lr": "1e-2", "--r": "8"}]
    later = [{"the samples of --train-data": "96"}, {"the samples of --train-data": "90"}]
    (first, size), (second, _) = run_ranks(meet_and_differ, 2, own, later)
    assert first == second and size == 2 and len(first) == 2
    assert "- --lr: 1e-3 on rank 0, 1e-2 on rank 1" in first[0] and "--r:" not in first[0]
    assert "- the samples of --train-data: 96 on rank 0, 90 on rank 1" in first[1]
    assert run_ranks(meet_and_differ, 2, own[:1] * 2, later[:1] * 2) == [([], 2)] * 2
