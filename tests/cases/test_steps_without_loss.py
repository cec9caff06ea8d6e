"""A step none of whose samples can be used has no loss: no screen, log or picture shows a perfect one."""

import json

import pytest
import torch

from sat_lora.data.samples import BrokenSample, collate
from sat_lora.training.runs.logs import loss_plot
from sat_lora.training.runs.logs.run_logs import read_records
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.runs.step_progress import Progress
from sat_lora.training.steps.step import train_step
from tests.support.run_logs import logged, logs_of


class Engine:
    """Gives a loss for every answer token."""

    def __call__(self, input_ids, position_ids, mask, *, labels, **inputs):
        return ((labels[:, 1:] != -100).sum() * 2.5,)

    def backward(self, loss):
        pass

    def step(self):
        pass


def batch(*answers):
    broken = collate([BrokenSample("a.png", "cut"), BrokenSample("b.png", "cut")], image_size=(21, 21))
    if answers:
        broken["labels"] = torch.tensor(answers)[None]
    return broken


@pytest.mark.parametrize(
    "batches, loss",
    [([batch()], None), ([batch(), batch()], None), ([batch(), batch(-100, 7, 8)], 2.5), ([batch(-100, 7)], 2.5)],
)
def test_a_mean_of_no_answer_is_none(batches, loss, single_process_group):
    tokens = sum(int((one["labels"][:, 1:] != -100).sum()) for one in batches)
    for given in (tokens, torch.tensor(float(tokens), dtype=torch.float64)):
        result = train_step(Engine(), batches, single_process_group, given, checks_gradients=False, counts=[3.0])
        assert result.loss == loss and result.nonfinite is None and result.counts == (3.0,)


def test_no_log_and_no_picture_has_a_loss_of_it(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("sat_lora.training.runs.logs.loss_plot.draw_losses", lambda records, *_: drawn.extend(records))
    run = RunFolder(tmp_path, is_writer=True)
    with logs_of(run) as logs:
        logs.on_start(3, 0)
        scalars = []
        monkeypatch.setattr(run.events._events, "add_scalars", lambda step, values: scalars.append(values))
        for step, loss in enumerate([2.0, None, 1.0], 1):
            logs.on_step(logged(step, loss=loss, grad_norm=None))
    assert [record["loss"] for record in read_records(tmp_path / "train.jsonl")] == [2.0, None, 1.0]
    assert [sorted(values) for values in scalars][1] == [
        "train/lr",
        "train/peak_memory_mib",
        "train/samples_per_second",
    ]
    assert loss_plot.points(drawn, "loss") == [(1, 2.0), (3, 1.0)]
    assert loss_plot.points(drawn, "lr") == [(1, 1e-3), (2, 1e-3), (3, 1e-3)]
    assert "0.0000" not in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_screen_says_that_there_is_none(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr("sat_lora.training.runs.step_progress.is_terminal", lambda stream: is_terminal)
    shown = Progress(4)
    shown.advance(1, {"loss": 1.5, "lr": 1e-3})
    shown.advance(4, {"loss": None, "lr": 1e-3})
    assert shown._figures() == ["no loss", "lr 1.00e-03"]
    shown.close()
    assert "no loss, lr 1.00e-03" in capsys.readouterr().err


def test_a_line_without_a_loss_is_json(tmp_path):
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(1, 0)
        logs.on_step(logged(1, loss=None))
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
