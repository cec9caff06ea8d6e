"""What `combine` refuses: wrong arguments, and adapters that do not go together."""

import difflib
import math
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

from sat_lora.adapters.format import LARGEST_SCALE, MAGNITUDE, PAIR, SavedAdapter
from sat_lora.adapters.read import read_adapter, tensor_problems
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.deltas.delta import Delta
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn

METHODS = ("cat", "linear", "svd", "ties")
MAJORITY_SIGNS = ("total", "frequency")
WHOLE = "whole"
"""Stands for the slot of a layer that has none."""


@dataclass(frozen=True)
class Source:
    """One adapter and its weight in the sum."""

    folder: str | Path
    weight: float
    saved: SavedAdapter

    def scale_of(self, name: str) -> float:
        """Return the factor before B A of that layer: the weight times the layer's scale."""
        return self.weight * self.saved.layers[name].scale

    def rows(self, name: str) -> dict[str, tuple[int, int]]:
        """Return the rows (start, stop) of each slot of that layer."""
        entry = self.saved.layers[name]
        return dict(zip(entry.slots or (WHOLE,), entry.rows))

    def deltas(self, name: str) -> dict[str, Delta]:
        """Return the delta of each slot of that layer, of which `scale_of` is the scale."""
        sides = [[self.saved.tensors[key] for key in self.saved.keys(name, leaf)] for leaf in PAIR]
        scale = self.scale_of(name)
        return {slot: Delta(a, b, scale) for slot, a, b in zip(self.rows(name), *sides)}

    def in_features(self, name: str) -> int:
        """Return the inputs of that layer by the first A that says it; 0, which fits no tensor, where none does."""
        factors = (self.saved.tensors.get(key) for key in self.saved.keys(name, PAIR[0]))
        return next((a.shape[-1] for a in factors if a is not None and a.dim() > 0), 0)


def check_arguments(
    folders: list[str | Path],
    out: str | Path,
    method: str,
    weights: list[float] | None,
    rank: int | None,
    density: float | None,
    majority_sign: str,
) -> None:
    """Raise one ConfigError that lists every argument that is wrong."""
    problems = []
    if isinstance(folders, (str, Path)) or len(folders) < 1:
        problems.append(f"folders has to be a list of at least one adapter folder, got {folders!r}")
    elif weights is not None and (len(weights) != len(folders) or not all(map(_is_finite, weights))):
        problems.append(f"weights has to be one finite number for each of {len(folders)} folders, got {weights!r}")
    for name, value, choices in (("method", method, METHODS), ("majority_sign", majority_sign, MAJORITY_SIGNS)):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)[0]
            problems.append(f"there is no {name} {value!r}, did you mean {near!r}? known: {', '.join(choices)}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        problems.append(f"rank has to be a whole number of at least 1, got {rank!r}")
    if density is not None and not (_is_finite(density) and 0 < density <= 1):
        problems.append(f"density has to be above 0 and at most 1, got {density!r}")
    if method == "ties" and density is None:
        problems.append("ties needs a density, the share of values that it keeps, for example 0.5")
    owners = {"rank": (rank, "svd"), "density": (density, "ties"), "majority_sign": (majority_sign, "ties")}
    for name, (argument, owner) in owners.items():
        if argument not in (None, "total") and method in METHODS and method != owner:
            problems.append(f"{name} is for {owner}, {method} does not use it")
    if Path(out).exists():
        problems.append(f"{out} exists; give a new folder")
    refuse(problems, ConfigError)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def read_sources(
    folders: list[str | Path], weights: list[float], method: str, *, any_base: bool = False
) -> list[Source]:
    """Return the adapters with their weights, each read once.

    any_base: they may be of different bases. A warning where an adapter, of an older version, knows too little of its
    own. Raises one AdapterError that lists everything that keeps them from being combined.
    """
    sources = []
    problems = []
    for folder, weight in zip(folders, weights):
        try:
            sources.append(Source(folder, weight, read_adapter(folder)))
        except AdapterError as error:
            problems.append(str(error))
            continue
        problems += [f"{folder}: {problem}" for problem in _own_problems(sources[-1])]
        problems += [] if any_base else _other_base(sources)
    for name, holders in by_layer(sources).items():
        problems += [f"{name}: {problem}" for problem in _disagreements(name, holders, method)]
    refuse(problems)
    silent = [str(s.folder) for s in sources if s.saved.base is None or s.saved.base.values is None]
    if silent and len(sources) > 1 and not any_base:
        verb = "was" if len(silent) == 1 else "were"
        warn(
            f"{printable(', '.join(silent))} {verb} written by a version that kept names and shapes of its base alone: "
            "nobody can say whether all of these adapters are of one base"
        )
    return sources


def _other_base(sources: list[Source]) -> list[str]:
    """Return the problem, in a list, that the last adapter is of another base than those before it; else no problem.

    It is compared with the first one before it that says enough.
    """
    *before, last = ((source, source.saved.base or BaseIdentity(source.saved.base_fingerprint)) for source in sources)
    telling = sorted(before, key=lambda pair: pair[1].values is None)
    if not telling:
        return []
    first, base = telling[0]
    base = replace(base, fingerprint=first.saved.base_fingerprint)
    difference = base.difference(replace(last[1], fingerprint=last[0].saved.base_fingerprint))
    if difference is None:
        return []
    return [
        f"{last[0].folder}: trained on a base with {difference} than {first.folder}: "
        f"{last[0].saved.base_title}, not {first.saved.base_title}; insist with --any-base (any_base=True)"
    ]


def by_layer(sources: list[Source]) -> dict[str, list[Source]]:
    """Return the adapters that have it for every layer, in the order of the layers' names."""
    names = sorted({name for source in sources for name in source.saved.layers})
    return {name: [source for source in sources if name in source.saved.layers] for name in names}


def _own_problems(source: Source) -> list[str]:
    """Return what keeps one adapter from being combined with any, in a list."""
    saved = source.saved
    expected = saved.expected({name: source.in_features(name) for name in saved.layers})
    uncombinable = {
        "DoRA magnitudes cannot be combined": [key for key in expected if key.endswith(MAGNITUDE)],
        "whole tensors of the base (modules_to_save, bias) cannot be combined": saved.trained,
    }
    problems = [
        f"{reason}: {', '.join(sorted(keys)[:8])}{', ...' * (len(keys) > 8)}"
        for reason, keys in uncombinable.items()
        if keys
    ]
    if not saved.layers:
        problems.append("adapts nothing")
    pairs = {key: tensor for key, tensor in saved.tensors.items() if key not in saved.trained}
    return problems + sorted(tensor_problems(pairs, expected))


def _disagreements(name: str, holders: list[Source], method: str) -> list[str]:
    """Return what keeps the adapters of one layer from being combined with each other, in a list."""
    problems: list[str] = []
    first: dict[str, object] = {}
    entries = [source.saved.layers[name] for source in holders]
    for source, entry in zip(holders, entries):
        facts: dict[str, object] = {f"rows of {slot}": rows for slot, rows in source.rows(name).items()}
        facts |= {"kind": entry.kind, "number of inputs": source.in_features(name) or None}
        for fact, value in facts.items():
            if value is not None and first.setdefault(fact, value) != value:
                problems.append(f"{fact} {first[fact]} in one adapter, {value} in another")
    if len({bool(entry.slots) for entry in entries}) > 1:
        problems.append("cut into slots in one adapter and not in another")
    ranks = [entry.r for entry in entries]
    if method in ("linear", "ties") and len(set(ranks)) > 1:
        problems.append(f"{method} wants equal ranks, got {ranks}; svd and cat take any")
    largest = max(abs(source.scale_of(name)) for source in holders)
    if not largest <= LARGEST_SCALE:
        problems.append(f"weight times scale is not finite in float32, which ends at {LARGEST_SCALE:.3g}: {largest:g}")
    return problems


def refuse(problems: list[str], error: type[Exception] = AdapterError) -> None:
    """Raise the error with the problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise error(f"not combined: {'; '.join(problems[:20])}{more}")
