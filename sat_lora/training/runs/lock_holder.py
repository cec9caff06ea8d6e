"""Who holds the lock of a run folder, as its text says. It imports no torch: `sat-lora runs` answers at once."""

import os
import socket
import time
from dataclasses import dataclass

from sat_lora.files.foreign import parse_json
from sat_lora.printable import printable
from sat_lora.watchdog.rank_files import process_started


@dataclass(frozen=True)
class Process:
    """A process on some host; its start time in `started` tells it from a later process of the same number."""

    host: str
    pid: int
    started: str | None

    @property
    def is_here(self) -> bool:
        """Whether the process runs, or ran, on this host."""
        return self.host == socket.gethostname()

    @property
    def lives(self) -> bool:
        """Whether the process still runs; it can be asked only of a process of this host."""
        return self.pid > 0 and self.started is not None and process_started(self.pid) == self.started

    @classmethod
    def current(cls) -> "Process":
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), process_started(os.getpid()))


@dataclass(frozen=True)
class Holder:
    """Who has written the text of a lock, and the ranks that hold it."""

    doing: str
    """What the lock is held for, a word such as "training"."""
    began: str
    """When that began, in local time."""
    process: Process
    """The process that took the lock."""
    launcher: Process | None
    """The process of torchrun or DeepSpeed that has started `process`; None without one."""
    ranks: tuple[Process, ...]
    """All ranks of the run; empty until they share the lock."""
    job: tuple[str, str] | None
    """Slurm's number of the job, and how often it was requeued; None without Slurm."""

    @classmethod
    def current(cls, doing: str, ranks: tuple[Process, ...] = ()) -> "Holder":
        """Return this process as a holder from now on. doing: what for, a word such as "training"."""
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        parent = os.getppid()
        launcher = Process(socket.gethostname(), parent, process_started(parent)) if is_launched() else None
        job = os.environ.get("SLURM_JOB_ID")
        requeued = (job, os.environ.get("SLURM_RESTART_COUNT", "0")) if job else None
        return cls(doing, began, Process.current(), launcher, ranks, requeued)

    @classmethod
    def read(cls, text: bytes) -> "Holder | None":
        """Return the holder that the text of a lock names; None where it is no such text."""
        try:
            content = parse_json(text)
            process, launcher = (content[name] and Process(**content[name]) for name in ("process", "launcher"))
            ranks = tuple(Process(**values) for values in content["ranks"])
            job = None if content["job"] is None else tuple(map(str, content["job"]))
            named = (process, *ranks, *(() if launcher is None else (launcher,)))
            types = {(type(entry.pid), type(entry.host), isinstance(entry.started, str | None)) for entry in named}
            if types != {(int, str, True)} or (job is not None and len(job) != 2):
                return None
            return cls(str(content["doing"]), str(content["began"]), process, launcher, ranks, job)
        except (ValueError, TypeError, LookupError, AttributeError):
            return None

    @property
    def processes(self) -> tuple[Process, ...]:
        """The process that took the lock and all ranks, each once."""
        return tuple(dict.fromkeys((self.process, *self.ranks)))

    @property
    def alive(self) -> list[Process]:
        """The processes of this host that still run."""
        return [process for process in self.processes if process.is_here and process.lives]

    @property
    def is_requeued_as_this(self) -> bool:
        """Whether this process is of the holder's Slurm job, requeued since: Slurm runs a job once at a time."""
        now = Holder.current("").job
        return self.job is not None and now is not None and self.job[0] == now[0] and self.job != now

    def __str__(self) -> str:
        return printable(f"{self.doing}, process {self.process.pid} on {self.process.host}, since {self.began}")


def is_launched() -> bool:
    """Return whether the parent of this process is torchrun or DeepSpeed's launcher."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ
