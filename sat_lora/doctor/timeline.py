"""A picture of one backward pass: when each gradient came, on every rank, and which did not come."""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sat_lora.errors import ConfigError
from sat_lora.lora.targets import part_of
from sat_lora.watchdog.rank_state import RankState

MOST_NAMES = 12  # towers and pieces of them that are named at the side
COLOURS = ("#08519c", "#d94801", "#006d2c", "#6a51a3", "#a50f15", "#525252", "#c51b8a", "#01665e")


def draw_timeline(states: Sequence[RankState], path: str | Path, now: float | None = None) -> None:
    """Write a .png of the latest micro-batch in which a gradient came.

    Across: seconds since the first one came. Upwards: the gradients, in their order on the rank that has the most.
    Marked red: those that came on some ranks and not on another, and the time since the last one, up to `now` (seconds
    since the epoch), when the run was found to hang.
    Raises ConfigError if no gradient has come yet, or it cannot be written.
    """
    # Figure and canvas by hand: pyplot would keep global state and might ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    moment = max(((state.step, state.micro_batch) for state in states if state.arrivals), default=None)
    if moment is None:
        raise ConfigError("--plot: no gradient had arrived when the run stopped, so there is nothing to draw")
    shown = [state for state in states if (state.step, state.micro_batch) == moment]
    order = arrival_order(shown)
    start = min(when for state in shown for _, when in state.arrivals)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="seconds since the first gradient", ylabel="gradients, in order of arrival")
    towers = stretches(order)
    if 1 < len(towers) <= MOST_NAMES:
        for _, last, _ in towers[:-1]:
            axes.axhline(last + 0.5, color="#bdbdbd", linewidth=0.8)
        names = [f"{tower}\n{first} to {last}" for first, last, tower in towers]
        axes.set_yticks([(first + last) / 2 for first, last, _ in towers], names, fontsize=8)
    for state in shown:
        points = [(when - start, order[name]) for name, when in state.arrivals]
        label = f"rank {state.rank}: {len({name for name, _ in state.arrivals})} of {len(state.expected)}"
        style = dict(color=COLOURS[state.rank % len(COLOURS)], markersize=4, linewidth=0.8, label=label)
        axes.plot(*(zip(*points) if points else ([], [])), "o-", **style)
    for state in shown:
        for first, last in gaps(state, order):
            axes.axhspan(first - 0.5, last + 0.5, color="#de2d26", alpha=0.12, linewidth=0)
            label = (
                f"rank {state.rank}: {last - first + 1} missing" if last > first else f"rank {state.rank}: 1 missing"
            )
            axes.annotate(label, (1, (first + last) / 2), xycoords=("axes fraction", "data"), ha="right", va="center",
                          color="#a50f15", fontsize=8)  # fmt: skip
    last_sign = max(state.last_sign for state in shown)
    if now is not None and now > last_sign:
        axes.axvspan(last_sign - start, now - start, color="#de2d26", alpha=0.06, linewidth=0)
        axes.set_xlim(right=now - start)
        axes.set_title(f"step {moment[0]}, micro-batch {moment[1]}: nothing for {now - last_sign:.1f} s", fontsize=10)
    else:
        axes.set_title(f"step {moment[0]}, micro-batch {moment[1]}", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}.png")
    try:
        figure.savefig(draft, dpi=120)
        os.replace(draft, path)
    except OSError as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error}") from error


def arrival_order(states: Sequence[RankState]) -> dict[str, int]:
    """Return a place for every gradient that came anywhere: as on the rank that has the most, then of others."""
    by_number = sorted(states, key=lambda state: -len(state.arrivals))
    names = dict.fromkeys(name for state in by_number for name, _ in state.arrivals)
    return {name: place for place, name in enumerate(names)}


def stretches(order: dict[str, int]) -> list[tuple[int, int, str]]:
    """Return (first place, last place, tower) of neighbouring gradients of one tower of the model."""
    towers = [(place, tower_of(part_of(module_of(name)))) for name, place in order.items()]
    runs = [[*run] for _, run in groupby(towers, key=lambda pair: pair[1])]
    return [(run[0][0], run[-1][0], run[0][1]) for run in runs]


def tower_of(part: str) -> str:
    """Return the tower that a part, see `part_of`, belongs to."""
    if part.startswith("cross-vision-"):
        return "second vision tower"
    if part.startswith(("vit-", "patch-", "vision-convolution")):
        return "vision tower"
    return part if part in ("projector", "other") else "language model"


def module_of(parameter: str) -> str:
    """Return the adapted layer of a mixin's parameter, whose path it has with slashes; else its own module."""
    owner = parameter.rpartition(".")[0]
    layer = owner.rpartition(".")[2]
    return layer.replace("/", ".") if "/" in layer else owner


def gaps(state: RankState, order: dict[str, int]) -> list[tuple[int, int]]:
    """Return the runs of places, (first, last), whose gradients came elsewhere and not on this rank."""
    arrived = {name for name, _ in state.arrivals}
    lacking = sorted(place for name, place in order.items() if name not in arrived)
    runs = [[place for _, place in run] for _, run in groupby(enumerate(lacking), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1]) for run in runs]
