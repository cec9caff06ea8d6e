"""The answers of each validation in files of the run folder."""

import re
from pathlib import Path

from sat_lora.files.atomic import replace_lines
from sat_lora.training.steps.observers import Observer, ValidationReport

_FILE = re.compile(r"(0|[1-9][0-9]{0,17})\.jsonl")


class AnswerLog(Observer):
    """An observer that writes FOLDER/<step>.jsonl at each validation that has answers: a line for each sample."""

    name = "answers"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def on_start(self, total_steps: int, start_step: int) -> None:
        """Remove the files of steps after `start_step`, which come again. Raises OSError where that fails."""
        for file in answer_files(self.folder):
            if int(file.stem) > start_step or start_step == 0:
                file.unlink(missing_ok=True)

    def on_validation(self, report: ValidationReport) -> None:
        if report.answers is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_lines(self.folder / f"{report.step}.jsonl", report.answers.lines())


def answer_files(folder: Path) -> list[Path]:
    """Return the files that an AnswerLog has written into a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if _FILE.fullmatch(path.name) and path.is_file())


def remove_answers(folder: Path) -> None:
    """Remove the files of an earlier run, and the folder if nothing else is in it. Raises OSError where that fails."""
    for file in answer_files(folder):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
