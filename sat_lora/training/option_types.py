"""What an option's text may be: types for argparse, whose errors say what was wanted."""

import argparse
import math
from collections.abc import Callable

LARGEST_RATE = 1e30
"""Of a learning rate and whatever multiplies it: Adam's first step divides by 1 - beta, and float32 ends at 3.4e38."""
ROUNDING = 0.0015  # 0.333,0.333,0.333 are thirds


def number(
    kind: type, wanted: str, accepts: Callable[[float], bool] = lambda value: True, most: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite `kind`, `most` at most, that `accepts` takes; otherwise an error that says what was
    `wanted`.
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
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}")
        if value > most:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}, {most:,.0f} at most")
        return value

    return parse


def _whole(text: str) -> float:
    """`1e3` as the whole number that it is; NaN for what is none."""
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


def proportions(text: str) -> list[float]:
    """Up to three shares of train, valid and test that sum to 1, separated by commas: `1.` or `0.9,0.1`."""
    parts = [not_negative(part) for part in text.split(",")]
    wanted = "one to three shares such as 0.9,0.1 (train,valid)"
    if not 1 <= len(parts) <= 3 or parts[0] == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}")
    whole = sum(parts)
    if abs(whole - 1) <= ROUNDING:
        return parts
    if len(parts) == 1 and whole < 1:
        advice = f"give {whole:g},{1 - whole:g} (train,valid), or 1 for no validation"
    else:
        advice = f"give {','.join(f'{part / whole:.3g}' for part in parts)}"
    raise argparse.ArgumentTypeError(f"got {text!r}, which sums to {whole:g}, wanted shares that sum to 1; {advice}")
