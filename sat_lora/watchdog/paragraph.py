"""A verdict in words: who stopped where, what the others do, the likely cause and what to do."""

import time
from collections.abc import Sequence

from sat_lora.findings.codes import CODES
from sat_lora.findings.finding import Finding
from sat_lora.watchdog.evidence import Rank
from sat_lora.watchdog.nccl_log import LoggedTimeout
from sat_lora.watchdog.places import Place


def paragraph(found: Finding, ranks: Sequence[Rank], timeouts: Sequence[LoggedTimeout]) -> str:
    guilty = [one for one in ranks if one.number in found.ranks]
    sentences = [f"{_capital(found.seen)}."]
    sentences += [f"Rank {one.number} stopped {_where(one)}." for one in guilty]
    others: dict[str, list[int]] = {}
    for one in ranks:
        if one not in guilty:
            others.setdefault(_doing(one), []).append(one.number)
    sentences += [f"{_capital(_numbers(numbers))} {words}." for words, numbers in others.items()]
    if guilty and guilty[0].state.phase == "backward" and found.code != "gradients-differ":
        sentences += _lacking(guilty[0], ranks)
    sentences += [f"{one.words}." for one in timeouts]
    code = CODES[found.code]
    sentences.append(f"Likely cause: {code.why}. What to do: {found.fix or code.fix} (docs/doctor.md#{found.code}).")
    return " ".join(sentences)


def _where(one: Rank) -> str:
    """Phase, step and time, with the last module and gradient."""
    state = one.state
    words = f"{_clock(state.last_sign)} {_moment(one)}"
    if state.module and state.phase in ("forward", "backward", "evaluate"):
        words += f"; the last module that it entered is {state.module}"
    if state.phase in ("backward", "reduce") and state.arrivals:
        words += (
            f"; {len(state.arrivals)} of {len(state.expected)} gradients had come, the last {state.arrivals[-1][0]}"
        )
    return words


def _moment(one: Rank) -> str:
    return f"in phase {one.state.phase} of step {one.state.step}"


def last_seen(one: Rank) -> str:
    return f"rank {one.number}: {_moment(one)}, last seen {_clock(one.state.last_sign)}"


def _doing(one: Rank) -> str:
    if one.state.error is not None:
        return f"ended {_moment(one)} with {one.state.error}"
    if not one.has_testified:
        return f"was {_moment(one)} when last heard of"
    if one.waits:
        return f"waits {_moment(one)}, in {place_words(one.place)}"
    return f"is {_moment(one)}, in {place_words(one.place)}"


def _lacking(one: Rank, ranks: Sequence[Rank]) -> list[str]:
    """What others got in the same micro-batch, and this one did not."""
    have = {name for name, _ in one.state.arrivals}
    for other in ranks:
        same = (other.state.step, other.state.micro_batch) == (one.state.step, one.state.micro_batch)
        lacking = [name for name, _ in other.state.arrivals if name not in have]
        if same and lacking:
            return [
                f"{len(lacking)} gradients came on rank {other.number} and not on rank {one.number}, first {lacking[0]}"
            ]
    return []


def place_words(place: Place | None) -> str:
    return place.words if place else "code without a Python stack"


def _numbers(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _clock(when: float) -> str:
    return time.strftime("at %H:%M:%S", time.localtime(when))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
