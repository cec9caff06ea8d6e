"""The place where a rank is, kept as it goes in two small files of its own: a killed or hanging process leaves them.

The mapping is shared, so that the kernel keeps what was written whatever becomes of the process. Ranks do not speak to
each other for it. `rank_state` reads it.
"""

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.delta_hook import DeltaHook
from sat_lora.watchdog.places import PACKAGE
from sat_lora.watchdog.rank_files import (
    ARRIVAL,
    ARRIVALS_AT,
    COUNT,
    MICRO_BATCH,
    MODULE,
    NCCL_DUMP,
    NONE,
    NUMBERS,
    NUMBERS_AT,
    PHASE,
    PHASES,
    STEP,
    TIMES,
    file_of,
    folder_of,
    process_started,
)

REMEMBERED = 50  # durations of a phase, of which the longest counts: a slow first step is forgotten


_dumps: set[str] = set()
"""The places where traces of this process have let NCCL write."""


class Trace:
    """The trace of this rank: its phase, the last module entered, and the gradients that have arrived.

    run: the run's folder. model: its modules get hooks that note the last one entered, its trainable parameters hooks
    that note the arrival of their gradients; an empty module until there is a model (see `attach`). Raises OSError
    where the files cannot be made.
    """

    def __init__(self, run: str | Path, model: nn.Module, *, rank: int, world_size: int):
        self.folder = folder_of(run)
        self.rank = rank
        self.world_size = world_size
        self.folder.mkdir(parents=True, exist_ok=True)
        dump = str(self.folder.resolve() / NCCL_DUMP)
        for variable in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # its new and its old name
            if os.environ.get(variable) in (None, *_dumps):  # what the user has said stays
                os.environ[variable] = dump
        _dumps.add(dump)
        self._hooks: list[Callable[[], None]] = []
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Follow this model from now on, in files made anew: it was not there yet when the rank began.

        Raises OSError where the files cannot be made.
        """
        self.detach()
        rank = self.rank
        world_size = self.world_size
        # A new file: the watchdog's thread may be writing into the mapping of the old one.
        file_of(self.folder, rank, ".state").unlink(missing_ok=True)
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
            package=PACKAGE,
            modules=modules,
            parameters=parameters,
        )
        self._most = 2 * len(parameters)  # one that arrives twice is a fault, and seen
        size = ARRIVALS_AT + self._most * ARRIVAL.size
        files = [file_of(self.folder, rank, ending) for ending in (".json", ".state")]
        try:
            files[0].write_text(json.dumps(static), encoding="utf-8")
            with open(files[1], "w+b") as file:
                allocate(file.fileno(), size)
                self._memory = mmap.mmap(file.fileno(), size)
        except OSError:
            for path in files:  # half of them would be read as a rank that says nothing
                path.unlink(missing_ok=True)
            raise
        self._numbers = memoryview(self._memory)[NUMBERS_AT : NUMBERS_AT + NUMBERS.size].cast("I")
        self._numbers[MODULE] = NONE
        self._phases = 0
        self.durations: dict[str, deque[float]] = {phase: deque(maxlen=REMEMBERED) for phase in PHASES}
        self._began = time.perf_counter()
        self.at(PHASES[0])
        for number, module in enumerate(model.modules()):
            # Those with a matrix of their own, adapters aside, whose layers stand for them: every hook costs two
            # microseconds. What only holds modules is soon in one of them, and a norm is over before anyone waits.
            own = module.parameters(recurse=False)
            if any(parameter.dim() > 1 for parameter in own) and not isinstance(module, LoraAdapter):
                self._follow_entries(module, number)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for number, parameter in enumerate(trained):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self.arrival(number)).remove)

    def detach(self) -> None:
        """Follow the model no longer: its hooks are as they were before. A second call changes nothing."""
        for remove in self._hooks:
            remove()
        self._hooks.clear()

    def _follow_entries(self, module: nn.Module, number: int) -> None:
        """Note when the module of that number is entered: it runs for each of them in every pass, so as cheaply as
        may be.
        """
        note = partial(self._numbers.__setitem__, MODULE, number)
        forward = vars(module).get("forward")
        if isinstance(forward, DeltaHook):
            forward.on_entry = note
            self._hooks.append(partial(setattr, forward, "on_entry", None))
        else:
            self._hooks.append(module.register_forward_pre_hook(lambda module, args: note()).remove)

    @property
    def phase(self) -> str:
        """The present phase, one of PHASES."""
        return PHASES[self._numbers[PHASE]]

    @property
    def signs(self) -> tuple[int, int, int]:
        """The phases begun, the last module and the gradients so far: they differ whenever there was a sign of life."""
        return self._phases, self._numbers[MODULE], self._numbers[COUNT]

    def seen_alive(self) -> None:
        """Write down that the watchdog has seen a new sign of life."""
        struct.pack_into("<d", self._memory, 8, time.time())

    def follow(self, engine) -> None:
        """Note DeepSpeed's reduction after a backward pass as a phase of its own. engine: the one of this model."""
        reduce = engine.allreduce_gradients

        def traced(*args, **kwargs):
            self.at("reduce")
            return reduce(*args, **kwargs)

        engine.allreduce_gradients = traced

    def at(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        """Write down that a phase begins. step: counted from 1. micro_batch: within the step, from 0. None:
        as before. Raises ConfigError for what is none of PHASES.
        """
        if phase not in self.durations:
            raise ConfigError(f"a phase {phase!r} is not known; wanted one of {', '.join(PHASES)}")
        now = time.perf_counter()
        numbers = self._numbers
        self.durations[self.phase].append(now - self._began)
        self._began = now
        self._phases += 1
        if step is not None:
            numbers[STEP] = step
        if micro_batch is not None:
            numbers[MICRO_BATCH] = micro_batch
        if phase in ("data", "forward"):
            numbers[COUNT] = 0  # what has arrived belongs to an earlier micro-batch
        numbers[PHASE] = PHASES.index(phase)
        TIMES.pack_into(self._memory, 0, time.time(), time.time())

    @contextmanager
    def told(self) -> Iterator[None]:
        """Write down how the block ends, and let its error go on."""
        try:
            yield
        except BaseException as error:
            self._write_end(f"{type(error).__name__}: {error}", error)
            raise
        self._write_end(None, None)

    def _write_end(self, text: str | None, error: BaseException | None) -> None:
        """Write down the error that the rank ends with, and its stack; both are None for a good end."""
        import traceback

        frames = [] if error is None else traceback.extract_tb(error.__traceback__)
        places = [[frame.filename, frame.lineno, frame.name, frame.line] for frame in reversed(frames)]
        content = dict(error=text, frames=places, time=time.time())
        with contextlib.suppress(OSError):  # the folder is gone, or the disk full: no reason to hide how the run ended
            file_of(self.folder, self.rank, ".end.json").write_text(json.dumps(content), encoding="utf-8")

    def arrival(self, number: int) -> Callable[[object], None]:
        """Return a hook that notes the gradient of the parameter of that number, as cheaply as may be."""
        # Names of its own: each is looked up for every gradient of every pass.
        numbers = self._numbers
        memory = self._memory
        most = self._most
        put = ARRIVAL.pack_into
        size = ARRIVAL.size
        now = time.time

        def arrived(parameter: object) -> None:
            count = numbers[COUNT]
            if count < most:
                put(memory, ARRIVALS_AT + count * size, number, now())
                numbers[COUNT] = count + 1

        return arrived


def allocate(descriptor: int, size: int) -> None:
    """Give the file `size` bytes of zeros that are on the disk. Raises OSError where it is full.

    A mapped file that is merely long takes its place when it is written to, and a full disk is a bus error then.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        written = 0  # a file system that cannot allocate
        while written < size:
            written += os.pwrite(descriptor, bytes(size - written), written)
        os.fsync(descriptor)
