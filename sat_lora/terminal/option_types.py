"""What an option's text may be: types for argparse, whose errors say what was wanted."""

import argparse
import math
import re
from collections.abc import Callable

from sat_lora.printable import printable

LARGEST_RATE = 1e30
"""The largest learning rate, and factor of one: Adam's first step divides by 1 - beta, float32 ends at 3.4e38."""
_LOOK_ALIKES = str.maketrans("−–—‐‑，．٫×·％\u00a0\u202f", "-----,..xx%  ")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(\.\d{3})+")
_NUMBER = re.compile(r"\d*\.?\d+")
ROUNDING = 0.0015  # 0.333,0.333,0.333 are thirds


def number(
    kind: type, wanted: str, accepts: Callable[[float], bool] = lambda value: True, most: float = math.inf
) -> Callable[[str], float]:
    """Return an argparse type: a finite `kind`, `most` at most, that `accepts` takes.

    Its error says that another text was got and what was `wanted`.
    """

    def parse(text: str):
        try:
            value = kind(text)
            is_right = math.isfinite(value) and accepts(value)
        except ValueError:
            value = _whole(text) if kind is int else math.nan
            is_right = math.isfinite(value) and accepts(value)
        except OverflowError:  # of a whole number that no float holds
            is_right = False
        if not is_right:
            meant = _meant_number(text, whole=kind is int)
            hint = f"; did you mean {meant}?" if _takes(kind, meant, accepts) else ""
            raise argparse.ArgumentTypeError(f"got {printable(repr(text))}, wanted {wanted}{hint}")
        if value > most:
            raise argparse.ArgumentTypeError(f"got {printable(repr(text))}, wanted {wanted}, {most:,.0f} at most")
        return value

    return parse


def _takes(kind: type, text: str | None, accepts: Callable[[float], bool]) -> bool:
    """Return whether `text` is a number that `accepts` takes."""
    if text is None:
        return False
    value = _whole(text) if kind is int else float(text)
    return math.isfinite(value) and accepts(value)


def _meant_number(text: str, *, whole: bool = False) -> str | None:
    """Return the number that was most likely meant, in Python's writing; None if that cannot be told.

    It knows a comma for a decimal point, as many countries write, and one after the thousands; other minus signs and
    multiplication signs than the keyboard's; percent.
    """
    plain = text.strip().rstrip(",;").translate(_LOOK_ALIKES).replace(" ", "")
    power = re.fullmatch(r"(?:(.+)[x*])?10(?:\^|\*\*)\(?(-?\d+)\)?", plain)  # 10^-4, 5x10^-4
    if power:
        plain = f"{power[1] or 1}e{power[2]}"
    if plain.endswith("%"):
        percent = _meant_number(plain[:-1]) or plain[:-1]
        return f"{float(percent) / 100:g}" if _is_float(percent) else None
    if re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", plain):  # 1,000
        plain = plain.replace(",", "")
    elif whole and _THOUSANDS.fullmatch(plain):
        plain = plain.replace(".", "")
    elif plain.count(",") == 1:
        plain = plain.replace(",", ".")
    return plain if plain != text and _is_float(plain) else None


def _is_float(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) is not None


def _whole(text: str) -> float:
    """Return `1e3` as the whole number that it is; NaN for what is none, and for 1.000, 1000 in many countries."""
    if _THOUSANDS.fullmatch(text):
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return int(value) if value.is_integer() and abs(value) < 2**53 else math.nan


positive_int = number(int, "a whole number above 0", lambda value: value > 0)
batch = number(int, "a whole number above 0", lambda value: value > 0, most=2**16)  # held in memory at once
accumulation = number(int, "a whole number above 0", lambda value: value > 0, most=2**20)
workers = number(int, "a whole number, 0 or above", lambda value: value >= 0, most=2**10)  # processes
count = number(int, "a whole number, 0 or above", lambda value: value >= 0)
positive = number(float, "a number above 0", lambda value: value > 0)
rate = number(float, f"a number above 0, {LARGEST_RATE:g} at most", lambda value: 0 < value <= LARGEST_RATE)
not_negative = number(float, "a number, 0 or above", lambda value: value >= 0)
seconds = number(float, "a number, 0 or above", lambda value: value >= 0, most=1e9)  # what a thread can wait for
fraction = number(float, "a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
share = number(float, "a share from 0 to 1", lambda value: 0 <= value <= 1)


def _meant_shares(text: str) -> str:
    """Return what was most likely meant by a text that is no shares, as the end of a sentence; "" if unknown."""
    plain = text.translate(_LOOK_ALIKES).replace("%", "")
    decimals = re.findall(r"[01],\d+", plain)
    if decimals and not re.sub(r"[01],\d+", "", plain).strip(" ,;/:|-"):
        meant = ",".join(number.replace(",", ".") for number in decimals)
        return f"; a number has a decimal point here: {meant}{',...' * (len(decimals) == 1)}"
    meant = ",".join(_NUMBER.findall(plain))
    return f"; did you mean {meant}?" if meant and meant != text else ""


def proportions(text: str) -> list[float]:
    """Return up to three shares of train, valid and test that sum to 1, of a text such as `1.` or `0.9,0.1`.

    Raises ArgumentTypeError, with what was most likely meant, for any other text.
    """
    wanted = "one to three shares such as 0.9,0.1 (train,valid)"
    refused = f"got {printable(repr(text))}, wanted {wanted}"
    try:
        parts = [not_negative(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{refused}, with commas between them and no spaces{_meant_shares(text)}"
        ) from error
    if not 1 <= len(parts) <= 3 or parts[0] == 0:
        raise argparse.ArgumentTypeError(refused + _meant_shares(text))
    whole = sum(parts)
    if abs(whole - 1) <= ROUNDING:
        return parts
    if len(parts) == 1 and whole < 1:
        advice = f"give {whole:g},{1 - whole:g} (train,valid), or 1 for no validation"
    else:
        advice = f"give {','.join(f'{part / whole:.3g}' for part in parts)}"
    raise argparse.ArgumentTypeError(f"got {text!r}, which sums to {whole:g}, wanted shares that sum to 1; {advice}")
