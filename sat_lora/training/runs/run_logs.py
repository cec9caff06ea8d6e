"""Files that a run appends to and can do without: a full disk costs lines, never the run."""

import errno
import itertools
import os
import socket
import struct
import time
from pathlib import Path

_numbers = itertools.count()


class AppendedFile:
    """A file that grows by whole records, opened for appending. OSError: it cannot be opened.

    A record that finds no room is kept and written before the next one; of none is there ever a part in the file.
    """

    def __init__(self, path: str | Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is never waited for
        self._descriptor = os.open(path, flags, 0o666)
        self._size = os.fstat(self._descriptor).st_size
        self._waiting = b""

    def append(self, record: bytes) -> None:
        """Write what waits, and `record`. OSError: there is no room; both wait."""
        self._waiting += record
        written = os.write(self._descriptor, self._waiting)
        if written < len(self._waiting):
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written
        self._waiting = b""

    def close(self) -> None:
        """Try once more to write what waits, then close. OSError: it is lost."""
        try:
            if self._waiting:
                self.append(b"")
        finally:
            os.close(self._descriptor)


class EventFile:
    """TensorBoard's file of one start of a run. OSError: it cannot be made.

    Written here and now: the writer of torch.utils.tensorboard has a thread of its own, which dies of a full disk.
    purge_from: what earlier files say of this step and later ones is forgotten; None: nothing.
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
        """Add a value per tag. OSError: there is no room; it waits for the next call."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _add(self, **content) -> None:
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        data = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.append(length + checks[0] + data + checks[1])
