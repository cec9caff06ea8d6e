"""What a layout - ZeRO stage and model-parallel size - costs on a cluster, and which one to take."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.scaling.communication import VERDICT, Collective, Setting, data_parallel, model_parallel
from benchmarks.scaling.memory import memory
from sat_lora.memory.components import Memory

MACHINE = 8  # GPUs
NVLINK, NETWORK = 450e9, 50e9  # bytes per second and direction: of a GPU in a machine, of a GPU's network card
LATENCY_INSIDE, LATENCY_BETWEEN = 20e-6, 60e-6  # seconds of a collective, however small
ARITHMETIC = 400e12  # floating-point operations per second that matrix products reach on a GPU, in bf16
STAGES, PARTS = (1, 2, 3), (1, 2, 4, 8)
SPARE = 0.9  # of a GPU's memory: the rest is for CUDA, NCCL and fragments


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step, on every rank. Nothing overlaps: the seconds are a sum and an upper bound."""

    gpus: int
    stage: int
    parts: int
    samples: int  # of the whole step
    data_bytes: float
    model_bytes: float
    data_seconds: float
    model_seconds: float
    arithmetic_seconds: float
    memory: Memory

    @property
    def seconds(self) -> float:
        return self.data_seconds + self.model_seconds + self.arithmetic_seconds

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    def fits(self, gigabytes: float) -> bool:
        return self.memory.total <= SPARE * gigabytes * 1e9


def cost(setting: Setting, gpus: int, stage: int, parts: int) -> Cost:
    """A model-parallel group lies within a machine; a data-parallel one has 8 / parts GPUs in each."""
    data_ranks, several = gpus // parts, gpus > MACHINE
    data = [VERDICT, *data_parallel(setting, stage, parts)]
    model = list(model_parallel(setting, stage)) if parts > 1 else []
    speed = min(NVLINK, NETWORK * MACHINE / parts) if several else NVLINK
    calls = len(data) + (gathers_of_zero_3(setting) if stage == 3 else 0)
    data_bytes, model_bytes = _sent(data, data_ranks), _sent(model, parts)
    return Cost(
        gpus=gpus,
        stage=stage,
        parts=parts,
        samples=setting.batch.samples * data_ranks,
        data_bytes=data_bytes,
        model_bytes=model_bytes,
        data_seconds=(
            0 if data_ranks == 1 else data_bytes / speed + calls * (LATENCY_BETWEEN if several else LATENCY_INSIDE)
        ),
        model_seconds=model_bytes / NVLINK + len(model) * LATENCY_INSIDE,
        arithmetic_seconds=operations(setting) / parts / ARITHMETIC,
        memory=memory(setting, stage=stage, parts=parts, data_ranks=data_ranks),
    )


def _sent(collectives: Iterable[Collective], ranks: int) -> float:
    return sum(collective.sent(ranks) for collective in collectives)


def gathers_of_zero_3(setting: Setting) -> int:
    """At most: each adapted linear's weight and its adapter, for forward and for backward."""
    towers = (setting.sizes.language, setting.sizes.vit)
    linears = sum(tower.layers * tower.experts * len(tower.linears) for tower in towers)
    return 2 * 2 * (linears + len(setting.sizes.projector))


def operations(setting: Setting) -> float:
    """Floating-point operations in the linears for one micro-batch: 2 per weight and token in forward, in the gradient
    of the input, and in recomputation. Attention's scores and adapters, some per cent, are left out.
    """
    sizes, batch = setting.sizes, setting.batch
    passes = 6 if setting.checkpointing else 4
    language = sizes.language.weights() / sizes.language.experts * batch.tokens
    vit = sizes.vit.weights() * batch.images * (1 + sizes.patches)
    projector = sum(linear.weights() for linear in sizes.projector) * batch.images * sizes.patches
    return passes * (language + vit) + 4 * (projector + sizes.vocabulary * sizes.hidden * batch.labelled)


def costs(setting: Setting, gpus: int) -> list[Cost]:
    return [cost(setting, gpus, stage, parts) for parts in PARTS for stage in STAGES]


def recommended(setting: Setting, gpus: int, gigabytes: float) -> Cost | None:
    """The best of the layouts that fit into `gigabytes` per GPU, if one does."""
    return best([one for one in costs(setting, gpus) if one.fits(gigabytes)])


def best(candidates: list[Cost]) -> Cost | None:
    """The one with the most samples per second; of those within a per cent of it, the one with the least memory, and of
    those alike the higher ZeRO stage: accumulated gradients would be shared too.
    """
    fastest = max((one.samples_per_second for one in candidates), default=0)
    near = [one for one in candidates if one.samples_per_second >= 0.99 * fastest]
    return min(near, key=lambda one: (round(one.memory.total), -one.stage), default=None)
