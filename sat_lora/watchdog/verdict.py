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

from sat_lora.findings.codes import CODES
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
_OUT_OF_MEMORY = r"OutOfMemoryError|out of memory|can't allocate memory|^MemoryError"
_SHOWN = 3  # names of gradients


@dataclass(frozen=True)
class Verdict:
    """Why a run stopped, as a finding and in words."""

    finding: Finding | None
    """What is wrong with the run, None if nothing is."""
    text: str
    """One paragraph."""


def verdict(run: str | Path, logs: Sequence[str | Path] = ()) -> Verdict:
    """Return why a run stopped, by the first rule that fits.

    logs: files with what the ranks printed, for NCCL's lines. Raises ConfigError as `read_ranks` does, and if a log is
    missing.
    """
    ranks = read_ranks(run)
    timeouts = read_timeouts(logs)
    for rule in (_failed, _gradients, _aborted, _gone, _left_behind, _stuck, _different_collectives, _hang):
        finding = rule(ranks)
        if finding is not None:
            return Verdict(finding, paragraph(finding, ranks, timeouts))
    common_error = next((rank.state.error for rank in ranks if rank.state.error is not None), None)
    if common_error is not None:
        return Verdict(None, f"No rank is at fault: all were told to end by {common_error}")
    ended = all(rank.state.ended for rank in ranks)
    state = f"has ended well after step {ranks[0].state.step}" if ended else "goes on"
    steps = ", ".join(last_seen(rank) for rank in ranks)
    return Verdict(None, f"Nothing is wrong: the run {state}. {steps}.")


# The rules


def _failed(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on the first exception of a rank's own; None if there is none.

    It is none that says that another rank left, or sent something else.
    """
    failed = [
        rank for rank in _with_errors(ranks) if not re.search(_FROM_OTHERS, rank.state.error or "", re.IGNORECASE)
    ]
    if not failed:
        return None
    first = min(failed, key=lambda rank: math.inf if rank.state.ended is None else rank.state.ended)
    place = own_place(first.state.error_places)
    seen = f"rank {first.number} was ended by {first.state.error}" + (f" in {place.words}" if place else "")
    # Of memory there is something better to say than that it failed.
    fix = CODES["memory"].fix if re.search(_OUT_OF_MEMORY, first.state.error or "") else None
    return _finding("rank-failed", seen, [first], file=place.file if place else None, fix=fix)


def _aborted(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on a rank that torch ended because another one sent what it did not expect; else None."""
    for rank in ranks:
        state = rank.state
        if state.error is not None and re.search(_MISMATCH, state.error, re.IGNORECASE):
            seen = f"rank {rank.number} was ended by {state.error}"
        elif state.fatal == "Aborted" and Thread("", True, state.fatal_places).waits_in_collective:
            seen = f"rank {rank.number} was aborted in a collective, in {place_words(own_place(state.fatal_places))}"
        else:
            continue
        return _finding("collectives-differ", f"{seen}: another rank sent what it did not expect", [rank])
    return None


def _gone(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on ranks that are not there any more, or never were; None if all are there."""
    gone = [
        rank for rank in ranks if rank.state.is_alive is False and rank.state.ended is None and not rank.has_testified
    ]
    present = {rank.number for rank in ranks}
    missing = [number for number in range(ranks[0].state.world_size) if number not in present]
    if gone:
        seen = "; ".join(_obituary(rank) for rank in gone)
        return _finding("rank-gone", seen, gone)
    if missing and any(rank.has_testified for rank in ranks):
        seen = f"rank {', '.join(map(str, missing))} never came as far as the first step, or left no file here"
        return Finding(code="rank-gone", seen=seen, ranks=tuple(missing))
    return None


def _obituary(rank: Rank) -> str:
    text = f"rank {rank.number} (process {rank.state.pid} on {rank.state.host}) is gone"
    if rank.state.fatal is None:
        return text
    return f"{text}: {rank.state.fatal} in {place_words(own_place(rank.state.fatal_places))}"


def _left_behind(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on errors that only say that another rank has left, where that one left nothing; else None."""
    failed = _with_errors(ranks)
    if not failed:
        return None
    return _finding("rank-failed", f"rank {failed[0].number} was ended by {failed[0].state.error}", failed[:1])


def _with_errors(ranks: Sequence[Rank]) -> list[Rank]:
    return [rank for rank in ranks if rank.state.error is not None and not _is_wish(rank.state.error)]


def _stuck(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on ranks in code of their own, where the others wait in a collective; else None.

    Of a rank that is alone it is anywhere.
    """
    heard = [rank for rank in ranks if rank.has_testified]
    mute = [rank for rank in ranks if not rank.has_testified and rank.state.ended is None]
    busy = [rank for rank in heard if not rank.waits]
    if heard and mute and len(busy) < len(heard):
        seen = f"rank {mute[0].number} lives and does not answer: its interpreter is stuck as a whole"
        return _finding("stuck-in-code", seen, mute[:1], module=mute[0].state.module)
    if not busy or (len(busy) == len(ranks) > 1 and len({place_words(rank.place) for rank in busy}) == 1):
        return None
    first = min(busy, key=lambda rank: (rank.state.step, rank.state.last_sign))
    code = "stuck-in-data" if first.state.phase == "data" else "stuck-in-code"
    seen = f"rank {first.number} is in {place_words(first.place)}"
    file = first.place.file if first.place else None
    module = None if code == "stuck-in-data" else first.state.module
    return _finding(code, seen, [first], file=file, module=module)


def _gradients(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on ranks of one micro-batch of which one lacks a gradient, or has another order; else None."""
    within = [rank for rank in ranks if rank.state.phase in ("backward", "reduce", "optimizer") and rank.state.arrivals]
    moment = max(((rank.state.step, rank.state.micro_batch) for rank in within), default=None)
    within = [rank for rank in within if (rank.state.step, rank.state.micro_batch) == moment]
    names = {rank.number: [name for name, _ in rank.state.arrivals] for rank in within}
    for rank in within:
        for other in within:
            own_names = names[rank.number]
            other_names = names[other.number]
            common = (
                [name for name in own_names if name in {*other_names}],
                [name for name in other_names if name in {*own_names}],
            )
            if common[0] != common[1]:
                place = next(n for n, pair in enumerate(zip(*common)) if pair[0] != pair[1])
                seen = (
                    f"gradient {place + 1} to arrive was that of {common[0][place]} on rank {rank.number} and of "
                    f"{common[1][place]} on rank {other.number}"
                )
                return _finding("gradients-differ", seen, [rank, other], parameter=common[0][place])
            lacking = [name for name in other_names if name not in {*own_names}]
            passed = own_names and other_names and lacking and _went_on(lacking, own_names, other_names)
            if lacking and (rank.state.phase != "backward" or passed):
                seen = (
                    f"{len(lacking)} gradients arrived on rank {other.number} and not on rank {rank.number}: "
                    + ", ".join(lacking[:_SHOWN])
                    + (", ..." if len(lacking) > _SHOWN else "")
                )
                return _finding("gradients-differ", seen, [rank], parameter=lacking[0])
    return None


def _went_on(lacking: list[str], names: list[str], other_names: list[str]) -> bool:
    """Return whether a gradient has come to `names` that comes later in `other_names` than one that is lacking."""
    shared = (name for name in names if name in other_names)
    return max(map(other_names.index, shared), default=-1) > other_names.index(lacking[0])


def _different_collectives(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on ranks in different collectives; None if they are not.

    By torch's flight recorder it is, of each group, the first that differs; else the lines that the ranks are at tell.
    """
    recorded = _first_difference(ranks)
    if recorded is not None:
        rank, other, number, group, own_words, other_words = recorded
        seen = (
            f"collective {number} of group {group} is {own_words} on rank {rank.number} and {other_words} on rank "
            f"{other.number}"
        )
        return _finding("collectives-differ", seen, [rank, other])
    waiting = [rank for rank in ranks if rank.waits]
    places = {place_words(rank.place): rank for rank in waiting}
    if len(places) < 2:
        return None
    seen = "; ".join(f"rank {rank.number} waits in {place}" for place, rank in places.items())
    alone = [rank for rank in waiting if rank.collectives and _has_called_alone(rank, waiting)]
    if alone and len(alone) < len(waiting):
        seen += f"; no other rank has made the call that rank {alone[0].number} is in"
        return _finding("collectives-differ", seen, alone)
    return _finding("collectives-differ", seen, list(places.values()))


def _has_called_alone(rank: Rank, ranks: Sequence[Rank]) -> bool:
    """Return whether no other rank has made a collective at this one's line, as far as the recorder goes back."""
    others = {
        (c.place.file, c.place.line) for other in ranks if other is not rank for c in other.collectives if c.place
    }
    return rank.place is not None and (rank.place.file, rank.place.line) not in others


def _first_difference(ranks: Sequence[Rank]):
    """Return the earliest collective that two ranks of a group made otherwise; None if there is none.

    It is (rank, other rank, number, group, the rank's collective in words, the other's).
    """
    made = {rank.number: {(c.group, c.number): c for c in rank.collectives} for rank in ranks}
    for rank in ranks:
        for other in ranks[: ranks.index(rank)]:
            for key in sorted(made[rank.number].keys() & made[other.number].keys()):
                collective = made[rank.number][key]
                other_collective = made[other.number][key]
                if (collective.operation, collective.sizes) != (other_collective.operation, other_collective.sizes):
                    return rank, other, key[1], key[0], collective.words, other_collective.words
    return None


def _hang(ranks: Sequence[Rank]) -> Finding | None:
    """Return the finding on the rank that stopped first, of ranks that all wait; None if none has testified."""
    heard = [rank for rank in ranks if rank.has_testified]
    if not heard:
        return None
    last = min(heard, key=lambda rank: rank.state.last_sign)
    return _finding("hang", f"all ranks wait; rank {last.number} stopped first, in {place_words(last.place)}", [last])


def _finding(code: str, seen: str, ranks: Sequence[Rank], **where) -> Finding:
    return Finding(code=code, seen=seen, ranks=tuple(sorted(rank.number for rank in ranks)), **where)


def _is_wish(error: str) -> bool:
    """Return whether an error is a stop that was asked for, or a mistake that every rank was told of."""
    return error.startswith(("Stopped:", "KeyboardInterrupt", "ConfigError", "TrainingError", "DataError"))
