"""SAT's own lora2, to compare with: the same values in its factors and in ours."""

import pytest
import torch
from sat.model.finetune.lora2 import LoraLinear
from sat.model.finetune.lora2 import LoraMixin as SatMixin

from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.interop.sat_lora2 import LoraMixin
from sat_lora.lora.apply import sat_models
from sat_lora.parallel.sharding import Sharding, model_parallel_layout
from tests.support.sat_subjects import SUBJECTS, Subject
from tests.support.tiny import CONFIG, logits_of, seeded_noise, tiny_batch

LAYERS = 2  # of every SAT model here


def run_cogvlm(model):
    batch = tiny_batch()
    return logits_of(model, {**batch, "images": batch["images"].to(model.transformer.final_layernorm.weight.dtype)})


COGVLM = Subject(lambda **more: build_cogvlm(CONFIG, **more), run_cogvlm, {}, 0, tolerance=1e-6)
MODELS = {**SUBJECTS, "cogvlm": COGVLM}
PLAIN = SUBJECTS["plain"]
some_models = pytest.mark.parametrize("name", ["plain", "chatglm2", "encoder-decoder", "bottleneck", "cogvlm"])


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
    for inner in sat_models(model).values():
        inner.add_mixin("lora", mixin_class(LAYERS, *args, **settings), reinit=True)
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
    return {
        f"{path}.{name}".lstrip("."): inner.get_mixin("lora").adapter_for(name)
        for path, inner in sat_models(model).items()
        for name in inner.get_mixin("lora").targets
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


def assert_close(got, expected, tolerance, name=""):
    """The largest difference, relative to the largest value."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max(), name


def both(subject, *args, **changes):
    """(SAT's, ours) with the same values."""
    theirs, ours = with_sats(subject, *args, **changes), with_ours(subject, *args, **changes)
    copy_factors(theirs, ours)
    return theirs, ours


def filled(subject, *args, **changes):
    """Ours, with an effect."""
    model = with_ours(subject, *args, **changes)
    fill_ours(model)
    return model
