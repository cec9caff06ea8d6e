"""The curves and answers of a run in Weights & Biases: --wandb."""

import io
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import read_bytes
from sat_lora.training.runs.logs.run_logs import figures_of
from sat_lora.training.steps.observers import Observer, StepReport, ValidationReport

FOLDER = "wandb"
ID = "run_id"
ID_LIMIT = 64  # bytes
PROJECT = "sat_lora"  # unless WANDB_PROJECT names another


class WandB(Observer):
    """An observer that logs to W&B what TensorBoard has, under the same names; a run that goes on is one run there.

    folder: the run's. mode: online or offline, as `wandb.init` takes it. settings: gives what the run was told.
    What fails is said once by `Observers`, and the run goes on without it.
    """

    name = "wandb"

    def __init__(self, folder: str | Path, mode: str, settings: Callable[[], Mapping[str, Any]]):
        self.folder = Path(folder)
        self.mode = mode
        self._settings = settings
        self._run: Any = None

    def on_start(self, total_steps: int, start_step: int) -> None:
        import wandb

        own = self.folder / FOLDER / ID
        run_id = _stored_id(own) if start_step else None
        if run_id is None:
            run_id = secrets.token_hex(4)
            own.parent.mkdir(parents=True, exist_ok=True)
            replace_text(own, f"{run_id}\n")
        self._run = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT,
            name=self.folder.name,
            id=run_id,
            resume="allow",
            dir=str(self.folder),
            mode=self.mode,
            config=dict(self._settings()),
            settings=wandb.Settings(silent=True, console="off"),  # the screen is the run's
        )

    def on_step(self, report: StepReport) -> None:
        if self._run is not None and report.figures is not None:
            self._run.log({f"train/{name}": value for name, value in figures_of(report).items()}, step=report.step)

    def on_validation(self, report: ValidationReport) -> None:
        if self._run is None or report.loss is None:
            return
        content: dict[str, Any] = {"valid/loss": report.loss}
        content |= {f"valid/{name}": value for name, value in report.metrics.items()}
        if report.answers is not None:
            import wandb
            from PIL import Image

            content["answers"] = [
                wandb.Image(Image.open(io.BytesIO(png)), caption=caption)
                for caption, png, _ in report.answers.pictures()
            ]
        self._run.log(content, step=report.step)

    def on_end(self, error: BaseException | None) -> None:
        run = self._run
        self._run = None
        if run is not None:
            run.finish(exit_code=0 if error is None else 1)


def _stored_id(file: Path) -> str | None:
    """Return the id of the run that goes on; None where there is none."""
    try:
        text = read_bytes(file, ID_LIMIT).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if text.isalnum() else None
