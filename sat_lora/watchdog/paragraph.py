"""A verdict in words: who stopped where, what the others do, the likely cause and what to do."""

import time
from collections.abc import Sequence

from sat_lora.findings.codes import CODES
from sat_lora.findings.finding import Finding
from sat_lora.watchdog.evidence import Rank
from sat_lora.watchdog.nccl_log import LoggedTimeout
from sat_lora.watchdog.places import Place


def paragraph(finding: Finding, ranks: Sequence[Rank], timeouts: Sequence[LoggedTimeout]) -> str:
    """Return the verdict as one paragraph: the finding, where each rank is, the likely cause and what to do.

    timeouts: of the logs, told as well.
    """
    guilty = [rank for rank in ranks if rank.number in finding.ranks]
    sentences = [f"{_capital(finding.seen)}."]
    sentences += [f"Rank {rank.number} stopped {_where(rank)}." for rank in guilty]
    numbers_by_state: dict[str, list[int]] = {}
    for rank in ranks:
        if rank not in guilty:
            numbers_by_state.setdefault(_doing(rank), []).append(rank.number)
    sentences += [f"{_capital(_numbers(numbers))} {state}." for state, numbers in numbers_by_state.items()]
    if guilty and guilty[0].state.phase == "backward" and finding.code != "gradients-differ":
        sentences += _lacking(guilty[0], ranks)
    sentences += [f"{timeout.words}." for timeout in timeouts]
    code = CODES[finding.code]
    sentences.append(
        f"Likely cause: {code.why}. What to do: {finding.fix or code.fix} (docs/doctor.md#{finding.code})."
    )
    return " ".join(sentences)


def _where(rank: Rank) -> str:
    """Return the phase, step and time of a rank, with the last module and gradient, as a clause."""
    state = rank.state
    text = f"{_clock(state.last_sign)} {_moment(rank)}"
    if state.module and state.phase in ("forward", "backward", "evaluate"):
        text += f"; the last module that it entered is {state.module}"
    if state.phase in ("backward", "reduce") and state.arrivals:
        text += f"; {len(state.arrivals)} of {len(state.expected)} gradients had come, the last {state.arrivals[-1][0]}"
    return text


def _moment(rank: Rank) -> str:
    return f"in phase {rank.state.phase} of step {rank.state.step}"


def last_seen(rank: Rank) -> str:
    """Return a rank's number, phase and step, and the time of its last sign, as a clause."""
    return f"rank {rank.number}: {_moment(rank)}, last seen {_clock(rank.state.last_sign)}"


def _doing(rank: Rank) -> str:
    if rank.state.error is not None:
        return f"ended {_moment(rank)} with {rank.state.error}"
    if not rank.has_testified:
        return f"was {_moment(rank)} when last heard of"
    if rank.waits:
        return f"waits {_moment(rank)}, in {place_words(rank.place)}"
    return f"is {_moment(rank)}, in {place_words(rank.place)}"


def _lacking(rank: Rank, ranks: Sequence[Rank]) -> list[str]:
    """Return, in a list, the sentence on what others got in the same micro-batch, and this one did not."""
    arrived = {name for name, _ in rank.state.arrivals}
    for other in ranks:
        same = (other.state.step, other.state.micro_batch) == (rank.state.step, rank.state.micro_batch)
        lacking = [name for name, _ in other.state.arrivals if name not in arrived]
        if same and lacking:
            return [
                f"{len(lacking)} gradients came on rank {other.number} and not on rank {rank.number}, "
                f"first {lacking[0]}"
            ]
    return []


def place_words(place: Place | None) -> str:
    """Return a place as a clause, also where there is none."""
    return place.words if place else "code without a Python stack"


def _numbers(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _clock(when: float) -> str:
    return time.strftime("at %H:%M:%S", time.localtime(when))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
