"""TensorBoard's files of a run."""

import contextlib
import itertools
import os
import shutil
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from sat_lora.training.runs.logs.run_logs import AppendedFile, figures_of
from sat_lora.training.steps.observers import Observer, StepReport, ValidationReport

_numbers = itertools.count()


class EventFile:
    """TensorBoard's file of one start of a run. Raises OSError where it cannot be made.

    Values are written at once: the writer of torch.utils.tensorboard has a thread of its own, which dies of a full
    disk. purge_from: the first step of which TensorBoard forgets the values in earlier files; None where it forgets
    nothing.
    """

    def __init__(self, folder: str | Path, purge_from: int | None = None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._event = Event
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06}"
        self._file = AppendedFile(folder / f"events.out.tfevents.{name}")
        self._add(step=purge_from or 0, file_version="brain.Event:2")
        if purge_from is not None:
            self._add(step=purge_from, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Add a value per tag. Raises OSError where there is no room; the values wait for the next call."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step=step, summary=Summary(value=values))

    def add_pictures(self, step: int, pictures: Mapping[str, tuple[str, bytes, tuple[int, int]]]) -> None:
        """Add a picture per tag, and its text, from (text, PNG, its width and height). Raises OSError likewise."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        values = []
        for tag, (text, png, (width, height)) in pictures.items():
            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
            shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
            shown = "\n".join(f"    {line}" for line in text.split("\n"))  # as code, for Markdown obeys the rest
            tensor = TensorProto(dtype="DT_STRING", string_val=[shown.encode()], tensor_shape=shape)
            values.append(Summary.Value(tag=tag, image=image))
            values.append(Summary.Value(tag=f"{tag}/text", metadata=plugin, tensor=tensor))
        if values:
            self._add(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """Write what waits, and close the file. Raises OSError where there is no room, and it is lost."""
        self._file.close()

    def _add(self, **content) -> None:
        """Append an event with this content and the present time. Raises OSError where there is no room."""
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        data = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.append(length + checks[0] + data + checks[1])


class TensorBoard(Observer):
    """An observer that writes scalars under train/ and valid/ into files in `folder`.

    was_removed: whether the folder has gone with the run's, which was begun anew; later values go into a new file.
    """

    name = "tensorboard"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.was_removed = False
        self._events: EventFile | None = None

    def on_start(self, total_steps: int, start_step: int) -> None:
        """Open a file, from which on TensorBoard forgets what earlier files hold of steps after `start_step`.

        Raises OSError where the file cannot be made.
        """
        if start_step == 0:
            remove_events(self.folder)
        self._events = EventFile(self.folder, start_step + 1 if start_step else None)

    def on_step(self, report: StepReport) -> None:
        if report.figures is not None:
            self._add(report.step, "train", figures_of(report))

    def on_validation(self, report: ValidationReport) -> None:
        if report.loss is not None:
            self._add(report.step, "valid", {"loss": report.loss, **report.metrics})
        if report.answers is not None and self._events is not None:
            pictures = {f"answers/{number}": picture for number, picture in enumerate(report.answers.pictures(), 1)}
            self._events.add_pictures(report.step, pictures)

    def on_end(self, error: BaseException | None) -> None:
        self._reopen_if_removed()
        events = self._events
        self._events = None
        if events is not None:
            events.close()

    def _add(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Add figures by their names under GROUP/. Raises OSError where there is no room."""
        self._reopen_if_removed()
        if self._events is not None:
            self._events.add_scalars(step, {f"{group}/{name}": float(value) for name, value in figures.items()})

    def _reopen_if_removed(self) -> None:
        """Open a new file where the old one has gone with the run's folder. Raises OSError where it cannot be made."""
        if self.was_removed:
            self.was_removed = False
            if self._events is not None:
                with contextlib.suppress(OSError):
                    self._events.close()
            self._events = None
            self._events = EventFile(self.folder)


def remove_events(folder: Path) -> None:
    """Remove the folder of an earlier run's files; what is no folder stays. Raises OSError where that fails."""
    if folder.is_dir():
        shutil.rmtree(folder)
