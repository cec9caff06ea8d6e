"""CogVLM and its successors as a SAT model: the published parameter names, and a graph that has one shape whatever the
batch holds.
"""

import os
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sat_lora._sat import BaseModel, mpu
from sat_lora._sat import RMSNorm as SatRMSNorm
from sat_lora.cogvlm.families import encoder_sizes, family_of
from sat_lora.cogvlm.inputs.image import no_images
from sat_lora.cogvlm.network.attention import MASKED, mask_kind
from sat_lora.cogvlm.network.cross_vision import CrossVision
from sat_lora.cogvlm.network.experts import ExpertAttention, ExpertMlp
from sat_lora.cogvlm.network.head import LabelledRows, LanguageModelHead, OnLogits
from sat_lora.cogvlm.network.key_value_cache import KeyValueCache
from sat_lora.cogvlm.network.recompute import LayerCheckpointing, lowest_trained_block
from sat_lora.cogvlm.network.routing import TokenRouting, to_device
from sat_lora.cogvlm.network.vision import ImageTokens
from sat_lora.cogvlm.sizes import head_problems, lacking, size_problems
from sat_lora.errors import CheckpointError, ConfigError, DataError
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.parallel.weightless import without_memory

VIT = "mixins.eva.vit_model"  # where the vision transformer, itself a SAT model, sits in the whole


class RMSNorm(SatRMSNorm):
    """The norm x / sqrt(mean(x^2) + eps) * weight over the last dimension, as SAT's.

    SAT 0.4.12 makes five passes in float32; torch's kernel makes one and equals it bit for bit in fp32, bf16 and fp16,
    and computes in float64 where x is float64. A subclass, since SAT takes weight decay off by asking for the class.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normed hidden states, in their shape and dtype."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class CogVLMModel(BaseModel):
    """CogVLM, of a language transformer with visual experts, EVA2-CLIP vision transformer and projector.

    The same class serves its successors: what differs is in the `family` of the sizes. `args` holds the fields of
    `model_config.json`; build one with `build_cogvlm`.
    """

    def __init__(self, args: Namespace, params_dtype=torch.float32, **kwargs):
        super().__init__(
            args,
            params_dtype=params_dtype,
            layernorm=RMSNorm,
            activation_func=nn.functional.silu,
            init_method_std=0.01,
            **kwargs,
        )
        del self.transformer.position_embeddings
        self.checkpointing = LayerCheckpointing(self)
        common = dict(params_dtype=params_dtype, skip_init=args.skip_init)
        self.family = family = family_of(vars(args))
        self.image_length = args.image_length
        self.add_mixin("lm", LanguageModelHead(args.vocab_size, args.hidden_size, **common))
        vit_args = Namespace(**args.eva_args)
        eva = ImageTokens(
            vit_args,
            args.hidden_size,
            args.inner_hidden_size,
            params_dtype,
            convolves=family.convolves,
            adds_positions=family.has_cross_vision,
        )
        self.add_mixin("eva", eva)
        experts = dict(has_vision_experts=family.has_vision_experts, **common)
        self.add_mixin("mlp", ExpertMlp(args.num_layers, args.hidden_size, args.inner_hidden_size, **experts))
        attention = ExpertAttention(
            args.num_layers,
            args.hidden_size,
            args.num_attention_heads,
            rotary_base=getattr(args, "rotary_base", family.rotary_base),
            key_heads=args.num_multi_query_heads if family.groups_heads else None,
            vision_bias=family.vision_has_bias,
            **experts,
        )
        self.add_mixin("rotary", attention)
        if family.has_cross_vision:
            sizes = encoder_sizes(vars(args))
            self.add_mixin("encoder", CrossVision(sizes, args.cross_image_pix, vit_args.checkpoint_activations))

    def position_embedding_forward(self, *args, **kw_args):
        """Return None: positions enter by rotation, in the attention."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | int | None = -1,
        *,
        images: torch.Tensor | None = None,
        cross_images: torch.Tensor | None = None,
        image_embed_mask: torch.Tensor | None = None,
        vision_expert_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        on_logits: OnLogits | None = None,
        cache: KeyValueCache | None = None,
        **kw_args,
    ) -> list:
        """Return [logits (batch, seq, vocabulary), then SAT's dictionary of each layer].

        input_ids, position_ids, image_embed_mask, vision_expert_mask: (batch, seq). images: (images, 3, height, width)
        in the order in which their places appear in the batch. cross_images: (images, 3, side, side), the same pictures
        for a second vision encoder, where the family has one: at most one for each row. attention_mask: -1 is causal,
        None is full, or a tensor with 1 where a query may look. cache: keeps keys and values and has the head read each
        row's last token alone, logits (batch, 1, vocabulary); once it holds the prompts, the tokens are the next one of
        each row, all language.
        labels: (batch, seq), IGNORED where a token is not to be learnt; with them a scalar takes the logits' place, the
        sum of the cross-entropies of the labelled tokens given those before them, in float32. The head then runs on
        those positions alone, and on_logits is given what it makes of them. Both masks and the labels may stay on the
        CPU: only there does no one wait for a GPU.
        """
        if cache is not None and cache.holds_prompts:
            images = None
            routing = None
            places = None
            more = self._cross_inputs_of_step(cache)
        else:
            nothing = torch.zeros(input_ids.shape)
            routing = None
            if self.family.has_vision_experts:
                experts = nothing if vision_expert_mask is None else vision_expert_mask
                routing = TokenRouting.from_mask(experts, input_ids.device)
            mask = nothing if image_embed_mask is None else image_embed_mask
            places = to_device(mask.reshape(-1).nonzero()[:, 0], input_ids.device)
            images = self._check_images(images, len(places))
            more = self._cross_inputs(cross_images, mask, len(images), input_ids.device, cache)
        kind = mask_kind(attention_mask, input_ids.shape[1])
        rotary = self.mixins["rotary"].rotary_emb
        return super().forward(
            input_ids,
            position_ids,
            attention_mask if kind == MASKED else None,
            images=images,
            image_places=places,
            routing=routing,
            rope=rotary(position_ids, self.mixins["eva"].boi.dtype),
            attention_kind=kind,
            labelled=None if labels is None else LabelledRows.from_labels(labels, input_ids.device, on_logits),
            cache=cache,
            **more,
            **kw_args,
        )

    def layer_forward(self, hidden_states, mask, *args, encoder_outputs: torch.Tensor | None = None, **kw_args):
        """Return the layer's output, recomputed in backward where that is switched on and of use; SAT's hook.

        encoder_outputs: of the second vision encoder, for this layer and those behind it.
        """
        number = int(kw_args["layer_id"])
        more = () if encoder_outputs is None else (encoder_outputs,)
        if encoder_outputs is not None:
            kw_args["output_cross_layer"]["encoder_outputs"] = encoder_outputs

        def layer(x: torch.Tensor, mask: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            cross: dict[str, Any] = dict(encoder_outputs=more[0], cross_attention_mask=None) if more else {}
            return self.transformer.layers[number](x, mask, **cross, **kw_args)

        return self.checkpointing.run(layer, number, self, hidden_states, mask, *more)

    def _cross_inputs(
        self,
        cross_images: torch.Tensor | None,
        mask: torch.Tensor,
        images: int,
        device: torch.device,
        cache: KeyValueCache | None,
    ) -> dict[str, Any]:
        """Return what the second vision encoder's mixin takes, where there is one; mask: (batch, seq), of the images.

        Raises DataError where a row has several images, or not each of them comes in both sizes.
        """
        if not self.family.has_cross_vision:
            return {}
        rows = mask.flatten(1).any(1).nonzero()[:, 0]
        if cross_images is None and len(rows) == 0:
            # Nothing is asked of a parameter here: ZeRO-3 would gather it, on the ranks without images alone.
            cross_images = no_images(self.mixins["encoder"].image_size, device)
        count = 0 if cross_images is None else len(cross_images)
        if cross_images is None or len(rows) not in (0, count) or (len(rows) and images != count):
            raise DataError(
                f"{len(rows)} rows of the batch have places for images, and there are {images} images and {count} for "
                f"the second encoder; {self.family.title} takes one picture in each row, in both sizes"
            )
        rows = to_device(rows, device)
        if cache is not None:
            cache.cross_rows = rows
        lowest = lowest_trained_block(self) if torch.is_grad_enabled() else 0
        return {"cross_images": cross_images[: len(rows)], "cross_rows": rows, "lowest_block": lowest}

    def _cross_inputs_of_step(self, cache: KeyValueCache) -> dict[str, Any]:
        return {"cross_images": None, "cross_rows": cache.cross_rows} if self.family.has_cross_vision else {}

    def _check_images(self, images: torch.Tensor | None, places: int) -> torch.Tensor:
        if images is None and places == 0:
            return self.mixins["eva"].no_images()
        count = 0 if images is None else len(images)
        if places not in (0, count * (self.image_length + 2)):
            raise DataError(
                f"image_embed_mask marks {places} places, but {count} images of {self.image_length} patches take "
                f"{count} x ({self.image_length} + 2) = {count * (self.image_length + 2)}"
            )
        return images


def parallel_problems(config: dict, mp_size: int, ranks: int) -> list[str]:
    """Return why a CogVLM of the sizes in `config` cannot be cut over `mp_size` of `ranks` processes, in a list."""
    problems = []
    if mp_size < 1 or ranks % mp_size:
        problems.append(
            f"{ranks} ranks do not divide into groups of {mp_size}; start a multiple of {mp_size} ranks or choose a "
            f"divisor of {ranks}"
            if ranks > 1
            else f"one process is no group of {mp_size}; start a multiple of {mp_size} ranks, or leave it at 1"
        )
    vit = config.get("eva_args", {})
    names = ("num_attention_heads", "hidden_size", "inner_hidden_size")
    sizes = {name: config.get(name) for name in (*names, "vocab_size", "num_multi_query_heads")}
    sizes |= {f"eva_args.{name}": vit.get(name) for name in names}
    uneven = [f"{name} {size}" for name, size in sizes.items() if isinstance(size, int) and mp_size and size % mp_size]
    if uneven:
        problems.append(f"{mp_size} does not divide the base's {', '.join(uneven)}; choose one that divides them all")
    return problems


def build_cogvlm(
    config: dict,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    model_parallel_size: int = 1,
    checkpoint_activations: bool = False,
    vit_checkpoint_activations: bool = False,
    checkpoint_offload: bool = False,
    skip_init: bool = False,
    seed: int = 1234,
) -> CogVLMModel:
    """Return a CogVLM of the sizes in `config` (the content of model_config.json), with random weights.

    checkpoint_offload: the inputs of recomputed layers wait in host memory, see `recompute`; on a CPU they are there.
    SAT seeds the process with `seed` here, and sets up torch.distributed if nobody has. On the device "meta" the
    parameters have shapes and no memory; only the rotary frequencies have values, on the CPU. Raises CheckpointError if
    `config` lacks sizes, or one is none; ConfigError if the model-parallel size does not divide them, or the ranks.
    """
    missing = lacking(config)
    if missing:
        raise CheckpointError(missing)
    problems = size_problems(config) or head_problems(config)
    if problems:
        raise CheckpointError(f"the model config cannot be: {'; '.join(problems)}")
    _check_parallel(config, model_parallel_size)
    weightless = torch.device(device).type == "meta"
    runtime = dict(model_parallel_size=model_parallel_size, skip_init=skip_init or weightless, seed=seed)
    vit = {**config["eva_args"], **runtime, "checkpoint_activations": vit_checkpoint_activations}
    settings = {"use_bias": False, **config, **runtime, "checkpoint_activations": checkpoint_activations}
    arguments = Namespace(**{**settings, "eva_args": vit})
    with without_memory() if weightless else nullcontext():
        model = CogVLMModel(arguments, params_dtype=dtype)
    for tower in (model, model.mixins["eva"].vit_model):
        tower.checkpointing.from_host = checkpoint_offload
    return model.to(dtype=dtype) if weightless else model.to(device=device, dtype=dtype)


def _check_parallel(config: dict, mp_size: int) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    problems = parallel_problems(config, mp_size, ranks)
    if mpu.model_parallel_is_initialized() and model_parallel_layout()[1] != mp_size:
        problems.append(
            f"the model-parallel groups of this process are of {model_parallel_layout()[1]}; give that size"
        )
    if problems:
        raise ConfigError("\n".join(f"model_parallel_size {mp_size}: {problem}" for problem in problems))
