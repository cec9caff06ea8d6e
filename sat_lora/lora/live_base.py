"""Which base a live model has, whatever its layout: see `base_identity`."""

import torch
from torch import nn

from sat_lora._sat import mpu
from sat_lora.lora.base_identity import BaseIdentity, fingerprint_of, identity_of
from sat_lora.lora.mixin import LoraMixin, lora_mixins
from sat_lora.parallel.sharding import Sharding, gathered, model_parallel_layout, sharding_of
from sat_lora.quantized.quantized_weight import whole as decoded


def base_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str, torch.Tensor]]:
    """Return what a checkpoint of the base model holds, by name: (module, leaf, this rank's tensor); no LoraMixin's."""
    tensors: dict[str, tuple[nn.Module, str, torch.Tensor]] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        if isinstance(module, LoraMixin):
            return
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                tensors[prefix + leaf] = (module, leaf, tensor)
        for child_name, child in module.named_children():
            visit(child, f"{prefix}{child_name}.")

    visit(model, "")
    return tensors


def whole_shape(module: nn.Module, leaf: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter or buffer that model parallelism may have cut and ZeRO-3 partitioned."""
    _, size = model_parallel_layout()
    return sharding_of(module, leaf).full_shape(getattr(tensor, "ds_shape", tensor.shape), size)


def remember_base(model: nn.Module, identity: BaseIdentity) -> None:
    """Let `identity_of_model` answer this from now on, for a base whose weights were quantised since."""
    model.base_identity = identity


@torch.no_grad()
def identity_of_model(model: nn.Module) -> BaseIdentity:
    """Return the identity of a live model's base. Every rank has to call it under ZeRO-3 or model parallelism.

    What LoRA mixins have trained or merged is taken as it was before, and so is what is quantised: an adapter belongs
    to a base, however many bits its weights were held in.
    """
    remembered: BaseIdentity | None = getattr(model, "base_identity", None)
    if remembered is not None:
        return remembered
    tensors = base_tensors(model)
    shapes = {name: whole_shape(module, leaf, tensor) for name, (module, leaf, tensor) in tensors.items()}
    originals: dict[int, torch.Tensor] = {}
    for mixin in lora_mixins(model).values():
        before = mixin.originals()
        if before is None:
            return BaseIdentity(fingerprint_of(shapes))
        for tensor, original in before:
            originals.setdefault(id(tensor), original)
    partitioned = [tensor for _, _, tensor in tensors.values() if hasattr(tensor, "ds_id")]

    def values_at(name: str, index: torch.Tensor) -> torch.Tensor:
        module, leaf, tensor = tensors[name]
        sharding = sharding_of(module, leaf)
        original = originals.get(id(tensor))
        return _own_values(tensor, original, sharding, shapes[name], index, gives_whole=data_rank == 0)

    data_rank = torch.distributed.get_rank(partitioned[0].ds_process_group) if partitioned else 0
    name = getattr(model, "base_name", None)
    family = getattr(getattr(model, "family", None), "title", None) or type(model).__name__.removesuffix("Model")
    identity = identity_of(shapes, values_at, name=name, family=family)
    groups = [mpu.get_model_parallel_group()] if model_parallel_layout()[1] > 1 else []
    groups += [partitioned[0].ds_process_group] if partitioned else []
    if groups and identity.values is not None:  # each value is on one rank, and zero on the others
        device = next(iter(tensors.values()))[2].device
        values = identity.values.to(device)
        for group in groups:
            torch.distributed.all_reduce(values, group=group)
        identity.values.copy_(values)
    return identity


def _own_values(
    tensor: torch.Tensor,
    original: torch.Tensor | None,
    sharding: Sharding,
    shape: tuple[int, ...],
    index: torch.Tensor,
    *,
    gives_whole: bool,
) -> torch.Tensor:
    """Return the elements at `index` of the whole tensor, as float32, zero where another rank is the one to give them.

    gives_whole: whether this rank, of those that ZeRO-3 partitions over, gives what each of them has.
    """
    rank, size = model_parallel_layout()
    flat, start = _flat_part(tensor, original, gives_whole=gives_whole)
    if size == 1 and gives_whole and not hasattr(tensor, "ds_id"):
        return flat[index.to(flat.device)].float().to(tensor.device)
    is_local = torch.ones(len(index), dtype=torch.bool)
    local = index
    dim = sharding.dim
    if size > 1 and dim is None:
        is_local &= rank == 0
    elif size > 1 and dim is not None:
        places = [*torch.unravel_index(index, shape)]
        owners, places[dim] = sharding.place(places[dim], shape[dim], size)
        is_local &= owners == rank
        local = torch.zeros_like(index)
        for length, place in zip(getattr(tensor, "ds_shape", tensor.shape), places):
            local = local * length + place
    is_local &= (local >= start) & (local < start + len(flat))
    if not is_local.any():
        return torch.zeros(len(index), device=tensor.device)
    chosen = (local - start).where(is_local, 0).to(flat.device)
    return flat[chosen].float().where(is_local.to(flat.device), 0).to(tensor.device)


def _flat_part(tensor: torch.Tensor, original: torch.Tensor | None, *, gives_whole: bool) -> tuple[torch.Tensor, int]:
    """Return (the elements of this rank's tensor that it gives, where they begin in it): under ZeRO-3 its partition."""
    whole = original
    if not hasattr(tensor, "ds_id"):
        whole = decoded(tensor) if original is None else original
    elif original is None:
        part = tensor.ds_tensor
        if part.numel() < part.ds_numel or hasattr(part, "ds_quant_scale"):  # offloaded to a disk, or quantised
            with gathered([tensor]):
                whole = tensor.detach().to("cpu", copy=True)
    elif original.numel() == tensor.ds_tensor.ds_numel:  # kept when it was partitioned
        whole = None
    if whole is not None:
        flat = whole.detach().reshape(-1)
        return (flat, 0) if gives_whole else (flat[:0], 0)
    flat = (tensor.ds_tensor if original is None else original).detach().reshape(-1)
    start = tensor.ds_tensor.ds_numel * torch.distributed.get_rank(tensor.ds_process_group)
    return flat[: max(0, tensor.ds_numel - start)], start  # what lies beyond is padding
