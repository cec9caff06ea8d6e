"""How many steps a run takes, and the learning rate at each of them."""

import math

DECAY_STYLES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, style: str, floor: float = 0.0) -> float:
    """What the peak learning rate is multiplied with at `step` (the first is 0); in (0, 1].

    With W = warmup_steps, N = total_steps:

        step < W     (step + 1) / W
        otherwise    floor + (1 - floor) * decay((step - W) / (N - W))

    decay(p) is (1 + cos(pi p)) / 2 for `cosine`, 1 - p for `linear`, 1 for `constant`. The first step after warm-up
    has the peak, the last step is just above `floor`; a step past the last one keeps the last one's factor.
    ValueError for an unknown style.
    """
    if style not in DECAY_STYLES:
        raise ValueError(f"--lr-decay-style: got {style!r}, wanted one of {', '.join(DECAY_STYLES)}")
    step = max(0, min(step, total_steps - 1))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (1 - floor) * DECAY_STYLES[style](progress)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """--warmup in steps: below 1 a share of `total_steps` (rounded up), else steps; never above `total_steps`."""
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
    """Optimizer steps of a run: `train_iters`, else `epochs` (one if None) over `samples`, rounded up, at least 1."""
    if train_iters is not None:
        return train_iters
    per_step = batch_size * gradient_accumulation_steps * data_parallel_size
    return max(1, math.ceil((1.0 if epochs is None else epochs) * samples / per_step - 1e-9))
