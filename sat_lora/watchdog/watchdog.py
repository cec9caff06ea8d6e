"""Ends a run that hangs, with a verdict, instead of letting it wait for ever: from the first look at its options and
data to its last evaluation.

A thread of every rank looks at that rank's `Trace`. Without a sign of life for longer than the phase may last, it says
so in a file, which the other ranks' threads see; all write down where they are, one of them reads what all have
written, tells the verdict, and all exit.
"""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from sat_lora.files.atomic import replace_text
from sat_lora.parallel.distributed import gather_lists
from sat_lora.parallel.launch import sat_lora_line
from sat_lora.terminal.notice import logger
from sat_lora.watchdog.rank_files import ALARM, FATAL, OUTSIDE_OF_STEPS, VERDICT, file_of, folder_of
from sat_lora.watchdog.rank_state import note_who_lives, read_states
from sat_lora.watchdog.testimony import has_testified, testify
from sat_lora.watchdog.trace import Trace

STATUS = 3  # of a process that the watchdog has ended
FACTOR = 10  # of the longest that a phase has taken of late
FIRST = 5  # times the least, while a phase has hardly been seen
SEEN = 3  # durations before a phase is known
WORK_OF_ONE = (*OUTSIDE_OF_STEPS, "evaluate", "save")  # phases that a rank may be in while the others wait for it
IDLE_PAGES = 64  # that a process touches at most between two looks while it only waits
GRACE = 5.0  # seconds for all ranks to say where they are


class Watchdog:
    """A context in which a thread watches the rank's trace.

    least: seconds without a sign of life below which nothing is ever wrong. A phase may take ten times the longest
    that it has taken in its last 50 turns, and five times `least` at first.
    """

    def __init__(self, trace: Trace, least: float):
        self.trace = trace
        self.least = least
        self.tick = min(1.0, least / 4)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sat_lora watchdog", daemon=True)
        self._fallback: TextIO | None = None
        self._fatal: TextIO | None = None

    def __enter__(self) -> "Watchdog":
        # A rank whose interpreter is stuck as a whole cannot run this thread: faulthandler's own then writes stacks.
        self._fallback = self._opened(".stuck.txt")
        if not faulthandler.is_enabled():
            self._fatal = self._opened(FATAL)
            if self._fatal is not None:
                faulthandler.enable(self._fatal)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._fallback is not None:
            self._fallback.close()
        if self._fatal is not None:
            faulthandler.disable()
            self._fatal.close()

    def _opened(self, ending: str) -> TextIO | None:
        """Return the file to write to; None if the disk is full, and the watchdog goes without this file."""
        try:
            return open(file_of(self.trace.folder, self.trace.rank, ending), "w")
        except OSError:
            return None

    def limit(self, phase: str) -> float:
        """Return the seconds that a phase may go without a sign of life."""
        durations = self.trace.durations[phase]
        if len(durations) < SEEN:
            return FIRST * self.least
        return max(self.least, FACTOR * max(durations))

    def _watch(self) -> None:
        signs = self.trace.signs
        since = time.monotonic()
        looked = time.monotonic()
        touched = _pages_touched()
        while not self._done.wait(self.tick):
            now = time.monotonic()
            slept = now - looked > 5 * self.tick + 5  # the whole process was stopped, and its clock ran on
            before = touched
            touched = _pages_touched()
            # Whoever reads weights touches memory, whoever waits for others does not.
            works = self.trace.phase in OUTSIDE_OF_STEPS and touched - before > IDLE_PAGES
            if self.trace.signs != signs or slept or works:
                signs = self.trace.signs
                since = now
                self.trace.seen_alive()
            looked = now
            phase = self.trace.phase
            limit = self.limit(phase)
            if self._fallback is not None:
                faulthandler.dump_traceback_later(limit + 10 * self.tick, file=self._fallback)
            expired = now - since > limit and not self._others_work(limit)
            if expired or (self.trace.folder / ALARM).exists():
                self._end(dict(rank=self.trace.rank, phase=phase, waited=now - since, limit=limit))

    def _others_work(self, limit: float) -> bool:
        """Return whether another rank has given a sign of life of late, where one may work for longer than one waits:
        outside of steps, and wherever that one loads, evaluates or writes while this one waits for it.
        """
        try:
            states = read_states(self.trace.folder.parent)
        except (OSError, ValueError):
            return False
        since = time.time() - limit
        working = [s for s in states if s.last_sign > since and s.rank != self.trace.rank and not s.ended]
        is_outside = self.trace.phase in OUTSIDE_OF_STEPS
        return any(is_outside or state.phase in WORK_OF_ONE for state in working)

    def _end(self, alarm: dict) -> None:
        """Write down where this rank is and end the process; it does not come back."""
        try:
            speaks = _create(self.trace.folder / ALARM, json.dumps(alarm))
            testify(self.trace.folder, self.trace.rank)
            if speaks:
                self._speak(alarm)
            else:
                self._wait_for(lambda: (self.trace.folder / VERDICT).exists(), 2 * GRACE)
        except Exception:  # the process ends all the same, and this is its last word
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(STATUS)

    def _speak(self, alarm: dict) -> None:
        from sat_lora.watchdog.verdict import verdict  # not needed by a run that is well

        self._wait_for(self._all_have_testified, GRACE)
        run = self.trace.folder.parent
        note_who_lives(run)
        text = verdict(run).text
        intro = f"rank {alarm['rank']} gave no sign of life for {alarm['waited']:.0f} s in phase {alarm['phase']}"
        text = f"watchdog: {intro} (limit {alarm['limit']:.0f} s)\n{text}\n"
        sys.stderr.write(f"\n{text}stacks in {self.trace.folder}; more: {sat_lora_line('doctor', '--run', run)}\n")
        sys.stderr.flush()
        replace_text(self.trace.folder / VERDICT, text)

    def _all_have_testified(self) -> bool:
        states = read_states(self.trace.folder.parent)
        running = [state.rank for state in states if state.is_alive is not False and state.ended is None]
        silent = [rank for rank in running if not has_testified(self.trace.folder, rank)]
        return len(states) == self.trace.world_size and not silent

    def _wait_for(self, condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not condition():
            time.sleep(0.1)


def _pages_touched() -> int:
    """Return how many pages of memory this process has touched for the first time, so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


@contextmanager
def watched_trace(trace: Trace | None, least: float) -> Iterator[None]:
    """Let a watchdog watch inside, and note in the trace how it ends; do nothing without a trace."""
    if trace is None:
        yield
        return
    with trace.told(), Watchdog(trace, least):
        yield


@contextmanager
def watched_alone(least: float) -> Iterator[Trace | None]:
    """Do as `watched_trace` for ranks without a run folder, and give the trace. Every rank has to call it.

    Its files lie in a folder of the machine's temporary ones, which goes when the block ends and stays when the
    watchdog ends it. A process alone has nobody to wait for: nothing watches it, and there is no trace.
    """
    rank = torch.distributed.get_rank()
    size = torch.distributed.get_world_size()
    named = [_temporary_folder()] if least and size > 1 and rank == 0 else []
    folder = next(iter(gather_lists(named)), None) if least and size > 1 else None
    if folder is None:
        yield None
        return
    trace = _trace_in(Path(folder), rank, size)
    is_well = False
    try:
        with watched_trace(trace, least):
            yield trace
        is_well = True
    finally:
        if is_well:
            gather_lists([])  # nobody looks into it any more
        if is_well or rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _temporary_folder() -> str | None:
    """Return a new folder for temporary files, or None where nothing can be written."""
    try:
        return tempfile.mkdtemp(prefix="sat_lora_")
    except OSError as error:
        logger.warning("no watchdog: there is no folder for temporary files: %s", error)
        return None


def _trace_in(folder: Path, rank: int, size: int) -> Trace | None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)  # on another machine
        return Trace(folder, nn.Module(), rank=rank, world_size=size)
    except OSError as error:
        logger.warning("rank %d is not watched: its files cannot be made in %s: %s", rank, folder, error)
        return None


def when_alarmed(run: str | Path) -> float | None:
    """Return when a rank was found without a sign of life, in seconds since the epoch; None if none was."""
    path = folder_of(run) / ALARM
    return path.stat().st_mtime if path.exists() else None


def _create(path: Path, text: str) -> bool:
    """Return whether this process is the one that made the file."""
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
        file.write(text)
        return True
    return False
