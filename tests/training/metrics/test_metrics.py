"""What a validation measures beside the loss: the same by plain means, on any number of ranks, and from outside."""

import json

import pytest
import torch

from sat_lora.cogvlm.network import head
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.metrics.answers import Answers, Ratio
from sat_lora.training.metrics.registry import METRICS, metrics_named
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.observers import ValidationReport
from sat_lora.training.steps.step import validate
from tests.support.configs import parse_options
from tests.support.ranks import run_ranks
from tests.support.run_logs import logs_of, scalars
from tests.support.tiny import logits_of, tiny_batch, tiny_model


def right_tokens(model, batch) -> list[list[bool]]:
    """Of each sample, which answer tokens are the likeliest: by the logits of every position, one after the other."""
    logits, rows = logits_of(model, batch), []
    for row in range(len(batch["labels"])):
        following = batch["labels"][row, 1:].tolist()
        places = [place for place, label in enumerate(following) if label != -100]
        rows.append([int(logits[row, place].argmax()) == following[place] for place in places])
    return rows


def half_learnt(model, batch) -> dict:
    """The batch with every answer of its first row, and every other of its second, the likeliest."""
    likeliest = logits_of(model, batch).argmax(-1)
    labels = batch["labels"].clone()
    for row, step in ((0, 1), (1, 2)):
        places = (labels[row, 1:] != -100).nonzero()[::step, 0]
        labels[row, places + 1] = likeliest[row, places]
    return {**batch, "labels": labels, "broken": []}


def batches_for(rank, model):
    """A batch of two samples, of each rank others, and one without any answer."""
    batch = half_learnt(model, tiny_batch((True, False), seed=rank))
    return [batch, {**batch, "labels": torch.full_like(batch["labels"], -100)}]


def expected_of(model, batches):
    rows = [row for batch in batches for row in right_tokens(model, batch) if row]
    tokens = [right for row in rows for right in row]
    return {"token_accuracy": sum(tokens) / len(tokens), "answer_accuracy": sum(map(all, rows)) / len(rows)}


@pytest.mark.parametrize("chunk", [1024, 3])
def test_the_accuracies_are_those_of_all_logits_and_the_loss_stays_the_same(chunk, single_process_group, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ROWS", chunk)
    model = tiny_model().eval()
    batches = batches_for(0, model)
    measured = validate(model, batches, single_process_group, metrics_named(["token_accuracy", "answer_accuracy"]))
    expected = expected_of(model, batches)
    assert measured.metrics == pytest.approx(expected) and 0.5 < expected["token_accuracy"] < 1
    assert expected["answer_accuracy"] == 0.5
    plain = validate(model, batches, single_process_group)
    assert plain.loss == measured.loss and plain.metrics == {}


def measured_on_a_rank():
    world, model = init_model_parallel(init_distributed()), tiny_model().eval()
    measured = validate(model, batches_for(world.rank, model), world, metrics_named(METRICS))
    return measured.metrics, expected_of(
        model, [batch for rank in range(world.size) for batch in batches_for(rank, model)]
    )


def test_two_ranks_measure_what_one_would():
    for metrics, expected in run_ranks(measured_on_a_rank, 2):
        assert metrics == pytest.approx(expected)


def test_what_is_not_asked_for_costs_nothing(single_process_group):
    class Model:
        def eval(self):
            pass

        train = eval

        def __call__(self, ids, positions, mask, **inputs):
            calls.append(set(inputs))
            return (torch.zeros(()),)

    calls, batch = [], {**tiny_batch(), "broken": []}
    validate(Model(), [batch], single_process_group)
    assert "on_logits" not in calls[0]


def test_without_an_answer_there_is_no_metric(single_process_group):
    model = tiny_model().eval()
    measured = validate(model, batches_for(0, model)[1:], single_process_group, metrics_named(METRICS))
    assert (measured.loss, measured.metrics) == (None, {})


def certainty(answers: Answers) -> Ratio:
    """The mean probability of the right tokens."""
    chances = answers.logits.float().softmax(-1).gather(1, answers.labels[:, None])
    return Ratio(chances.sum(), len(answers.labels))


@pytest.mark.parametrize("place", [certainty, f"{__name__}:certainty"])
def test_a_metric_from_outside_is_an_option_and_is_measured_and_logged(
    place, single_process_group, monkeypatch, tmp_path, capfd
):
    monkeypatch.setitem(METRICS, "certainty", place)
    options = parse_options(["--valid-metrics", "certainty"])
    model = tiny_model().eval()
    (batch, _) = batches_for(0, model)
    measured = validate(model, [batch], single_process_group, metrics_named(options.saving.valid_metrics))
    chances = [
        logits_of(model, batch)[row, place].softmax(-1)[batch["labels"][row, place + 1]].item()
        for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist()
    ]
    assert measured.metrics == pytest.approx({"certainty": sum(chances) / len(chances)}, rel=1e-5)
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(4, 0)
        logs.on_validation(ValidationReport(step=2, loss=measured.loss, metrics=measured.metrics))
    (line,) = map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    assert line == {"step": 2, "valid_loss": measured.loss, "valid_certainty": measured.metrics["certainty"]}
    assert scalars(tmp_path)["valid/certainty"] == [(2, round(measured.metrics["certainty"], 4))]
    assert f"certainty {measured.metrics['certainty']:.4f}, the first" in capfd.readouterr().err


def test_a_metric_that_nobody_has_is_refused_with_the_names(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse_options(["--valid-metrics", "accuracy"])
    assert stop.value.code == 2 and "token_accuracy" in capsys.readouterr().err
    settings = {"from_pretrained": "base", "valid_metrics": ["token_accuracy", "gone"], "given": []}
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(SystemExit) as stop:
        parse_options(["--resume", str(tmp_path)])
    message = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "valid_metrics: got ['token_accuracy', 'gone'], wanted a list of token_acc" in message
    )
