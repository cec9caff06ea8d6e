"""What the files of a run's ranks say: where each was, and whether it lives."""

import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import MEBIBYTE, read_bytes, read_json
from sat_lora.watchdog.places import Place, places_of, source_line
from sat_lora.watchdog.rank_files import (
    ALIVE,
    ARRIVAL,
    ARRIVALS_AT,
    FATAL,
    NONE,
    NUMBERS,
    NUMBERS_AT,
    PHASES,
    TIMES,
    file_of,
    folder_of,
    process_started,
)

STATE_LIMIT = 64 * MEBIBYTE  # of a rank's mapped file: 24 bytes for each parameter that trains
MOST_RANKS = 2**20
LATEST_TIME = 2.0**37  # seconds since the epoch; a calendar ends soon after
STATIC = {  # what a rank writes once
    "rank": lambda value: _is_number(value, MOST_RANKS),
    "world_size": lambda value: _is_number(value, MOST_RANKS) and value > 0,
    "pid": lambda value: _is_number(value, 2**31),
    "host": lambda value: isinstance(value, str),
    "argv": lambda value: _are_texts(value),
    "cwd": lambda value: isinstance(value, str),
    "modules": lambda value: _are_texts(value),
    "parameters": lambda value: _are_texts(value),
}
ENDING = {  # and at its end
    "error": lambda value: isinstance(value, str | None),
    "frames": lambda value: isinstance(value, list | None),
    "time": lambda value: value is None or _is_time(value),
}


@dataclass(frozen=True)
class RankState:
    """What the two files of a rank say. Times are in seconds since the epoch."""

    rank: int
    world_size: int
    pid: int
    host: str
    is_alive: bool | None
    """Whether the process lives, None if it is on another machine, so who knows."""
    argv: list[str]
    cwd: str
    package: str | None
    """The folder of its sat_lora; None: an older run, which has not kept it."""
    step: int
    micro_batch: int
    phase: str
    phase_began: float
    module: str | None
    """The last one entered."""
    last_seen: float
    """When the watchdog last saw a sign of life, which may be a little later."""
    arrivals: list[tuple[str, float]]
    """Gradients of the present micro-batch: parameter, when."""
    expected: list[str]
    """The trainable parameters."""
    error: str | None
    """The exception that ended it."""
    error_places: tuple[Place, ...]
    """Innermost first."""
    ended: float | None
    """When it left the loop, by an exception or not; None: it did not."""
    fatal: str | None
    """The signal that ended it, as faulthandler calls it: Aborted, Segmentation fault, Bus error."""
    fatal_places: tuple[Place, ...]
    """The places of its main thread then, as `error_places`."""

    @property
    def last_sign(self) -> float:
        """When the rank last gave a sign of life, in seconds since the epoch."""
        return max(self.phase_began, self.last_seen, *(when for _, when in self.arrivals[-1:]))


def read_states(run: str | Path) -> list[RankState]:
    """Return the state of every rank that has left files, in order.

    Raises OSError or ValueError if a file cannot be read.
    """
    files = sorted(folder_of(run).glob("rank_*.state"))
    noted = folder_of(run) / ALIVE
    alive = _object(noted) if noted.is_file() else {}
    return [_read_state(file, alive) for file in files if file.with_suffix(".json").is_file()]


def note_who_lives(run: str | Path) -> None:
    """Keep which ranks live now: whoever reads the files later finds none alive."""
    replace_text(folder_of(run) / ALIVE, json.dumps({str(state.rank): state.is_alive for state in read_states(run)}))


def _object(path: Path, checks: Mapping[str, Callable[[object], bool]] = MappingProxyType({})) -> dict:
    """Return the object in a JSON file.

    Raises ValueError if it is none, or a value is nothing that a rank writes.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: wanted an object, got {str(content)[:60]!r}")
    wrong = [
        f"{name} is {str(content.get(name))[:60]!r}" for name, check in checks.items() if not check(content.get(name))
    ]
    if wrong:
        raise ValueError(f"{path.name}: nothing that a rank writes: {', '.join(wrong)}")
    return content


def _is_number(value, most: float) -> bool:
    return type(value) is int and 0 <= value < most


def _is_time(value) -> bool:
    return type(value) in (int, float) and 0 <= value < LATEST_TIME


def _are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _read_state(file: Path, alive: dict[str, bool | None]) -> RankState:
    static = _object(file.with_suffix(".json"), STATIC)
    package = static.get("package")
    data = read_bytes(file, STATE_LIMIT)
    began, last_seen = TIMES.unpack_from(data, 0)
    step, micro_batch, phase, module, count = NUMBERS.unpack_from(data, NUMBERS_AT)
    arrivals = [ARRIVAL.unpack_from(data, ARRIVALS_AT + n * ARRIVAL.size) for n in range(count)]
    if not all(map(_is_time, (began, last_seen, *(when for _, when in arrivals)))):
        raise ValueError(f"{file.name}: its times are none")
    end = file_of(file.parent, static["rank"], ".end.json")
    fatal, fatal_frames = _read_fatal(file_of(file.parent, static["rank"], FATAL))
    ending = _object(end, ENDING) if end.is_file() else {}
    is_alive = alive.get(str(static["rank"]), _is_alive(static))
    return RankState(
        rank=static["rank"],
        world_size=static["world_size"],
        pid=static["pid"],
        host=static["host"],
        is_alive=is_alive if isinstance(is_alive, bool) else None,
        argv=static["argv"],
        cwd=static["cwd"],
        package=package,
        step=step,
        micro_batch=micro_batch,
        phase=PHASES[phase],
        phase_began=began,
        module=None if module == NONE else static["modules"][module],
        last_seen=last_seen,
        arrivals=[(static["parameters"][number], when) for number, when in arrivals],
        expected=static["parameters"],
        error=ending.get("error"),
        error_places=places_of(ending.get("frames") or [], package),
        ended=ending.get("time"),
        fatal=fatal,
        fatal_places=places_of(fatal_frames, package),
    )


def _read_fatal(file: Path) -> tuple[str | None, list[list]]:
    """Return (name of the signal, frames of the main thread) of what faulthandler writes when a signal ends a process.

    The main thread comes last, each thread with its innermost frame first. They are None and empty without a file.
    """
    text = read_bytes(file, STATE_LIMIT).decode("utf-8", "replace") if file.is_file() else ""
    name = re.search(r"^Fatal Python error: (.+)$", text, re.MULTILINE)
    last = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    frames = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', last, re.MULTILINE)
    return (name[1] if name else None), [
        [place, int(line), function, source_line(place, int(line))] for place, line, function in frames
    ]


def _is_alive(static: dict) -> bool | None:
    if static["host"] != socket.gethostname():
        return None
    return process_started(static["pid"]) == static.get("process_started")
