"""SAT's own lora2, to compare with: the same values in its factors and in ours."""

import torch
from sat.model.base_model import BaseModel
from sat.model.finetune.lora2 import LoraLinear
from sat.model.finetune.lora2 import LoraMixin as SatMixin

from sat_lora.interop.sat_lora2 import LoraMixin
from sat_lora.sharding import Sharding, model_parallel_layout
from tests.tiny import seeded_noise

LAYERS = 2


def halves_of(model) -> list[BaseModel]:
    """The SAT models that a LoRA mixin goes on: the model, or encoder and decoder."""
    return [model] if isinstance(model, BaseModel) else [model.encoder, model.decoder]


def with_ours(subject, *args, **settings):
    """A base with our drop-in, freshly initialised."""
    return _with(LoraMixin, subject, *args, **settings)


def with_sats(subject, *args, **settings):
    """A base with SAT's LoRA, whose factors have seeded values."""
    model = _with(SatMixin, subject, *args, **settings)
    for name, layer in sats_layers(model).items():
        fill(name, zip(layer.matrix_A, layer.matrix_B), cut_in="dense" in name)
    return model


def _with(mixin_class, subject, *args, **settings):
    model = subject.build(model_parallel_size=model_parallel_layout()[1])
    for half in halves_of(model):
        half.add_mixin("lora", mixin_class(LAYERS, *args, **settings), reinit=True)
    return model


def fill_ours(model) -> None:
    """The values that `with_sats` gives to SAT's."""
    for name, adapter in our_adapters(model).items():
        pieces = adapter.layout.pieces(adapter.rank)
        fill(name, [(adapter.A[a], adapter.B[b]) for _, b, a in pieces], cut_in="dense" in name)


@torch.no_grad()
def fill(name: str, pairs, *, cut_in: bool) -> None:
    """Seeded values for the pairs A, B of a layer's slots: whole ones are drawn, this rank's part is kept."""
    rank, size = model_parallel_layout()
    for slot, (a, b) in enumerate(pairs):
        for leaf, part, sharding in (
            ("A", a, Sharding(1 if cut_in else None)),
            ("B", b, Sharding(None if cut_in else 0)),
        ):
            whole = seeded_noise(sharding.full_shape(part.shape, size), slot, name + leaf) * 0.2
            part.copy_(sharding.shard(whole, rank, size))


def sats_layers(model) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def our_adapters(model) -> dict:
    """Every adapter by the name of its layer from the outermost model."""
    prefixes = [""] if isinstance(model, BaseModel) else ["encoder.", "decoder."]
    return {
        prefix + name: half.get_mixin("lora").adapter_for(name)
        for prefix, half in zip(prefixes, halves_of(model))
        for name in half.get_mixin("lora").targets
    }


@torch.no_grad()
def copy_factors(theirs, ours) -> None:
    """SAT's matrix_A and matrix_B of every slot into our stacked A and B."""
    layers = sats_layers(theirs)
    for name, adapter in our_adapters(ours).items():
        adapter.A.copy_(torch.cat([*layers[name].matrix_A]))
        adapter.B.copy_(torch.cat([*layers[name].matrix_B]))


def sats_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients under our names: of the base by parameter, of A and B stacked over the slots."""
    layers = sats_layers(model)
    gradients = {
        f"{name}.{leaf}": torch.cat([factor.grad for factor in getattr(layer, f"matrix_{leaf}")])
        for name, layer in layers.items()
        for leaf in "AB"
    }
    base = {n.replace(".original.", "."): p.grad for n, p in model.named_parameters() if ".matrix_" not in n}
    return gradients | base


def our_gradients(model) -> dict[str, torch.Tensor]:
    factors = {
        f"{name}.{leaf}": getattr(adapter, leaf).grad for name, adapter in our_adapters(model).items() for leaf in "AB"
    }
    return factors | {n: p.grad for n, p in model.named_parameters() if ".adapters." not in n}
