"""Kind 4: what is left out is named: folders that cannot be read, cut answers; and nothing of the run itself."""

import os
from argparse import Namespace
from collections import Counter

import pytest

from sat_lora.data.answer_lengths import CutAnswers
from sat_lora.data.folders import SHOWN, find_images, unreadable_notes
from sat_lora.data.samples import (
    BrokenSample,
    DataCounts,
    ImageTextDataset,
    Item,
    collate,
    read_items,
    reading_options,
)
from sat_lora.training.answers.answering import cut_answers, length_of_answer
from sat_lora.training.run_summary import left_out, more_to_say
from tests.support.datasets import numbered, source_of
from tests.support.picture_files import write_images
from tests.support.run_summaries import summary_lines

DENIED = PermissionError(13, "Permission denied")


@pytest.fixture
def locked(monkeypatch):
    """Folders of these names can no more be listed; the administrator may list all."""
    scandir = os.scandir

    def locked(*names, error=DENIED):
        def guarded(path="."):
            if os.path.basename(str(path)) in names:
                raise error
            return scandir(path)

        monkeypatch.setattr(os, "scandir", guarded)

    return locked


@pytest.mark.parametrize("error", [DENIED, OSError(5, "Input/output error")])
@pytest.mark.parametrize("where", ["b", "a/b", "a/b\x1b[2J"])
def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, locked, tokenizer, error, where):
    write_images(tmp_path / where, ["1.png"])
    write_images(tmp_path / "c", ["2.png"])
    locked(os.path.basename(where), error=error)
    counts = DataCounts()
    items = read_items([tmp_path], counts=counts)
    data = source_of(items, tokenizer, counts.left_out())
    (note,) = more_to_say(40, data, None)
    shown = f"{tmp_path}/{where}".replace("\x1b", r"\x1b")
    assert note.startswith(f"--train-data: folder {shown} cannot be read: {error.strerror}; its images are left out")
    assert left_out(data) == {"folders that cannot be read": 1}
    assert summary_lines(data)["left out"] == "1 folders that cannot be read"
    assert more_to_say(40, source_of(items, tokenizer), data)[0].startswith("--valid-data: folder")


def test_of_very_many_folders_ten_are_named(tmp_path, locked):
    names = [f"locked{number:02}" for number in range(25)]
    for name in names:
        (tmp_path / name).mkdir()
    locked(*names)
    counts = Counter()
    find_images([tmp_path], counts)
    notes = unreadable_notes(counts, "--test-data")
    assert len(notes) == SHOWN + 1 and notes[-1] == "--test-data: and 15 more folders that cannot be read"


@pytest.mark.parametrize("where", ["", "runs/first", "images/deep/run"])
def test_the_runs_own_files_are_not_counted(tmp_path, where):
    images = write_images(tmp_path / "images", ["1.png"])
    run = tmp_path / where
    (run / "watchdog").mkdir(parents=True)
    (run / "watchdog" / "0.png").write_bytes(b"")
    for name in ("lock", "train.jsonl", "loss.png"):
        (run / name).touch()
    options = Namespace(run_folder=str(run))
    for folder in (tmp_path, images):
        counts = DataCounts()
        (item,) = read_items([folder], **reading_options(options), counts=counts)
        assert item.answer == "1" and not counts.unused
    write_images(run, ["2.png"])
    assert len(read_items([tmp_path], **reading_options(options))) == 2


def test_another_runs_files_are_counted(tmp_path):
    write_images(tmp_path, ["1.png"])
    for name in ("other", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    counts = Counter()
    find_images([tmp_path], counts, tmp_path / "own")
    assert counts == {"files and folders of a run": 1}


def test_cut_answers_of_validation_data_are_said(tokenizer):
    items = [Item(None, "x" * length, "q") for length in (3, 3, 60, 90)]
    data, valid = source_of(numbered(2), tokenizer), source_of(items, tokenizer)
    assert more_to_say(40, data, valid) == ["validation: 2 of 4 answers are cut by --max_length 40; 93 would hold them"]
    assert more_to_say(40, data, source_of(items[:2], tokenizer)) == []


def test_answers_of_test_data_that_are_too_long_to_be_generated_are_counted(tokenizer):
    settings = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=30, with_answer=False)
    data = ImageTextDataset([Item(None, "x" * n, "q") for n in (1, 29, 30, 31, 9000)], tokenizer, **settings)
    data.items.append(Item(None, "\ud83d" * 40, "q"))
    lengths = [length_of_answer(data, item) for item in data.items]
    assert lengths[:5] == [1, 29, 30, 30, 30] and isinstance(lengths[5], BrokenSample)
    assert cut_answers(data, lengths) == 2


def test_cut_answers_of_a_stream_are_counted_over_all_passes(tokenizer, single_process_group):
    settings = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=30)
    data = ImageTextDataset([Item(None, "x" * n, "q") for n in (1, 40, 50)], tokenizer, **settings)
    batches = [
        collate([data[0], data[1]], image_size=(21, 21)),
        collate([BrokenSample("a", "b")], image_size=(21, 21)),
        collate([data[2]], image_size=(21, 21)),
    ]
    notes = []
    stream = CutAnswers(batches, notes.append, 30, "validation: ")
    assert [*stream] == batches and [*stream] == batches
    stream.say_all()
    assert notes == [
        "validation: --max_length 30: an answer does not fit and is cut, others may be; 43 would hold it",
        "validation: --max_length 30 has cut 4 of 6 answers that came; 53 would hold them",
    ]
    whole = CutAnswers(batches[1:2], notes.append, 30)
    assert [*whole] and whole.say_all() is None and len(notes) == 2
