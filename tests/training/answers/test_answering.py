"""Answers of samples and the losses of right ones of samples, against each sample by itself and plain float64."""

import json
from pathlib import Path

import pytest
import torch

from sat_lora.cogvlm.checkpoints.load import load_cogvlm
from sat_lora.cogvlm.inputs.text import load_tokenizer
from sat_lora.data.samples import ImageTextDataset, Item, collate
from sat_lora.training.answers.answering import answer_samples
from sat_lora.training.answers.samples import SampleQuestions
from sat_lora.training.metrics.generated import load_metric
from tests.support.paths import TINY_BASE
from tests.support.picture_files import write_images
from tests.support.tiny import logits_of


@pytest.fixture
def asked(tmp_path):
    """A base, and samples of several lengths: one is broken, and one has no room for its answer."""
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.png").write_bytes(b"no picture")
    items = [
        Item(tmp_path / "a.png", "7"),
        Item(tmp_path / "c.png", "1"),
        Item(tmp_path / "b.png", "4711", "CAPTCHA: what is it?"),
        Item(tmp_path / "a.png", "42", history=()),
        Item(None, "12", "A"),
    ]
    dataset = ImageTextDataset(
        items, load_tokenizer(TINY_BASE), version="base", prompt="CAPTCHA:", image_size=(42, 42), image_length=36,
        max_length=64, with_answer=False,
    )  # fmt: skip
    model, _ = load_cogvlm(TINY_BASE)
    return model.eval(), dataset


def alone(model, dataset, index):
    """The summed cross-entropy of one answer, from all logits in float64."""
    dataset.with_answer = True
    batch = collate([dataset[index]], image_size=(42, 42))
    dataset.with_answer = False
    with torch.no_grad():
        logits = logits_of(model, batch)[0].double().log_softmax(-1)
    labels = batch["labels"][0]
    places = [place for place in range(len(labels) - 1) if labels[place + 1] != -100]
    return -sum(float(logits[place, labels[place + 1]]) for place in places), len(places)


def test_losses_are_those_of_each_answer_by_itself(asked, single_process_group):
    model, dataset = asked
    predictions, broken = answer_samples(
        model, dataset, single_process_group, batch_size=3, answerers={"base": None}, with_answer_losses=True
    )
    assert [prediction.index for prediction in predictions] == [0, 2, 3, 4]
    assert [Path(path).name for path, _, _ in broken] == ["c.png"]
    for prediction in predictions:
        total, count = prediction.answer_losses["base"]
        expected, tokens = alone(model, dataset, prediction.index)
        assert count == tokens and total == pytest.approx(expected, rel=1e-5)
    one_by_one, _ = answer_samples(model, dataset, single_process_group, batch_size=1, answerers=None)
    assert [p.answers["adapter"] for p in one_by_one] == [p.answers["base"] for p in predictions]


def test_an_answer_without_room_has_no_loss_and_moves_no_other(asked, single_process_group):
    model, dataset = asked
    dataset.max_length = len(dataset[2].input_ids)  # the longest question fits, and nothing behind it
    predictions, _ = answer_samples(
        model, dataset, single_process_group, batch_size=5, answerers=None, with_answer_losses=True
    )
    by_index = {prediction.index: prediction.answer_losses["adapter"] for prediction in predictions}
    assert by_index[2] == (0.0, 0)
    expected, tokens = alone(model, dataset, 4)
    assert by_index[4] == (pytest.approx(expected, rel=1e-5), tokens)


def test_questions_change_nothing_of_the_model(asked, single_process_group):
    model, dataset = asked
    model.train()
    before = torch.random.get_rng_state()
    metrics = {name: load_metric(name) for name in ("exact-match", "perplexity")}
    questions = SampleQuestions(dataset, single_process_group, metrics, batch_size=2, is_partitioned=False)
    answers = questions.ask(model)
    assert model.training and torch.equal(before, torch.random.get_rng_state())
    assert answers.measured == questions.ask(model).measured and answers.measured.keys() == metrics.keys()
    lines = [json.loads(line) for line in answers.lines()]
    assert [line["answer"] for line in lines] == ["7", "4711", "42", "12"]
    assert len([*answers.pictures()]) == 3
