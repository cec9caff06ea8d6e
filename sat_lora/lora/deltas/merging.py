"""Deltas written into a live model's weights, and taken out again."""

import torch
from torch import nn

from sat_lora._sat import HOOKS_DEFAULT, BaseModel, mpu
from sat_lora.errors import ConfigError, MergeError
from sat_lora.lora.deltas import dora
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.layers import Kind
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.parallel.sharding import gathered, model_parallel_layout
from sat_lora.quantized.layers import quantized_weight_of


@torch.no_grad()
def merged_weight(
    weight: torch.Tensor,
    kind: Kind,
    layout: DeltaLayout,
    delta: Delta,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return g (W + s B A) in the weight's shape, g = 1 without DoRA; in float32, or float64 for a float64 weight.

    weight: whole, or this rank's part with its part of the delta of all slots and of magnitude (adapted rows,);
    `layout` says which rows of W are adapted.
    """
    merged = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    matrix = kind.matrix(merged)
    wide = delta.to(merged.dtype)
    if magnitude is not None:
        # The norms are those of the forward pass, from the weight and the pair as they are stored.
        norms = dora.row_norms(kind.matrix(weight.detach()), layout, delta, sum_over_ranks=kind.cut == "in")
    for rows, b_rows, a_rows in layout.pieces(wide.rank):
        matrix[rows].addmm_(wide.b[b_rows], wide.a[a_rows], alpha=wide.scale)
    if magnitude is not None:
        matrix *= dora.spread(dora.gain(magnitude, norms), layout)[:, None]
    return merged


class MergedWeights:
    """The weights that now hold a mixin's deltas. Every rank has to create it, and to undo it.

    Works on the layers as they are: a cut weight gets the cut delta, and under ZeRO-3 each is gathered in turn.
    """

    @torch.no_grad()
    def __init__(
        self, pairs: list[tuple[nn.Module, nn.Module]], scale: float, model: BaseModel, *, keep_original: bool
    ):
        """Write the deltas into the weights; all is computed, and a MergeError raised, before the first is changed.

        pairs: each adapted layer with its adapter. scale: what multiplies every delta.
        """
        self._pairs = pairs
        self._scale = scale
        self._originals: list[torch.Tensor] = []
        refuse_quantized(self._pairs)
        refuse_shared(self._pairs, model)
        for write in (False, True):  # every one is computed before the first is changed
            for layer, adapter in self._pairs:
                with gathered(adapter.parameters()), gathered([layer.weight], write=write):
                    merged = adapter.merged_weight(layer, self._scale).to(layer.weight.dtype)
                    if not write:
                        refuse_non_finite(f"{adapter.name}.weight", merged)
                        continue
                    if keep_original:
                        self._originals.append(layer.weight.detach().to("cpu", copy=True))
                    layer.weight.copy_(merged)

    def originals(self) -> list[tuple[nn.Parameter, torch.Tensor]] | None:
        """Return (weight, what it was) of all layers; None where the originals were not kept."""
        weights = [layer.weight for layer, _ in self._pairs]
        return [*zip(weights, self._originals)] if self._originals or not weights else None

    @torch.no_grad()
    def undo(self) -> None:
        """Put the originals back, bit for bit, where they were kept; else subtract the deltas, which DoRA refuses."""
        for number, (layer, adapter) in enumerate(self._pairs):
            if not self._originals and adapter.magnitude_or_none is not None:
                raise MergeError(f"{adapter.name}.weight: DoRA cannot be subtracted; merge with keep_original=True")
            with gathered(adapter.parameters()), gathered([layer.weight], write=True):
                subtracted = None if self._originals else adapter.merged_weight(layer, -self._scale)
                layer.weight.copy_(self._originals[number] if subtracted is None else subtracted)


def refuse_non_finite(name: str, merged: torch.Tensor) -> None:
    """Raise MergeError, on every model-parallel rank, if any of them holds a value that is not finite."""
    bad = (~torch.isfinite(merged)).sum()
    if model_parallel_layout()[1] > 1:
        torch.distributed.all_reduce(bad, group=mpu.get_model_parallel_group())
    if bad:
        raise MergeError(f"{name}: {int(bad)} merged values are not finite in {merged.dtype}; nothing was merged")


def refuse_quantized(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Raise ConfigError where a weight is quantised, whose few bits would round most of a delta away."""
    names = [adapter.name for layer, adapter in pairs if quantized_weight_of(layer) is not None]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ConfigError(
            f"{names[0]}.weight{more}: quantised weights take no delta, their few bits would round it away; save the "
            "adapter and merge it into the base's own weights: sat-lora merge --base BASE --adapter ADAPTER --out OUT"
        )


def refuse_shared(pairs: list[tuple[nn.Module, nn.Module]], model: BaseModel) -> None:
    """Raise MergeError where a weight serves twice: a merged delta would also work where the hook does not."""
    head = model.hooks.get("final_forward")
    while hasattr(head, "keywords") and "old_impl" in head.keywords:
        head = head.keywords["old_impl"]
    is_tied = head is None or getattr(head, "func", None) is HOOKS_DEFAULT["final_forward"]
    for layer, adapter in pairs:
        if is_tied and layer is getattr(model.transformer, "word_embeddings", None):
            raise MergeError(f"{adapter.name}.weight is the output head's weight too; adapt the head or do not merge")
        users = [name for name, other in model.named_modules() if getattr(other, "weight", None) is layer.weight]
        if len(users) > 1:
            raise MergeError(f"{adapter.name}.weight is shared by {' and '.join(users)}; it cannot be merged")
