"""Why a run stopped: from what its ranks have left in RUN/watchdog, in one paragraph.

The rules, first that fits: a rank was ended by an exception of its own; gradients arrived on some ranks and not on
others; torch ended a rank over what another one sent; a rank is gone; a rank is in code of its own while others wait
in a collective; ranks are in different collectives. Otherwise all wait for something that the files do not show.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sat_lora.findings.finding import Finding
from sat_lora.watchdog.evidence import Rank, read_ranks
from sat_lora.watchdog.nccl_log import read_timeouts
from sat_lora.watchdog.paragraph import last_seen, paragraph, place_words
from sat_lora.watchdog.places import own_place
from sat_lora.watchdog.testimony import Thread

# What a rank says when another one has left it, or made another collective.
_MISMATCH = r"mismatch between collectives|collective mismatch|preamble"
_FROM_OTHERS = (
    _MISMATCH + r"|connection (closed|reset|refused|was)|broken pipe|socket|remote process|NCCL (communicator|error)|"
    r"timed? ?out|heartbeat|store|rendezvous"
)
_SHOWN = 3  # names of gradients


@dataclass(frozen=True)
class Verdict:
    finding: Finding | None
    """None: nothing is wrong with the run."""
    text: str
    """One paragraph."""


def verdict(run: str | Path, logs: Sequence[str | Path] = ()) -> Verdict:
    """logs: files with what the ranks printed, for NCCL's lines. ConfigError: as `read_ranks`; a log is missing."""
    ranks = read_ranks(run)
    timeouts = read_timeouts(logs)
    for rule in (_failed, _gradients, _aborted, _gone, _left_behind, _stuck, _different_collectives, _hang):
        found = rule(ranks)
        if found is not None:
            return Verdict(found, paragraph(found, ranks, timeouts))
    told = next((one.state.error for one in ranks if one.state.error is not None), None)
    if told is not None:
        return Verdict(None, f"No rank is at fault: all were told to end by {told}")
    ended = all(one.state.ended for one in ranks)
    words = f"has ended well after step {ranks[0].state.step}" if ended else "goes on"
    steps = ", ".join(last_seen(one) for one in ranks)
    return Verdict(None, f"Nothing is wrong: the run {words}. {steps}.")


# The rules


def _failed(ranks: Sequence[Rank]) -> Finding | None:
    """The first exception of a rank's own: not one that says that another rank left, or sent something else."""
    own = [one for one in _with_errors(ranks) if not re.search(_FROM_OTHERS, one.state.error or "", re.IGNORECASE)]
    if not own:
        return None
    first = min(own, key=lambda one: math.inf if one.state.ended is None else one.state.ended)
    place = own_place(first.state.error_places)
    seen = f"rank {first.number} was ended by {first.state.error}" + (f" in {place.words}" if place else "")
    return _finding("rank-failed", seen, [first], file=place.file if place else None)


def _aborted(ranks: Sequence[Rank]) -> Finding | None:
    """A rank that torch ended, by an error or a signal, because another one sent what it did not expect."""
    for one in ranks:
        state = one.state
        if state.error is not None and re.search(_MISMATCH, state.error, re.IGNORECASE):
            seen = f"rank {one.number} was ended by {state.error}"
        elif state.fatal == "Aborted" and Thread("", True, state.fatal_places).waits_in_collective:
            seen = f"rank {one.number} was aborted in a collective, in {place_words(own_place(state.fatal_places))}"
        else:
            continue
        return _finding("collectives-differ", f"{seen}: another rank sent what it did not expect", [one])
    return None


def _gone(ranks: Sequence[Rank]) -> Finding | None:
    gone = [one for one in ranks if one.state.is_alive is False and one.state.ended is None and not one.has_testified]
    present = {one.number for one in ranks}
    missing = [number for number in range(ranks[0].state.world_size) if number not in present]
    if gone:
        seen = "; ".join(_obituary(one) for one in gone)
        return _finding("rank-gone", seen, gone)
    if missing and any(one.has_testified for one in ranks):
        seen = f"rank {', '.join(map(str, missing))} never came as far as the first step, or left no file here"
        return Finding(code="rank-gone", seen=seen, ranks=tuple(missing))
    return None


def _obituary(one: Rank) -> str:
    words = f"rank {one.number} (process {one.state.pid} on {one.state.host}) is gone"
    if one.state.fatal is None:
        return words
    return f"{words}: {one.state.fatal} in {place_words(own_place(one.state.fatal_places))}"


def _left_behind(ranks: Sequence[Rank]) -> Finding | None:
    """Errors that only say that another rank has left, where that rank left nothing."""
    failed = _with_errors(ranks)
    if not failed:
        return None
    return _finding("rank-failed", f"rank {failed[0].number} was ended by {failed[0].state.error}", failed[:1])


def _with_errors(ranks: Sequence[Rank]) -> list[Rank]:
    return [one for one in ranks if one.state.error is not None and not _is_wish(one.state.error)]


def _stuck(ranks: Sequence[Rank]) -> Finding | None:
    """Ranks in code of their own, where the others wait in a collective; alone, a rank that is anywhere."""
    heard = [one for one in ranks if one.has_testified]
    mute = [one for one in ranks if not one.has_testified and one.state.ended is None]
    busy = [one for one in heard if not one.waits]
    if heard and mute and len(busy) < len(heard):
        seen = f"rank {mute[0].number} lives and does not answer: its interpreter is stuck as a whole"
        return _finding("stuck-in-code", seen, mute[:1], module=mute[0].state.module)
    if not busy or (len(busy) == len(ranks) > 1 and len({place_words(one.place) for one in busy}) == 1):
        return None
    first = min(busy, key=lambda one: (one.state.step, one.state.last_sign))
    code = "stuck-in-data" if first.state.phase == "data" else "stuck-in-code"
    seen = f"rank {first.number} is in {place_words(first.place)}"
    file = first.place.file if first.place else None
    module = None if code == "stuck-in-data" else first.state.module
    return _finding(code, seen, [first], file=file, module=module)


def _gradients(ranks: Sequence[Rank]) -> Finding | None:
    """Ranks at one micro-batch of which one lacks a gradient, or has them in another order."""
    within = [one for one in ranks if one.state.phase in ("backward", "reduce", "optimizer") and one.state.arrivals]
    moment = max(((one.state.step, one.state.micro_batch) for one in within), default=None)
    within = [one for one in within if (one.state.step, one.state.micro_batch) == moment]
    names = {one.number: [name for name, _ in one.state.arrivals] for one in within}
    for one in within:
        for other in within:
            mine = names[one.number]
            theirs = names[other.number]
            common = [name for name in mine if name in {*theirs}], [name for name in theirs if name in {*mine}]
            if common[0] != common[1]:
                place = next(n for n, pair in enumerate(zip(*common)) if pair[0] != pair[1])
                seen = (
                    f"gradient {place + 1} to arrive was that of {common[0][place]} on rank {one.number} and of "
                    f"{common[1][place]} on rank {other.number}"
                )
                return _finding("gradients-differ", seen, [one, other], parameter=common[0][place])
            lacking = [name for name in theirs if name not in {*mine}]
            passed = mine and theirs and lacking and _went_on(lacking, mine, theirs)
            if lacking and (one.state.phase != "backward" or passed):
                seen = (
                    f"{len(lacking)} gradients arrived on rank {other.number} and not on rank {one.number}: "
                    + ", ".join(lacking[:_SHOWN])
                    + (", ..." if len(lacking) > _SHOWN else "")
                )
                return _finding("gradients-differ", seen, [one], parameter=lacking[0])
    return None


def _went_on(lacking: list[str], mine: list[str], theirs: list[str]) -> bool:
    """Whether a gradient has come here that comes later there than one that is lacking."""
    return max(map(theirs.index, (name for name in mine if name in theirs)), default=-1) > theirs.index(lacking[0])


def _different_collectives(ranks: Sequence[Rank]) -> Finding | None:
    """By torch's flight recorder, of each group the first that differs; else by the lines that the ranks are at."""
    recorded = _first_difference(ranks)
    if recorded is not None:
        one, other, number, group, mine, theirs = recorded
        seen = (
            f"collective {number} of group {group} is {mine} on rank {one.number} and {theirs} on rank {other.number}"
        )
        return _finding("collectives-differ", seen, [one, other])
    waiting = [one for one in ranks if one.waits]
    places = {place_words(one.place): one for one in waiting}
    if len(places) < 2:
        return None
    seen = "; ".join(f"rank {one.number} waits in {words}" for words, one in places.items())
    alone = [one for one in waiting if one.collectives and _has_called_alone(one, waiting)]
    if alone and len(alone) < len(waiting):
        seen += f"; no other rank has made the call that rank {alone[0].number} is in"
        return _finding("collectives-differ", seen, alone)
    return _finding("collectives-differ", seen, list(places.values()))


def _has_called_alone(one: Rank, ranks: Sequence[Rank]) -> bool:
    """Whether the line that it waits at made a collective on no other rank, as far as the flight recorder goes back."""
    others = {(c.place.file, c.place.line) for other in ranks if other is not one for c in other.collectives if c.place}
    return one.place is not None and (one.place.file, one.place.line) not in others


def _first_difference(ranks: Sequence[Rank]):
    """(rank, other, number, group, words, words): the earliest collective that two ranks of a group made otherwise."""
    made = {one.number: {(c.group, c.number): c for c in one.collectives} for one in ranks}
    for one in ranks:
        for other in ranks[: ranks.index(one)]:
            for key in sorted(made[one.number].keys() & made[other.number].keys()):
                mine = made[one.number][key]
                theirs = made[other.number][key]
                if (mine.operation, mine.sizes) != (theirs.operation, theirs.sizes):
                    return one, other, key[1], key[0], mine.words, theirs.words
    return None


def _hang(ranks: Sequence[Rank]) -> Finding | None:
    heard = [one for one in ranks if one.has_testified]
    if not heard:
        return None
    last = min(heard, key=lambda one: one.state.last_sign)
    return _finding("hang", f"all ranks wait; rank {last.number} stopped first, in {place_words(last.place)}", [last])


def _finding(code: str, seen: str, ranks: Sequence[Rank], **where) -> Finding:
    return Finding(code=code, seen=seen, ranks=tuple(sorted(one.number for one in ranks)), **where)


def _is_wish(error: str) -> bool:
    """A stop that was asked for, or a mistake that every rank was told of: no fault of one rank."""
    return error.startswith(("Stopped:", "KeyboardInterrupt", "ConfigError", "TrainingError", "DataError"))
