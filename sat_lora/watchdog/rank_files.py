"""The files that each rank of a run keeps in RUN/watchdog, and how they are laid out.

rank_00003.json is written once: names and process. rank_00003.state is a mapping of fixed layout, see below. Others are
named by their ending: `file_of`.
"""

import contextlib
import struct
from pathlib import Path

from sat_lora.errors import ConfigError
from sat_lora.files.paths import missing_path
from sat_lora.printable import printable

PHASES = tuple("start data forward backward reduce optimizer evaluate save load write test check".split())
# Loading, starting the engine, waiting for a save to be on the disk, the evaluation after training, and what is looked
# at before all of it: options, files and data.
OUTSIDE_OF_STEPS = ("start", "load", "write", "test", "check")
FOLDER = "watchdog"
ALIVE = "alive.json"
ALARM = "alarm.json"
VERDICT = "verdict.txt"
FATAL = ".fatal.txt"
NCCL_DUMP = "nccl_trace_rank_"
NONE = 0xFFFFFFFF  # no module or parameter yet

TIMES = struct.Struct("<dd")  # when the phase began, and the last sign of life as far as the watchdog has looked
NUMBERS = struct.Struct("<5I")
STEP, MICRO_BATCH, PHASE, MODULE, COUNT = range(5)  # of the numbers: the last module entered, how many arrivals
ARRIVAL = struct.Struct("<Id")  # parameter, when
NUMBERS_AT = TIMES.size
ARRIVALS_AT = 48


def folder_of(run: str | Path) -> Path:
    """Return the folder of a run in which its ranks keep their files."""
    return Path(run) / FOLDER


def refuse_no_traces(run: str | Path) -> None:
    """Raise ConfigError if no rank has left files in a run's folder; nothing slow is imported to know that."""
    problem = missing_path(str(run), "give the folder of a run, such as runs/NAME")
    if problem:
        raise ConfigError(f"--run: {problem}")
    folder = folder_of(run)
    if not any(folder.glob("rank_*.state")):
        raise ConfigError(
            f"--run: {printable(run)} has no {folder.name}/rank_*.state; give the folder of a run with a watchdog"
        )


def clear(run: str | Path) -> None:
    """Remove what an earlier start of the run has left; what others keep in a folder of that name stays."""
    folder = folder_of(run)
    for pattern in (ALIVE, ALARM, VERDICT, "rank_[0-9]*.*", f"{NCCL_DUMP}*"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):  # others keep something there, or it is not there
        folder.rmdir()


def file_of(folder: Path, rank: int, ending: str) -> Path:
    """Return a rank's file of that kind in a run's watchdog folder."""
    return folder / f"rank_{rank:05}{ending}"


def process_started(pid: int) -> str | None:
    """Return when a process began, in ticks since boot; None if there is none of that number.

    It tells a process from a later one of the same number.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
