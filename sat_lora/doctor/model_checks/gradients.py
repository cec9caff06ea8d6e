"""Whether every rank gets the same gradients in the same order, whatever its batch holds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sat_lora.doctor.model_checks.passes import Passes
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.parallel.distributed import gather_lists


@dataclass(frozen=True)
class Arrivals:
    """What one rank saw with one kind of batch."""

    rank: int
    kind: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"rank {self.rank} with {self.kind}"


@looks_for("gradient-missing", "gradient-order", "gradient-twice")
def gradient_findings(model: nn.Module, passes: Sequence[Passes], *, bucket_size: int = 500_000_000) -> list[Finding]:
    """Missing gradients, other orders, and gradients that come twice. Every rank calls it and gets the same.

    bucket_size: DeepSpeed's `reduce_bucket_size`, in elements.
    """
    import torch

    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    own = [Arrivals(rank, one.kind, tuple(one.arrivals)) for one in passes]
    seen = gather_lists(own) if torch.distributed.is_initialized() else own
    sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if p.requires_grad}
    return [*_twice(seen), *_missing(seen), *_order(seen, sizes, bucket_size)]


def _twice(seen: Sequence[Arrivals]) -> list[Finding]:
    found: dict[str, set[int]] = {}
    for one in seen:
        for name, count in Counter(one.names).items():
            if count > 1:
                found.setdefault(name, set()).add(one.rank)
    return [
        Finding(
            code="gradient-twice",
            seen="its gradient arrives more than once in one backward pass",
            ranks=tuple(sorted(ranks)),
            parameter=name,
            module=_owner(name),
        )
        for name, ranks in found.items()
    ]


def _missing(seen: Sequence[Arrivals]) -> list[Finding]:
    """Gradients that come somewhere and elsewhere not; what comes nowhere is for `reachability`."""
    everything = {name: None for one in seen for name in one.names}
    lacking: dict[tuple[str, ...], list[Arrivals]] = {}
    for one in seen:
        absent = tuple(name for name in everything if name not in set(one.names))
        if absent:
            lacking.setdefault(absent, []).append(one)
    findings = []
    for absent, those in lacking.items():
        have = next(one for one in seen if absent[0] in one.names)
        titles = ", ".join(one.title for one in those)
        findings.append(
            Finding(
                code="gradient-missing",
                seen=f"{titles}: {len(absent)} of {len(everything)} gradients do not come, {have.title} has them; "
                f"the first {absent[0]}, the last {absent[-1]}",
                ranks=tuple(sorted({one.rank for one in those})),
                parameter=absent[0],
                module=_owner(absent[0]),
            )
        )
    return findings


def _order(seen: Sequence[Arrivals], sizes: dict[str, int], bucket_size: int) -> list[Finding]:
    """Different orders of what two have in common; one finding for all, with the first two that differ."""
    first = max(seen, key=lambda one: len(one.names), default=None)
    if first is None:
        return []
    others = [(one, place) for one in seen if (place := _first_difference(first, one)) is not None]
    if not others:
        return []
    one, place = others[0]
    mine, theirs = _common(first, one)
    reduced = [buckets(names, sizes, bucket_size) for names in (mine, theirs)]
    filled = [[sum(sizes.get(name, 0) for name in bucket) for bucket in side] for side in reduced]
    if filled[0] == filled[1]:
        effect = f"all of the {len(filled[0])} buckets of {bucket_size:,} elements or less are as large: a wrong sum"
    else:
        number = next(n for n in range(max(map(len, filled))) if [*filled[0][n : n + 1]] != [*filled[1][n : n + 1]])
        effect = (
            f"bucket {number + 1} has {_size_at(filled[0], number)} elements there and {_size_at(filled[1], number)} "
            "here: a hang or an error"
        )
    return [
        Finding(
            code="gradient-order",
            seen=f"{one.title}: gradient {place + 1} is that of {theirs[place]}, {first.title} has {mine[place]} "
            f"there; {effect}",
            ranks=tuple(sorted({other.rank for other, _ in others} | {first.rank})),
            parameter=theirs[place],
            module=_owner(theirs[place]),
        )
    ]


def buckets(names: Sequence[str], sizes: dict[str, int], bucket_size: int) -> list[list[str]]:
    """The buckets of at most `bucket_size` elements that ZeRO 1 and 2 fill with gradients arriving in this order.

    As DeepSpeed 0.19.8's `reduce_independent_p_g_buckets_and_remove_grads`: one that does not fit any more closes the
    bucket, one that is larger than a bucket has one to itself.
    """
    found: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if found[-1] and filled + sizes.get(name, 0) > bucket_size:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += sizes.get(name, 0)
    return [bucket for bucket in found if bucket]


def _common(first: Arrivals, other: Arrivals) -> tuple[list[str], list[str]]:
    shared = set(first.names) & set(other.names)
    mine, theirs = ([*dict.fromkeys(name for name in one.names if name in shared)] for one in (first, other))
    return mine, theirs


def _first_difference(first: Arrivals, other: Arrivals) -> int | None:
    mine, theirs = _common(first, other)
    return next((place for place, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), None)


def _size_at(sizes: list[int], number: int) -> str:
    return f"{sizes[number]:,}" if number < len(sizes) else "no"


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
