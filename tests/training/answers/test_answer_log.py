"""The answers of validations in a run folder, in TensorBoard and in W&B."""

import io
import json
import struct
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from sat_lora.data.samples import Item
from sat_lora.training.answers.answer_log import AnswerLog, answer_files, remove_answers
from sat_lora.training.answers.prediction import Prediction, scores_of
from sat_lora.training.answers.samples import SampleAnswers
from sat_lora.training.metrics.generated import load_metric
from sat_lora.training.runs.results import results_in
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.observers import Observers, ValidationReport
from tests.support.run_logs import logged, logs_of


def png(size=(6, 4)):
    content = io.BytesIO()
    Image.new("RGB", size, "blue").save(content, "PNG")
    return content.getvalue()


def answered(*texts):
    predictions = [
        Prediction(index=n, sample=f"{n}.png", prompt="a *b* <i>", references=("x",), answers={"adapter": text})
        for n, text in enumerate(texts)
    ]
    scores = scores_of(predictions, {"exact-match": load_metric("exact-match")})
    images = [png(), b"no picture", png((640, 320))]
    samples = [Item(image, "x") for image, _ in zip(images, texts)]
    return SampleAnswers(predictions, scores, samples, 10**6, {"exact-match": scores["adapter"]["exact-match"].value})


def report(step, *texts):
    answers = answered(*texts) if texts else None
    return ValidationReport(step=step, loss=1.0, metrics=dict(answers.measured) if answers else {}, answers=answers)


def test_a_file_for_each_validation(tmp_path):
    log = AnswerLog(tmp_path / "answers")
    log.on_start(9, 0)
    log.on_validation(report(2, "x", "y"))
    log.on_validation(report(3))
    lines = [json.loads(line) for line in (tmp_path / "answers" / "2.jsonl").read_text().splitlines()]
    assert [line["predictions"]["adapter"] for line in lines] == ["x", "y"]
    assert [path.name for path in answer_files(tmp_path / "answers")] == ["2.jsonl"]
    assert "answers" in results_in(tmp_path)


def test_a_run_that_goes_on_has_the_files_of_its_own_steps(tmp_path):
    for step in (2, 4, 6):
        AnswerLog(tmp_path).on_validation(report(step, "x"))
    (tmp_path / "mine.jsonl").write_text("")
    AnswerLog(tmp_path).on_start(9, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.jsonl", "4.jsonl", "mine.jsonl"]
    remove_answers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    (tmp_path / "mine.jsonl").unlink()
    remove_answers(tmp_path)
    assert not tmp_path.exists()


def test_an_overwritten_run_leaves_no_answers(tmp_path):
    run = RunFolder(tmp_path, is_writer=True)
    run.answers.on_validation(report(2, "x"))
    names = ["evaluation.json", "predictions.jsonl", "evaluation.html", "evaluation-2.json", "predictions-2.jsonl"]
    for name in names:
        (tmp_path / name).write_text("{}")
    (tmp_path / "evaluation-notes.md").write_text("mine")
    assert {*names, "answers"} <= set(results_in(tmp_path))
    run.remove_results()
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-notes.md"]


def test_tensorboard_has_the_pictures_and_the_texts(tmp_path):
    run = RunFolder(tmp_path, is_writer=True)
    with logs_of(run) as logs:
        logs.on_start(9, 0)
        logs.on_validation(report(2, "x", "of none", "z\x1b"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    images = [events.Images(tag)[0] for tag in ("answers/1", "answers/2")]
    assert [(image.step, image.width, image.height) for image in images] == [(2, 6, 4), (2, 320, 160)]
    assert Image.open(io.BytesIO(images[1].encoded_image_string)).size == (320, 160)
    (text,) = events.Tensors("answers/2/text")[0].tensor_proto.string_val
    assert text.decode().split("\n") == ["    asked a *b* <i>", "    right x", "    said  z\\x1b"]
    assert events.Scalars("valid/exact-match")[0].value == pytest.approx(1 / 3)


class Stub:
    """What is used of the module wandb."""

    def __init__(self):
        self.inits, self.logs, self.ends = [], [], []

    def init(self, **settings):
        self.inits.append(settings)
        return SimpleNamespace(
            log=lambda content, step: self.logs.append((step, content)),
            finish=lambda exit_code: self.ends.append(exit_code),
        )

    def Settings(self, **settings):
        return settings

    def Image(self, image, caption):
        return image.size, caption


def test_wandb_has_what_tensorboard_has(tmp_path, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for start in (0, 4):
        run = RunFolder(tmp_path, is_writer=True, wandb="offline")
        with logs_of(run) as logs:
            logs.on_start(9, start)
            logs.on_step(logged(start + 1, loss=2.0))
            logs.on_validation(report(start + 2, "x", "y"))
    first, second = stub.inits
    assert first["id"] == second["id"] and first["mode"] == "offline" and first["dir"] == str(tmp_path)
    assert first["resume"] == "allow" and first["name"] == tmp_path.name
    (step, content), (validated, measured) = stub.logs[:2]
    assert step == 1 and content["train/loss"] == 2.0 and content["train/lr"] == 1e-3
    assert validated == 2 and measured["valid/loss"] == 1.0 and measured["valid/exact-match"] == 0.5
    assert measured["answers"] == [((6, 4), "asked a *b* <i>\nright x\nsaid  x")]
    assert stub.ends == [0, 0]
    fresh = RunFolder(tmp_path, is_writer=True, wandb="offline")
    with logs_of(fresh) as logs:
        logs.on_start(9, 0)
    assert stub.inits[2]["id"] != first["id"]  # another run in the folder


def test_what_fails_in_wandb_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    stub = Stub()
    stub.init = lambda **settings: (_ for _ in ()).throw(ConnectionError("no\x1bnet"))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    said = []
    run = RunFolder(tmp_path, is_writer=True, wandb="online")
    with Observers([run.wandb], said.append) as logs:
        logs.on_start(9, 0)
        logs.on_step(logged(1, loss=2.0))
        logs.on_validation(report(2, "x"))
    assert said == ["warning: wandb cannot be written: no\\x1bnet; the run goes on without it"]


BLOCK = 2**15  # bytes of LevelDB's log, which a run file of W&B is after seven of its own


def records_of(path):
    """The records of a run file of W&B."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    place = 7
    record = b""
    while place < len(content):
        if BLOCK - place % BLOCK < 7:  # too short for a head: filled up
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += 7 + length
        record += content[place - length : place]
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


@pytest.mark.matrix
@pytest.mark.timeout(180)
def test_the_package_itself_keeps_a_run_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name in ("WANDB_PROJECT", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    try:
        for start, steps in ((0, (1, 2)), (2, (3, 4))):
            run = RunFolder(tmp_path / "mine", is_writer=True, wandb="offline")
            run.wandb._settings = lambda: {"settings": {"lr": 1e-3}}
            said = []
            with Observers([run.wandb], said.append) as logs:
                logs.on_start(4, start)
                for step in steps:
                    logs.on_step(logged(step, loss=1 / step))
                logs.on_validation(report(steps[-1], "x", "y"))
            assert said == []
    finally:
        wandb.teardown()  # its process
    files = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb"))
    history = {}
    for number, file in enumerate(files):
        by_kind = {}
        for record in records_of(file):
            by_kind.setdefault(record.WhichOneof("record_type"), []).append(record)
        (own,) = (record.run for record in by_kind["run"])
        assert (own.run_id, own.project, own.display_name) == (run_id(tmp_path / "mine"), "sat_lora", "mine")
        assert {item.key: item.value_json for item in own.config.update}["settings"] == '{"lr":0.001}'
        figures = {}
        for record in by_kind["history"]:
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            figures[items["_step"]] = items
        assert [*figures] == [2 * number + 1, 2 * number + 2] and by_kind["exit"][0].exit.exit_code == 0
        history |= figures
    assert len(files) == 2 and max(history) == 4
    assert [history[step]["train/loss"] for step in history] == [1, 1 / 2, 1 / 3, 1 / 4]
    for step in (2, 4):
        measured = history[step]
        assert measured["valid/loss"] == 1.0 and measured["valid/exact-match"] == 0.5
        assert measured["answers._type"] == "images/separated" and len(measured["answers.captions"]) == 1, measured
    assert len([*(tmp_path / "mine" / "wandb").glob("offline-run-*/files/media/images/*.png")]) >= 2


def run_id(folder):
    return (folder / "wandb" / "run_id").read_text().strip()


def test_without_the_option_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(9, 0)
        logs.on_validation(report(2, "x"))
