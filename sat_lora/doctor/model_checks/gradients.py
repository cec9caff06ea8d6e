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
        """The rank and the kind of batch, for people."""
        return f"rank {self.rank} with {self.kind}"


@looks_for("gradient-missing", "gradient-order", "gradient-twice")
def gradient_findings(model: nn.Module, passes: Sequence[Passes], *, bucket_size: int = 500_000_000) -> list[Finding]:
    """Return missing gradients, other orders, and gradients that come twice.

    Every rank has to call it and gets the same. bucket_size: DeepSpeed's `reduce_bucket_size`, in elements.
    """
    import torch

    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    rank_arrivals = [Arrivals(rank, record.kind, tuple(record.arrivals)) for record in passes]
    arrivals = gather_lists(rank_arrivals) if torch.distributed.is_initialized() else rank_arrivals
    return [*_twice(arrivals), *arrival_findings(model, arrivals, bucket_size=bucket_size)]


@looks_for("gradient-missing", "gradient-order")
def arrival_findings(model: nn.Module, arrivals: Sequence[Arrivals], *, bucket_size: int) -> list[Finding]:
    """Return missing gradients and other orders among the `arrivals` of all ranks, for their trainable `model`."""
    sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if p.requires_grad}
    return [*_missing(arrivals), *_order(arrivals, sizes, bucket_size)]


def _twice(arrivals: Sequence[Arrivals]) -> list[Finding]:
    ranks_by_name: dict[str, set[int]] = {}
    for arrived in arrivals:
        for name, count in Counter(arrived.names).items():
            if count > 1:
                ranks_by_name.setdefault(name, set()).add(arrived.rank)
    return [
        Finding(
            code="gradient-twice",
            seen="its gradient arrives more than once in one backward pass",
            ranks=tuple(sorted(ranks)),
            parameter=name,
            module=_owner(name),
        )
        for name, ranks in ranks_by_name.items()
    ]


def _missing(arrivals: Sequence[Arrivals]) -> list[Finding]:
    """Return findings on gradients that come somewhere and elsewhere not; what comes nowhere is for `reachability`."""
    everything = {name: None for arrived in arrivals for name in arrived.names}
    lacking: dict[tuple[str, ...], list[Arrivals]] = {}
    for arrived in arrivals:
        absent = tuple(name for name in everything if name not in set(arrived.names))
        if absent:
            lacking.setdefault(absent, []).append(arrived)
    findings = []
    for absent, lacking_ranks in lacking.items():
        example = next(arrived for arrived in arrivals if absent[0] in arrived.names)
        titles = ", ".join(arrived.title for arrived in lacking_ranks)
        findings.append(
            Finding(
                code="gradient-missing",
                seen=f"{titles}: {len(absent)} of {len(everything)} gradients do not come, {example.title} has them; "
                f"the first {absent[0]}, the last {absent[-1]}",
                ranks=tuple(sorted({arrived.rank for arrived in lacking_ranks})),
                parameter=absent[0],
                module=_owner(absent[0]),
            )
        )
    return findings


def _order(arrivals: Sequence[Arrivals], sizes: dict[str, int], bucket_size: int) -> list[Finding]:
    """Return one finding on different orders of what two have in common, with the first two that differ."""
    first = max(arrivals, key=lambda other: len(other.names), default=None)
    if first is None:
        return []
    differing = [(other, place) for other in arrivals if (place := _first_difference(first, other)) is not None]
    if not differing:
        return []
    other, place = differing[0]
    first_names, other_names = _common(first, other)
    reduced = [buckets(names, sizes, bucket_size) for names in (first_names, other_names)]
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
            seen=f"{other.title}: gradient {place + 1} is that of {other_names[place]}, {first.title} has "
            f"{first_names[place]} there; {effect}",
            ranks=tuple(sorted({other.rank for other, _ in differing} | {first.rank})),
            parameter=other_names[place],
            module=_owner(other_names[place]),
        )
    ]


def buckets(names: Sequence[str], sizes: dict[str, int], bucket_size: int) -> list[list[str]]:
    """Return the buckets that ZeRO 1 and 2 fill with gradients arriving in this order, as names.

    They are of at most `bucket_size` elements, as of DeepSpeed 0.19.8's
    `reduce_independent_p_g_buckets_and_remove_grads`: a gradient that does not fit any more closes the bucket, one that
    is larger than a bucket has one to itself.
    """
    filled_buckets: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if filled_buckets[-1] and filled + sizes.get(name, 0) > bucket_size:
            filled_buckets.append([])
            filled = 0
        filled_buckets[-1].append(name)
        filled += sizes.get(name, 0)
    return [bucket for bucket in filled_buckets if bucket]


def _common(first: Arrivals, other: Arrivals) -> tuple[list[str], list[str]]:
    shared = set(first.names) & set(other.names)
    first_names, other_names = (
        [*dict.fromkeys(name for name in arrived.names if name in shared)] for arrived in (first, other)
    )
    return first_names, other_names


def _first_difference(first: Arrivals, other: Arrivals) -> int | None:
    first_names, other_names = _common(first, other)
    return next((place for place, pair in enumerate(zip(first_names, other_names)) if pair[0] != pair[1]), None)


def _size_at(sizes: list[int], number: int) -> str:
    return f"{sizes[number]:,}" if number < len(sizes) else "no"


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
