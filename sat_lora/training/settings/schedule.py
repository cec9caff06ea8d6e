"""The number of steps that a run takes, and the learning rate at each of them."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sat_lora.training.settings.config import Schedule

LOOKED_AT = 1000  # steps of a schedule, spread over all of them
NOTHING = 1e-3  # share of the peak rate: what a step below it moves, no later one notices
MOST = 0.25  # share of the steps that may be below it

DECAY_STYLES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, style: str, floor: float = 0.0) -> float:
    """Return the factor in (0, 1] of the peak learning rate at `step`, counted from 0.

    With W = warmup_steps, N = total_steps:

        step < W     (step + 1) / W
        otherwise    floor + (1 - floor) * decay((step - W) / (N - W))

    decay(p) is (1 + cos(pi p)) / 2 for `cosine`, 1 - p for `linear`, 1 for `constant`. The first step after warm-up
    has the peak, the last step is just above `floor`; a step past the last one keeps the last one's factor.
    Raises ValueError for an unknown style.
    """
    if style not in DECAY_STYLES:
        raise ValueError(f"--lr-decay-style: got {style!r}, wanted one of {', '.join(DECAY_STYLES)}")
    step = max(0, min(step, total_steps - 1))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (1 - floor) * DECAY_STYLES[style](progress)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Return --warmup in steps: below 1 it is a share of `total_steps` (rounded up), else steps; at most
    `total_steps`.
    """
    steps = math.ceil(warmup * total_steps - 1e-9) if warmup < 1 else round(warmup)
    return min(steps, total_steps)


def total_steps(
    *,
    train_iters: int | None,
    epochs: float | None,
    samples: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    data_parallel_size: int,
) -> int:
    """Return the optimizer steps of a run: `train_iters`, else `epochs` (one if None) over `samples`, rounded up, at
    least 1.
    """
    if train_iters is not None:
        return train_iters
    per_step = batch_size * gradient_accumulation_steps * data_parallel_size
    return max(1, math.ceil((1.0 if epochs is None else epochs) * samples / per_step - 1e-9))


def rates(schedule: "Schedule", peak: float, steps: int) -> list[float]:
    """Return the learning rates of a run of `steps` steps, in order: of each, or of LOOKED_AT spread over them.

    peak: the highest rate.
    """
    count = min(steps, LOOKED_AT)
    places = [number * (steps - 1) // max(1, count - 1) for number in range(count)]
    return [peak * schedule.factor(step, steps) for step in places]


def schedule_problems(schedule: "Schedule", peak: float, steps: int) -> list[str]:
    """Return what is wrong with the learning rates of a run, as sentences that name an option. peak: the
    highest rate.
    """
    of_steps = rates(schedule, peak, steps)
    if steps > 1 and warmup_steps(schedule.warmup, steps) >= steps:
        return [
            f"--warmup {schedule.warmup:g}: all {steps} steps are warm-up, the rate only rises and comes to "
            f"{of_steps[-1]:.3g} with the last one; give fewer, or a share such as 0.01"
        ]
    idle = sum(not rate > NOTHING * peak for rate in of_steps) / len(of_steps)
    if idle > MOST:
        return [
            f"--lr {peak:g}: in {idle:.0%} of the {steps} steps the rate is nothing beside it, at the end "
            f"{of_steps[-1]:.3g}; look at --warmup, --lr-decay-style and --min-lr-ratio"
        ]
    return []
