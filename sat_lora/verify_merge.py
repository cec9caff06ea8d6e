"""Whether a merged checkpoint computes what base and adapter compute together."""

from pathlib import Path

import torch

from sat_lora.adapter_file import load_adapter
from sat_lora.cogvlm.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoint import load_cogvlm, read_config
from sat_lora.cogvlm.text import position_ids_for
from sat_lora.training.distributed import arrange, join


def lost_share(
    base: str | Path, adapter: str | Path, merged: str | Path, *, trust: bool = False
) -> tuple[float, float]:
    """(the share of the adapter's effect on the logits that merging lost, the largest share allowed).

    |merged - (base + adapter)| / |(base + adapter) - base| over the logits of one image and a few words: 0 where they
    agree, 1 where nothing was merged. Computed in the base's dtype, in which weights and activations are rounded: half
    precision is allowed a half, float32 a thousandth. Each model is loaded whole, one after the other.
    """
    arrange(join(alone=True))
    dtype = dtype_of(BaseWeights(base, trust=trust))
    batch = sample_batch(read_config(base))
    plain, adapted = (_logits(base, batch, dtype, one, trust=trust) for one in (None, adapter))
    error, effect = (_logits(merged, batch, dtype) - adapted).norm().item(), (adapted - plain).norm().item()
    share = error / effect if effect else float(error > 0)
    return share, 1e-3 if dtype in (torch.float32, torch.float64) else 0.5


def dtype_of(weights: BaseWeights) -> torch.dtype:
    """The dtype of most of a model's weights."""
    sizes: dict[torch.dtype, int] = {}
    for shape, dtype in weights.layout.values():
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    return max(sizes, key=sizes.get)


def sample_batch(config: dict) -> dict[str, torch.Tensor]:
    """One row for a model of these sizes: BOS, a seeded image, eight words."""
    generator = torch.Generator().manual_seed(0)
    places, words = config["image_length"] + 2, 8
    ids = torch.randint(1, config["vocab_size"], (1, 1 + places + words), generator=generator)
    embed, vision, patches = (torch.zeros_like(ids) for _ in range(3))
    embed[0, 1 : places + 1] = vision[0, 1:places] = patches[0, 2:places] = 1
    return {
        "input_ids": ids,
        "position_ids": position_ids_for(patches[0])[None],
        "images": torch.randn(1, 3, *config["eva_args"]["image_size"], generator=generator),
        "image_embed_mask": embed,
        "vision_expert_mask": vision,
    }


@torch.no_grad()
def _logits(
    folder: str | Path, batch: dict, dtype: torch.dtype, adapter: str | Path | None = None, *, trust: bool = False
) -> torch.Tensor:
    model, _ = load_cogvlm(folder, dtype=dtype, trust=trust)
    model.eval()
    if adapter is not None:
        load_adapter(model, adapter)
    inputs = dict(batch)
    return model(inputs.pop("input_ids"), inputs.pop("position_ids"), -1, **inputs)[0].float()
