"""The collectives of one training step, one micro-batch long, on one rank."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.scaling.sizes import Sizes, Tower
from sat_lora.cogvlm.network.head import CHUNK_ROWS

MODEL, DATA, WORLD = "model-parallel", "data-parallel", "all"


@dataclass(frozen=True)
class Collective:
    kind: str  # all-reduce, all-gather, reduce-scatter
    payload: int  # bytes of the whole tensor: of the sum, of what all have gathered, of what is to be scattered
    group: str

    def sent(self, ranks: int) -> float:
        """Bytes that each of `ranks` sends in a ring: (n - 1) / n of the payload, twice that for an all-reduce."""
        return (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks * self.payload


VERDICT = Collective("all-reduce", 24, WORLD)
"""Of all ranks together, before the optimizer moves: the loss, and whether it or a gradient is not finite."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    samples: int
    length: int  # tokens of a sample, its image's included
    images: int
    vision_tokens: int  # over all samples: begin of image and patches
    labelled: int  # over all samples: tokens of answers, which the head sees

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def language_tokens(self) -> int:
        return self.tokens - self.vision_tokens


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step is made of; `size` is bytes of an element of weights, adapters, activations and gradients."""

    sizes: Sizes
    batch: MicroBatch
    rank: int
    size: int
    checkpointing: bool  # of language and ViT layers


def model_parallel(setting: Setting, stage: int) -> Iterator[Collective]:
    """Between the ranks that share one copy of the model; the same for any number of them above one.

    forward     word embeddings (tokens, hidden); after each row-parallel linear its output and the adapter's S
                (slots r, tokens), again where a layer is recomputed; the gathered logits
    backward    before each column-parallel linear the gradient of its input, and the adapter's dS; for each
                transformer the final hidden state's gradient, which SAT sums, and the head's
    """
    sizes, batch, size = setting.sizes, setting.batch, setting.size
    vit_tokens = batch.images * (1 + sizes.patches)
    final = Collective("all-reduce", batch.tokens * sizes.hidden * size, MODEL)
    yield final  # the word embeddings have the same shape
    recomputed = stage == 3 or batch.labelled > CHUNK_ROWS  # the head's logits, in chunks
    for _ in range(2 if recomputed else 1):
        yield Collective("all-gather", batch.labelled * sizes.vocabulary * size, MODEL)
    yield Collective("all-reduce", batch.labelled * sizes.hidden * size, MODEL)
    yield final
    yield Collective("all-reduce", vit_tokens * sizes.vit.hidden * size, MODEL)
    for tokens in (batch.vision_tokens, batch.language_tokens):
        yield from _layers(setting, sizes.language, tokens)
    yield from _layers(setting, sizes.vit, vit_tokens, trains_below=setting.checkpointing)
    yield from _verdicts(stage, MODEL)


def _layers(setting: Setting, tower: Tower, tokens: int, trains_below: bool = True) -> Iterator[Collective]:
    """Of one expert. trains_below: the input of the first layer asks for a gradient, as it does for checkpointing."""
    for number, linear in enumerate(tower.linears * tower.layers):
        if linear.cut == "out":
            width, times, times_s = linear.inputs, int(trains_below or number > 0), 1
        else:
            width, times = linear.outputs, 2 if setting.checkpointing else 1
            times_s = times
        for _ in range(times):
            yield Collective("all-reduce", tokens * width * setting.size, MODEL)
        for _ in range(times_s):
            yield Collective("all-reduce", tokens * linear.slots * setting.rank * setting.size, MODEL)


def data_parallel(setting: Setting, stage: int, parts: int = 1) -> Iterator[Collective]:
    """Between the ranks that hold the same part of the model, which is cut into `parts`.

    ZeRO 1, 2    the adapters' gradients are summed, although each rank keeps a part only (DeepSpeed 0.19.8 sums whole
                 buckets); then the adapters, of which each rank has stepped a part, are gathered
    ZeRO 3       weights and adapters are gathered for forward and for backward; gradients are scattered. An upper
                 bound: nothing stays gathered between two uses. Recomputation leaves weights gathered for backward,
                 but adapters are gathered once more.
    """
    sizes, size = setting.sizes, setting.size
    adapter = sizes.adapter(setting.rank, parts) * size
    yield Collective("all-reduce", 8, DATA)  # answer tokens, before the step
    yield from _verdicts(stage, DATA)
    if stage < 3:
        yield Collective("all-reduce", adapter, DATA)
        yield Collective("all-gather", adapter, DATA)
    else:
        yield Collective("all-gather", gathered_by_zero_3(setting, parts) * size, DATA)
        yield Collective("reduce-scatter", adapter, DATA)


def _verdicts(stage: int, group: str) -> Iterator[Collective]:
    """The norm of all gradients; ZeRO-3 has it in float64."""
    yield Collective("all-reduce", 8 if stage == 3 else 4, group)


def gathered_by_zero_3(setting: Setting, parts: int = 1) -> int:
    """Elements that ZeRO-3 gathers in a step; in how many collectives depends on its limits."""
    sizes, rank = setting.sizes, setting.rank
    twice = 2 * (sizes.weights(parts) + sizes.adapter(rank, parts)) - sizes.parts_that_run_forward_only(parts)
    recomputed = sizes.language.adapter(rank, parts) + sizes.vit.adapter(rank, parts)
    return twice + (recomputed if setting.checkpointing else 0)
