"""Where a rank is, kept in two small files of its own: what a killed or hanging process leaves behind.

RUN/watchdog/rank_00003.json is written once: names and process. rank_00003.state is a shared mapping that the rank
writes into as it goes, a few bytes at a time; the kernel keeps them whatever becomes of the process. Ranks do not
speak to each other for it.
"""

import json
import linecache
import mmap
import os
import re
import shutil
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sat_lora.adapter import LoraAdapter
from sat_lora.atomic import replace_text
from sat_lora.training.nonfinite import GradientWatch

PHASES = ("start", "data", "forward", "backward", "reduce", "optimizer", "evaluate", "save", "end")
FOLDER = "watchdog"
ALIVE, FATAL = "alive.json", ".fatal.txt"
NCCL_DUMP = "nccl_trace_rank_"
NONE = 0xFFFFFFFF  # no module or parameter yet
REMEMBERED = 50  # durations of a phase, of which the longest counts: a slow first step is forgotten

_TIMES = struct.Struct("<dd")  # when the phase began, and the last sign of life as far as the watchdog has looked
_NUMBERS = struct.Struct("<5I")
_STEP, _MICRO_BATCH, _PHASE, _MODULE, _COUNT = range(5)  # of the numbers: the last module entered, how many arrivals
_ARRIVAL = struct.Struct("<Id")  # parameter, when
_NUMBERS_AT, _ARRIVALS_AT = _TIMES.size, 48


def folder_of(run: str | Path) -> Path:
    return Path(run) / FOLDER


def clear(run: str | Path) -> None:
    """Remove what an earlier start of the run has left."""
    shutil.rmtree(folder_of(run), ignore_errors=True)


class NoTrace:
    """Keeps nothing."""

    def at(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        pass

    def follow(self, engine) -> None:
        pass


NO_TRACE = NoTrace()


class Trace(NoTrace):
    """This rank's.

    model: its modules get hooks that note the last one entered. watch: of that model, whose hooks tell the arrivals.
    OSError: the files cannot be made.
    """

    def __init__(self, run: str | Path, model: nn.Module, watch: GradientWatch, *, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder_of(run), rank, world_size
        self.folder.mkdir(parents=True, exist_ok=True)
        for variable in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # its new and its old name
            os.environ.setdefault(variable, str(self.folder.resolve() / NCCL_DUMP))
        modules = [name for name, _ in model.named_modules()]
        parameters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        static = dict(
            rank=rank,
            world_size=world_size,
            pid=os.getpid(),
            process_started=process_started(os.getpid()),
            host=socket.gethostname(),
            argv=[sys.executable, *sys.argv],
            cwd=os.getcwd(),
            modules=modules,
            parameters=parameters,
        )
        file_of(self.folder, rank, ".json").write_text(json.dumps(static), encoding="utf-8")
        self._most = 2 * len(parameters)  # one that arrives twice is a fault, and seen
        size = _ARRIVALS_AT + self._most * _ARRIVAL.size
        with open(file_of(self.folder, rank, ".state"), "w+b") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._numbers = memoryview(self._memory)[_NUMBERS_AT : _NUMBERS_AT + _NUMBERS.size].cast("I")
        self._numbers[_MODULE] = NONE
        self._phases = 0
        self.durations = {phase: deque(maxlen=REMEMBERED) for phase in PHASES}
        self._began = time.perf_counter()
        self.at(PHASES[0])
        for number, module in enumerate(model.modules()):
            # Not dropout and the like, nor adapters: their layers stand for them, and every hook costs a microsecond.
            if any(True for _ in module.parameters()) and not isinstance(module, LoraAdapter):
                module.register_forward_pre_hook(_note_into(self._numbers, number))
        watch.on_arrival = self._arrival

    @property
    def phase(self) -> str:
        return PHASES[self._numbers[_PHASE]]

    @property
    def signs(self) -> tuple[int, int, int]:
        """Differs whenever there was a sign of life since: a phase, a module or a gradient."""
        return self._phases, self._numbers[_MODULE], self._numbers[_COUNT]

    def seen_alive(self) -> None:
        """The watchdog has seen a new sign."""
        struct.pack_into("<d", self._memory, 8, time.time())

    def follow(self, engine) -> None:
        """Tell DeepSpeed's reduction after a backward pass from the pass itself."""
        reduce = engine.allreduce_gradients

        def traced(*args, **kwargs):
            self.at("reduce")
            return reduce(*args, **kwargs)

        engine.allreduce_gradients = traced

    def at(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        """A phase begins. step: counted from 1. micro_batch: within the step, from 0."""
        now, numbers = time.perf_counter(), self._numbers
        self.durations[self.phase].append(now - self._began)
        self._began = now
        self._phases += 1
        if step is not None:
            numbers[_STEP] = step
        if micro_batch is not None:
            numbers[_MICRO_BATCH] = micro_batch
        if phase == "forward":
            numbers[_COUNT] = 0
        numbers[_PHASE] = PHASES.index(phase)
        _TIMES.pack_into(self._memory, 0, time.time(), time.time())

    @contextmanager
    def told(self) -> Iterator[None]:
        """How the block ends is written down."""
        try:
            yield
        except BaseException as error:
            self._write_end(f"{type(error).__name__}: {error}", error)
            raise
        self._write_end(None, None)

    def _write_end(self, text: str | None, error: BaseException | None) -> None:
        import traceback

        frames = [] if error is None else traceback.extract_tb(error.__traceback__)
        places = [[frame.filename, frame.lineno, frame.name, frame.line] for frame in reversed(frames)]
        content = dict(error=text, frames=places, time=time.time())
        file_of(self.folder, self.rank, ".end.json").write_text(json.dumps(content), encoding="utf-8")

    def _arrival(self, number: int) -> None:
        count = self._numbers[_COUNT]
        if count < self._most:
            _ARRIVAL.pack_into(self._memory, _ARRIVALS_AT + count * _ARRIVAL.size, number, time.time())
            self._numbers[_COUNT] = count + 1


def _note_into(numbers: memoryview, number: int) -> Callable[[nn.Module, tuple], None]:
    """A hook as cheap as it gets: it runs for every module in every pass."""

    def entered(module, args):
        numbers[_MODULE] = number

    return entered


@dataclass(frozen=True)
class RankState:
    """What the two files of a rank say. Times are in seconds since the epoch."""

    rank: int
    world_size: int
    pid: int
    host: str
    is_alive: bool | None
    """None: on another machine, so who knows."""
    argv: list[str]
    cwd: str
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
    error_frames: list[list]
    """[file, line, function, code], innermost first."""
    ended: float | None
    """When it left the loop, by an exception or not; None: it did not."""
    fatal: str | None
    """The signal that ended it, as faulthandler calls it: Aborted, Segmentation fault, Bus error."""
    fatal_frames: list[list]
    """Of its main thread then, as `error_frames`."""

    @property
    def last_sign(self) -> float:
        return max(self.phase_began, self.last_seen, *(when for _, when in self.arrivals[-1:]))


def read_states(run: str | Path) -> list[RankState]:
    """Of every rank that has left files, in order. OSError or ValueError: a file cannot be read."""
    files = sorted(folder_of(run).glob("rank_*.state"))
    noted = folder_of(run) / ALIVE
    alive = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    return [_read_state(file, alive) for file in files if file.with_suffix(".json").is_file()]


def note_who_lives(run: str | Path) -> None:
    """Keep which ranks live now: whoever reads the files later finds none alive."""
    replace_text(folder_of(run) / ALIVE, json.dumps({str(one.rank): one.is_alive for one in read_states(run)}))


def _read_state(file: Path, alive: dict[str, bool | None]) -> RankState:
    static = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    data = file.read_bytes()
    began, last_seen = _TIMES.unpack_from(data, 0)
    step, micro_batch, phase, module, count = _NUMBERS.unpack_from(data, _NUMBERS_AT)
    arrivals = [_ARRIVAL.unpack_from(data, _ARRIVALS_AT + n * _ARRIVAL.size) for n in range(count)]
    end = file_of(file.parent, static["rank"], ".end.json")
    fatal, fatal_frames = _read_fatal(file_of(file.parent, static["rank"], FATAL))
    ending = json.loads(end.read_text(encoding="utf-8")) if end.is_file() else {}
    return RankState(
        rank=static["rank"],
        world_size=static["world_size"],
        pid=static["pid"],
        host=static["host"],
        is_alive=alive.get(str(static["rank"]), _is_alive(static)),
        argv=static["argv"],
        cwd=static["cwd"],
        step=step,
        micro_batch=micro_batch,
        phase=PHASES[phase],
        phase_began=began,
        module=None if module == NONE else static["modules"][module],
        last_seen=last_seen,
        arrivals=[(static["parameters"][number], when) for number, when in arrivals],
        expected=static["parameters"],
        error=ending.get("error"),
        error_frames=ending.get("frames", []),
        ended=ending.get("time"),
        fatal=fatal,
        fatal_frames=fatal_frames,
    )


def _read_fatal(file: Path) -> tuple[str | None, list[list]]:
    """From what faulthandler writes when a signal ends a process: the name, and the main thread's frames.

    The main thread comes last, each thread with its innermost frame first.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    name = re.search(r"^Fatal Python error: (.+)$", text, re.MULTILINE)
    last = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    frames = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', last, re.MULTILINE)
    return (name[1] if name else None), [
        [place, int(line), function, linecache.getline(place, int(line)).strip()] for place, line, function in frames
    ]


def process_started(pid: int) -> str | None:
    """When it began, in ticks since boot: tells a process from a later one of the same number. None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(static: dict) -> bool | None:
    if static["host"] != socket.gethostname():
        return None
    return process_started(static["pid"]) == static["process_started"]


def file_of(folder: Path, rank: int, ending: str) -> Path:
    """A rank's file of that kind in a run's watchdog folder."""
    return folder / f"rank_{rank:05}{ending}"
