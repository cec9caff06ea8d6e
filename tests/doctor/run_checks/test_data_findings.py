"""Faults in data and schedule, planted: labels, token ids, image sizes, samples that come twice, rates."""

import contextlib
import io

import pytest
import torch

from sat_lora.cogvlm.inputs.image import load_image
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.data import samples as data
from sat_lora.data.batches import sources
from sat_lora.data.batches.sampler import EpochSampler, make_loader
from sat_lora.data.samples import ImageTextDataset, Item, collate
from sat_lora.doctor.diagnose import diagnose
from sat_lora.doctor.run_checks.data import data_findings, drawing_findings, drawn_samples
from sat_lora.doctor.run_checks.optimization import schedule_findings
from sat_lora.findings.codes import CODES
from sat_lora.findings.finding import looked_for
from sat_lora.training import prepare
from sat_lora.training.settings import schedule
from tests.support.configs import config_of, parse_options
from tests.support.demo_runs import options_for
from tests.support.ranks import run_ranks

SIZE = (21, 21)
BASE = dict(image_length=9, max_length=40, max_broken_share=0.05, vocab_size=128, image_size=SIZE)


@pytest.fixture
def dataset(image_folder, tokenizer):
    items = [Item(image_folder / f"{number:03}.png", f"{number:03}") for number in range(6)]
    items += [Item(None, f"{number}", f"{number} + 0 =") for number in range(2)]
    settings = dict(version="base", prompt="Q:", image_size=SIZE, image_length=9, max_length=40)
    return ImageTextDataset(items, tokenizer, **settings)


def batch_of(dataset, *numbers):
    return collate([dataset[number] for number in numbers], image_size=SIZE)


def shifted(batch):
    batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full((len(batch["labels"]), 1), IGNORED)], 1)


def shifted_backwards(batch):
    batch["labels"] = batch["labels"].roll(1, 1)


def of_another_row(batch):
    batch["labels"] = batch["labels"].flip(0)


def on_padding(batch):
    batch["labels"][-1, -1] = 0


def on_an_image(batch):
    batch["labels"][0, 3] = batch["input_ids"][0, 3]


def of_random_tokens(batch):
    learned = batch["labels"] != IGNORED
    batch["labels"][learned] = (batch["labels"][learned] * 7 + 3) % 128


def test_the_ends_of_earlier_answers_are_no_wrong_labels(tokenizer):
    turns = dict(version="chat", prompt="Q:", image_size=SIZE, image_length=9, max_length=80)
    items = [Item(None, "c", "q", history=(("a", "b"), ("d", ""))), Item(None, "x" * 90, "q", history=(("a", "b"),))]
    batch = batch_of(ImageTextDataset(items, tokenizer, **turns), 0, 1)
    assert not [finding for finding in data_findings([batch], **BASE) if finding.code == "wrong-labels"]
    place = int((batch["labels"][0] != IGNORED).nonzero()[0])
    batch["labels"][0, place] += 1
    (finding,) = [finding for finding in data_findings([batch], **BASE) if finding.code == "wrong-labels"]
    assert finding.seen == "1 of 2 samples looked at have labels that are not the tokens at their places"


@pytest.mark.parametrize(
    "fault, words",
    [
        (shifted, "2 of 2 samples looked at have labels shifted already by one; the loss shifts them again"),
        (shifted_backwards, "shifted by one backwards"),
        (of_another_row, "2 of 2 samples looked at have labels of another row of their batch"),
        (on_padding, "1 of 2 samples looked at have labels on padding"),
        (on_an_image, "1 of 2 samples looked at have labels on the places of an image"),
        (of_random_tokens, "that are not the tokens at their places"),
    ],
)
def test_labels_that_are_not_the_next_tokens_are_found(fault, words, dataset):
    numbers = (0, 6) if fault is on_padding else (1, 2)
    batch = batch_of(dataset, *numbers)
    assert data_findings([batch], **BASE) == []
    fault(batch)
    found = [one for one in data_findings([batch], **BASE) if one.code == "wrong-labels"]
    assert len(found) == 1 and words in found[0].seen, found


def test_token_ids_outside_of_the_vocabulary_are_found(dataset):
    batch = batch_of(dataset, 0, 6)
    batch["input_ids"][1, 2] = batch["labels"][1, 2] = 128
    batch["input_ids"][0, 1] = -1
    finding = next(one for one in data_findings([batch], **BASE) if one.code == "token-ids")
    assert finding.seen == "token ids -1, 128 are in the samples, the base's vocabulary is from 0 to 127"
    assert finding.option == "--local_tokenizer"


@pytest.mark.parametrize("label", [128, 5000, -1, -101])
def test_labels_outside_of_the_vocabulary_are_ids_too(label, dataset):
    """The loss would end the examination with an IndexError; -1, which other code ignores, is one of them."""
    batch = batch_of(dataset, 0, 6)
    batch["labels"][0, -1] = label
    finding = next(one for one in data_findings([batch], **BASE) if one.code == "token-ids")
    assert finding.seen.startswith(f"token ids {label} are in the samples, ")


def test_images_of_another_size_are_found(dataset):
    batch = batch_of(dataset, 0, 1)
    batch["images"] = torch.zeros(2, 3, 14, 21)
    (finding,) = data_findings([batch], **BASE)
    assert (finding.code, finding.seen) == ("image-size", "images come as 14 x 21 pixels, the base takes 21 x 21")
    batch["images"] = torch.zeros(2, 4, 21, 21)  # with transparency
    (finding,) = data_findings([batch], **BASE)
    assert finding.seen == "images come as 21 x 21 pixels in 4 channels, the base takes 21 x 21"


def test_an_image_too_few_is_found(dataset):
    batch = batch_of(dataset, 0, 1)
    batch["images"] = batch["images"][:1]
    assert [one.code for one in data_findings([batch], **BASE)] == ["image-tokens"]


def drawn_by(dataset, samplers, steps):
    drawn = []
    for rank, sampler in enumerate(samplers):
        loader = make_loader(dataset, sampler, num_workers=0, seed=0)
        batches = [batch for batch, _ in zip(loader, range(steps))]
        drawn.append(drawn_samples(loader, batches, steps, rank=rank, data_parallel_rank=rank))
    return drawn


def samplers(ranks, size=None, dataset_size=8):
    return [
        EpochSampler(dataset_size, batch_size=2, data_parallel_rank=rank, data_parallel_size=size or len(ranks), seed=3)
        for rank in ranks
    ]


def test_a_healthy_sampler_gives_no_finding(dataset):
    assert drawing_findings(drawn_by(dataset, samplers([0, 1]), 2)) == []


def test_a_rank_that_repeats_its_samples_is_found(dataset):
    first, second = samplers([0, 1])
    second.batch = lambda step: EpochSampler.batch(second, 0)
    (finding,) = drawing_findings(drawn_by(dataset, [first, second], 2))
    assert (finding.code, finding.ranks) == ("repeated-samples", (1,))
    assert finding.seen == "2 of the 4 indices of the sampler that this rank reads in its first epoch came before"


def test_a_data_set_that_repeats_its_samples_is_found(dataset, monkeypatch):
    """The sampler is well, and whatever it asks for the same two come."""
    monkeypatch.setattr(dataset, "items", [dataset.items[number % 2] for number in range(8)])
    (finding,) = drawing_findings(drawn_by(dataset, samplers([0]), 4))
    assert (finding.code, finding.ranks) == ("repeated-samples", (0,)) and "6 of the 8 samples by text" in finding.seen


def test_ranks_that_share_their_samples_are_found(dataset):
    """As with a sampler that does not know its rank."""
    (finding,) = drawing_findings(drawn_by(dataset, samplers([0, 0, 2], size=3), 1))
    assert (finding.code, finding.ranks) == ("shared-samples", (0, 1))
    assert finding.seen == "4 of 4 indices of the sampler of the first epoch are read by another rank too"


def test_the_ranks_of_one_model_parallel_group_may_share(dataset):
    drawn = drawn_by(dataset, samplers([0, 0], size=1), 2)
    same = [drawn_samples(make_loader(dataset, one, num_workers=0, seed=0), [], 2, rank=rank, data_parallel_rank=0)
            for rank, one in enumerate(samplers([0, 0], size=1))]  # fmt: skip
    assert drawing_findings(same) == [] and len(drawn) == 2


def schedule_of(steps, **changes):
    config = config_of(**{"lr": 1e-3, **changes})
    return [one.seen for one in schedule_findings(config.schedule, config.optimizer.lr, steps)]


def test_a_rate_that_never_leaves_its_warm_up_is_found():
    (seen,) = schedule_of(20, warmup=30.0)
    assert seen.startswith("--warmup 30: all 20 steps are warm-up, the rate only rises and comes to 0.001 with the las")
    assert schedule_of(31, warmup=30.0) == schedule_of(1) == schedule_of(100_000) == []


def test_a_rate_that_falls_to_nothing_is_found(monkeypatch):
    monkeypatch.setitem(schedule.DECAY_STYLES, "cosine", lambda progress: float(progress < 0.5))
    (seen,) = schedule_of(1000)
    assert seen.startswith("--lr 0.001: in 50% of the 1000 steps the rate is nothing beside it, at the end 0")


def all_at_once(arguments, fault):
    """(codes of a diagnosis, how many codes were looked for, stderr); each with a fault in the run's own data."""
    fault()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        codes = [(one.code, one.seen) for one in diagnose(parse_options(["--doctor", *arguments]))]
    return codes, sorted(looked_for()), said.getvalue()


def no_fault():
    pass


def images_of_two_sizes():
    sizes = iter([(42, 42), (21, 42)] * 500)
    data.load_image = lambda source, size, *more, **limits: load_image(source, next(sizes), *more, **limits)


def vocabulary_too_small():
    load = prepare.load_base

    def loaded(*args, **kwargs):
        model, config = load(*args, **kwargs)
        return model, {**config, "vocab_size": 40}

    prepare.load_base = loaded


def one_rank_for_all():
    made = sources.EpochSampler
    sources.EpochSampler = lambda *args, **settings: made(*args, **{**settings, "data_parallel_rank": 0})


def test_a_loader_that_raises_is_a_finding(captchas, tmp_path):
    """Images of two sizes cannot be stacked: a code of its own, loader-failed, and no traceback."""
    ((codes, _, said),) = run_ranks(all_at_once, 1, options_for(captchas, tmp_path), images_of_two_sizes)
    ((code, seen),) = codes
    assert code == "loader-failed" and "after 0 batches: RuntimeError: stack expects each tensor" in seen
    assert "doctor: 4 of 7, the data" in said and "doctor: 5" not in said


def test_ids_that_the_model_would_fail_on_end_the_examination(captchas, tmp_path):
    ((codes, _, _),) = run_ranks(all_at_once, 1, options_for(captchas, tmp_path), vocabulary_too_small)
    assert [code for code, _ in codes] == ["token-ids"]


def test_two_real_ranks_that_read_the_same_are_found(captchas, tmp_path):
    told = run_ranks(all_at_once, 2, options_for(captchas, tmp_path), one_rank_for_all)
    for codes, _, _ in told:
        assert [code for code, _ in codes] == ["shared-samples"]
    # Rank 0, which counts, has looked for all but what a DeepSpeed file or a run that has begun can show.
    later = {*list(CODES)[list(CODES).index("stuck-in-data") :]}
    assert CODES.keys() - {*told[0][1]} == later | {"unknown-key", "misplaced-key", "batch-arithmetic"}
    assert told[0][2].count("doctor: ") == 7 and told[1][2] == ""
