"""The settings by which a run fits cards of a given size: the search of `sat-lora estimate --fit`.

What the options of the run leave open is tried in this order, and the first that fits is taken:

    base        whole, int8, nf4
    ranks       data-parallel at ZeRO 2; at ZeRO 3, if the base is whole; model-parallel by 2, 4 and so on. A base that
                is quantised is preferred to one that is cut and quantised
    recomputed  nothing, the ViT, the language model, both; both with what the recomputed layers begin with on the host;
                the same with the optimizer's state there as well
    batch       the largest

A quantised layer is decoded, and ZeRO-3 gathers a weight, for each micro-batch, however small that is: they are taken
at once if WORTHWHILE samples fit, and else if nothing better does, with the largest batch.

An estimate of CogVLM-17B takes many seconds. Those of models with two or three layers in each tower take one: the bytes
of a step are nearly linear in the numbers of layers and of samples. What they rule out is out; what they propose is
estimated as a whole before it is taken.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sat_lora.cogvlm.checkpoints.quantized_files import KEY
from sat_lora.cogvlm.network.model import CogVLMModel, parallel_problems
from sat_lora.errors import ConfigError
from sat_lora.memory.components import Memory, memory_of
from sat_lora.memory.estimate import fake_model, fake_step, ways_of
from sat_lora.memory.estimate_run import Plan, plan_of, sizes_of
from sat_lora.quantization.config import NAMES, Quantization
from sat_lora.training.settings.config import BY_HAND, DEFAULTS, KNOWN, NONE, Origin, TrainConfig
from sat_lora.training.settings.deepspeed_config import settle

BASES = (NONE, *reversed(NAMES))
"""How the base is held, in the order of preference: in 16 bits, 8.25 and 4.25."""
RECOMPUTED = ((False, False), (False, True), (True, False), (True, True))
"""The pairs of checkpoint_activations and vit_checkpoint_activations, the fastest first."""
WORTHWHILE = 4
LARGEST_BATCH = 64
SPARE = 1.1
"""A card has to have so many times the estimate: CUDA, its libraries and fragments of memory want the rest."""
FEW = f"fits, with fewer than {WORTHWHILE} samples for each decoding or gather"
DOUBT = 1.02
"""So many times too much has to be estimated of small models before a large one is ruled out."""
SMALL = 2  # layers of each tower


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One base at one layout of the ranks, and what came of it."""

    base: str
    """How the base is held: bf16, fp16 or fp32 if it is whole, else a scheme."""
    ranks: str
    """The data-parallel ranks, times the model-parallel ones, and the stage of ZeRO."""
    recomputed: str
    batch_size: int
    total: float
    """Bytes on a card; about, where `is_exact` is false."""
    is_exact: bool
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fits, and what does not."""

    config: TrainConfig | None
    """The config of the run that fits; None where nothing does."""
    memory: Memory | None
    """The estimate of that run."""
    options: tuple[str, ...]
    """The options that say what the search has chosen."""
    attempts: tuple[Attempt, ...]
    """What was considered, in order; the last one is taken where something fits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """Settings that a step might fit with, all but the batch."""

    config: TrainConfig
    ranks: int
    total_batch: int | None

    @property
    def data_parallel(self) -> int:
        """How many ranks take samples of their own."""
        return self.ranks // self.config.parallel.model_parallel_size

    @property
    def is_offloaded(self) -> bool:
        """Whether the search, and no option, puts the optimizer's state on the host."""
        return self.config.parallel.deepspeed_config is not None and is_open(self.config, "deepspeed_config")

    @property
    def recomputed(self) -> str:
        """What is computed twice, in words."""
        own = self.config.checkpointing
        names = {(False, False): "nothing", (False, True): "ViT", (True, False): "language", (True, True): "both"}
        towers = names[own.checkpoint_activations, own.vit_checkpoint_activations]
        on_host = ["inputs"] * own.checkpoint_offload + ["Adam"] * self.is_offloaded
        return f"{towers}, {' and '.join(on_host)} on host" if on_host else towers

    @cached_property
    def batches(self) -> list[int]:
        """The sizes of a micro-batch that may be taken, ascending; none where the wanted total does not divide."""
        schedule = self.config.schedule
        fixed = None if is_open(self.config, "batch_size") else schedule.batch_size
        if self.total_batch is None:
            return [fixed] if fixed is not None else [*range(1, LARGEST_BATCH + 1)]
        own, rest = divmod(self.total_batch, self.data_parallel)
        if rest:
            return []
        sizes = [size for size in range(1, own + 1) if own % size == 0]
        return [size for size in sizes if fixed in (None, size) and (fixed is not None or size <= LARGEST_BATCH)]

    def config_with(self, batch_size: int) -> TrainConfig:
        """Return the config with that batch, and the accumulation that makes the wanted total of it."""
        config = self.config
        if is_open(config, "batch_size"):
            config = config.replaced(batch_size=batch_size)
        if self.total_batch is not None:
            steps = self.total_batch // (self.data_parallel * batch_size)
            config = config.replaced(gradient_accumulation_steps=steps)
        return config


def is_open(config: TrainConfig, name: str) -> bool:
    """Return whether nobody has said a setting: no option, no file, no run that goes on."""
    return config.origin(name) not in {*BY_HAND, Origin.DEEPSPEED, Origin.RUN_DEFAULT}


class Estimates:
    """The estimates of one base, none made twice."""

    def __init__(self, sizes: dict[str, Any], *, device: str = "cuda"):
        self.device = device
        self.sizes = sizes
        self._models: dict[tuple, CogVLMModel] = {}
        self._peaks: dict[tuple, int] = {}

    def plan(self, candidate: Candidate, batch_size: int) -> Plan:
        """Return the plan of a candidate with that batch."""
        return plan_of(candidate.config_with(batch_size), self.sizes, ranks=candidate.ranks, device=self.device)

    def memory(self, plan: Plan) -> Memory:
        """Return the memory of a rank, as `estimate_run` gives it."""
        return self._with_activations(plan, self._peak(plan, self.sizes))

    def without_step(self, plan: Plan) -> Memory:
        """Return the memory of a rank that keeps nothing for a backward pass: less than any step takes."""
        return self._with_activations(plan, 0)

    def about(self, plan: Plan) -> Memory:
        """Return the memory of a rank, nearly: by steps of one sample and of two in models with few layers."""
        batch_size = plan.step["batch_size"]
        first = self._extrapolated(_with_batch(plan, 1))
        if batch_size > 1:
            first += (batch_size - 1) * (self._extrapolated(_with_batch(plan, 2)) - first)
        return self._with_activations(plan, first)

    def _with_activations(self, plan: Plan, activations: float) -> Memory:
        parts = {name: plan.step[name] for name in ("dtype", "model_parallel_size", "quantize")}
        key = (*parts.values(), repr(plan.lora))
        if key not in self._models:
            self._models[key] = fake_model(plan.sizes, plan.lora, **parts)
        return memory_of(self._models[key], plan.engine, activations=activations, **plan.ranks)

    def _extrapolated(self, plan: Plan) -> float:
        """Return the activations of the whole model by the line through those of small ones."""
        layers = (self.sizes["num_layers"], self.sizes["eva_args"]["num_layers"])
        if min(layers) <= SMALL + 1 or _names_layers(plan):
            return self._peak(plan, self.sizes)
        small = self._peak(plan, _with_layers(self.sizes, SMALL, SMALL))
        slopes = [
            self._peak(plan, _with_layers(self.sizes, SMALL + 1, SMALL)) - small,
            self._peak(plan, _with_layers(self.sizes, SMALL, SMALL + 1)) - small,
        ]
        return small + sum(slope * (count - SMALL) for slope, count in zip(slopes, layers))

    def _peak(self, plan: Plan, sizes: dict[str, Any]) -> int:
        settings = {**plan.step, **ways_of(plan.engine)}
        layers = (sizes["num_layers"], sizes["eva_args"]["num_layers"])
        key = (layers, repr(plan.lora), *settings.values())
        if key not in self._peaks:
            _, self._peaks[key] = fake_step(sizes, plan.lora, **settings)
        return self._peaks[key]


def _with_batch(plan: Plan, batch_size: int) -> Plan:
    return replace(plan, step={**plan.step, "batch_size": batch_size})


def _with_layers(sizes: dict[str, Any], language: int, vit: int) -> dict[str, Any]:
    """Return the sizes of a model with so many layers in its towers."""
    return {**sizes, "num_layers": language, "eva_args": {**sizes["eva_args"], "num_layers": vit}}


def _names_layers(plan: Plan) -> bool:
    """Return whether adapters or quantised weights may differ from layer to layer."""
    lora = plan.lora
    quantize = plan.step["quantize"]
    patterns = [lora.target_modules, lora.exclude_modules, lora.modules_to_save, [*lora.rank_pattern]]
    if quantize is not None:
        patterns += [quantize.modules, quantize.keep_modules]
    return lora.layers_to_transform is not None or any(character.isdigit() for character in str(patterns))


def fit(
    config: TrainConfig,
    *,
    ranks: int,
    available: float,
    device: str = "cuda",
    total_batch: int | None = None,
    offload: str | Path | None = None,
    estimates: Estimates | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Return the settings with which a step of a run takes at most `available` bytes on each of `ranks` cards.

    What the config's options name stays as it is. total_batch: samples of an optimizer step over all ranks, which
    accumulation makes up; None accumulates as the config says. offload: a DeepSpeed file that puts the optimizer's
    state on the host. estimates: those of an earlier search for this base and device. tell: is told
    what is looked at. Raises ConfigError and CheckpointError as `estimate_run` does, and ConfigError where the wanted
    total cannot be made.
    """
    if config.problems:
        raise ConfigError("; ".join(config.problems))
    if estimates is None:
        estimates = Estimates(sizes_of(config.model.base), device=device)
    settled = settle(config, device=device, environ={"WORLD_SIZE": str(ranks)}).config
    layouts = [*_layouts(settled, estimates.sizes, ranks)]
    if not layouts:
        problems = parallel_problems(estimates.sizes, settled.parallel.model_parallel_size, ranks)
        raise ConfigError(f"--model-parallel-size: {'; '.join(problems)}")
    _refuse_total(settled, layouts, ranks, total_batch)
    attempts: list[Attempt] = []
    small: list[tuple[Candidate, list[int]]] = []  # what fits with few samples at once
    for layout in layouts:
        variants = _variants(layout, offload, device)
        candidates = [Candidate(config=variant, ranks=ranks, total_batch=total_batch) for variant in variants]
        candidates = [candidate for candidate in candidates if candidate.batches]
        if not candidates:
            continue
        tell(f"{_base_name(layout, estimates.sizes)}, {_ranks_text(candidates[0])}")
        for candidate, batches in _promising(candidates, estimates, available):
            if not is_worthwhile(candidate, batches[-1], estimates.sizes):
                small.append((candidate, batches))
                attempts.append(_nearly(candidate, batches[-1], estimates, FEW))
                continue
            taken = _exactly(candidate, batches, estimates, available)
            if taken is not None and is_worthwhile(candidate, taken[0], estimates.sizes):
                return _fit(candidate, *taken, estimates, attempts, settled)
        if not any(candidate in candidates for candidate, _ in small):
            attempts.append(_too_large(candidates[-1], estimates, available))
    for candidate, batches in sorted(small, key=lambda pair: -pair[1][-1]):
        taken = _exactly(candidate, batches, estimates, available)
        if taken is not None:
            return _fit(candidate, *taken, estimates, attempts, settled)
    return Fit(config=None, memory=None, options=(), attempts=tuple(attempts))


def is_worthwhile(candidate: Candidate, batch_size: int, sizes: dict[str, Any]) -> bool:
    """Return whether a batch is large enough for its base to be taken before those that come later."""
    is_quantized = candidate.config.quantization.quantize != NONE or KEY in sizes
    is_gathered = candidate.config.parallel.zero_stage == 3 and candidate.data_parallel > 1
    return not (is_quantized or is_gathered) or batch_size >= min(WORTHWHILE, candidate.batches[-1])


def _layouts(settled: TrainConfig, sizes: dict[str, Any], ranks: int) -> Iterator[TrainConfig]:
    """Yield the config with each base at each layout of the ranks, in the order of preference."""
    selects = any(settled.value(name) != DEFAULTS[name] for name in ("quantize_modules", "keep_modules"))
    bases: Sequence[str] = BASES[1:] if selects else BASES
    if KEY in sizes or not is_open(settled, "quantize"):
        bases = [settled.quantization.quantize]
    mp_sizes: Sequence[int] = [settled.parallel.model_parallel_size]
    if is_open(settled, "model_parallel_size") and settled.parallel.deepspeed_config is None:
        mp_sizes = range(1, ranks + 1)
    whole = [(base, mp_size) for base in bases if base == NONE for mp_size in mp_sizes]
    quantized = [(base, mp_size) for mp_size in mp_sizes for base in bases if base != NONE]
    for base, mp_size in [*whole, *quantized]:
        if parallel_problems(sizes, mp_size, ranks):
            continue
        is_partitioned = base == NONE and KEY not in sizes and mp_size < ranks and mp_size in (1, mp_sizes[-1])
        stages = [2, 3] if is_partitioned else [2]
        if not is_open(settled, "zero_stage"):
            stages = [settled.parallel.zero_stage]
        for stage in stages:
            yield settled.replaced(quantize=base, model_parallel_size=mp_size, zero_stage=stage)


def _variants(layout: TrainConfig, offload: str | Path | None, device: str) -> Iterator[TrainConfig]:
    """Yield a layout with what may be recomputed, and with the inputs of that and the optimizer's state on the host.

    offload: a DeepSpeed file that puts the optimizer's state there. On a CPU nothing is put anywhere else.
    """
    asked = layout.checkpointing
    for language, vit in RECOMPUTED[1:] if asked.checkpoint_offload else RECOMPUTED:
        if language >= asked.checkpoint_activations and vit >= asked.vit_checkpoint_activations:
            yield layout.replaced(checkpoint_activations=language, vit_checkpoint_activations=vit)
    if not device.startswith("cuda"):
        return
    last = layout.replaced(checkpoint_activations=True, vit_checkpoint_activations=True)
    if is_open(layout, "checkpoint_offload"):
        last = last.replaced(checkpoint_offload=True)
        yield last
    if offload is not None and layout.parallel.deepspeed_config is None:
        yield last.replaced(deepspeed_config=str(offload))


def _refuse_total(settled: TrainConfig, layouts: Sequence[TrainConfig], ranks: int, total: int | None) -> None:
    """Raise ConfigError where no layout makes the wanted total of whole micro-batches, or two options say it."""
    if total is None:
        return
    if not is_open(settled, "gradient_accumulation_steps"):
        raise ConfigError(
            f"--total-batch {total}: accumulation makes it up, and --gradient-accumulation-steps "
            f"{settled.schedule.gradient_accumulation_steps} is given as well; leave one of them out"
        )
    if any(Candidate(config=layout, ranks=ranks, total_batch=total).batches for layout in layouts):
        return
    shares = sorted({ranks // layout.parallel.model_parallel_size for layout in layouts})
    fixed = "" if is_open(settled, "batch_size") else f" x --batch-size {settled.schedule.batch_size}"
    raise ConfigError(f"--total-batch: got {total}, wanted a multiple of {shares[0]} data-parallel ranks{fixed}")


def _promising(
    candidates: Sequence[Candidate], estimates: Estimates, available: float
) -> Iterator[tuple[Candidate, list[int]]]:
    """Yield the candidates of one layout that may fit, with the batches with which they may, ascending.

    These are the fastest with a worthwhile batch, and so on; if none has one, what takes the least memory. With the
    optimizer's state on the host come those that would not fit else.
    """
    plain = [candidate for candidate in candidates if not candidate.is_offloaded]
    least = plain[-1]
    batches = _perhaps(least, estimates, available)
    is_small = bool(batches) and not is_worthwhile(least, batches[-1], estimates.sizes)
    for candidate in plain[:-1] if batches and not is_small else ():
        possible = _perhaps(candidate, estimates, available)
        if possible and is_worthwhile(candidate, possible[-1], estimates.sizes):
            yield candidate, possible
    if batches:
        yield least, batches
    if is_small and estimates.about(estimates.plan(least, batches[0])).total <= available:
        return
    for candidate in candidates:
        possible = _perhaps(candidate, estimates, available) if candidate.is_offloaded else []
        if possible:
            yield candidate, possible


def _perhaps(candidate: Candidate, estimates: Estimates, available: float) -> list[int]:
    """Return the batches with which a candidate may fit, ascending; none where the smallest is too large already."""
    limit = DOUBT * available

    def bytes_of(batch_size: int) -> float:
        return estimates.about(estimates.plan(candidate, batch_size)).total

    smallest = candidate.batches[0]
    if estimates.without_step(estimates.plan(candidate, smallest)).total > available or bytes_of(smallest) > limit:
        return []
    return candidate.batches[: bisect_right(candidate.batches, limit, key=bytes_of)]


def _exactly(
    candidate: Candidate, batches: Sequence[int], estimates: Estimates, available: float
) -> tuple[int, Memory] | None:
    """Return (the largest of the batches that fits, its memory) by estimates of the whole model; None if none does."""
    taken = None
    low = 0
    high = len(batches)
    steps = 0
    while low < high:
        middle = high - 1 if steps < 2 else (low + high) // 2  # most often the first is right, or the next
        memory = estimates.memory(estimates.plan(candidate, batches[middle]))
        steps += 1
        if memory.total <= available:
            taken = batches[middle], memory
            low = middle + 1
        else:
            high = middle
    return taken


def _too_large(candidate: Candidate, estimates: Estimates, available: float) -> Attempt:
    """Return the attempt with what takes the least memory of a layout, and what takes the most of it."""
    batch_size = candidate.batches[0]
    memory = estimates.without_step(estimates.plan(candidate, batch_size))
    if memory.total <= available:
        memory = estimates.about(estimates.plan(candidate, batch_size))
    size, name = max((getattr(memory, field.name), field.name) for field in fields(memory))
    verdict = f"too large: {size / memory.total:.0%} are {name}"
    return _attempt(candidate, batch_size, memory, estimates, verdict, is_exact=False)


def _nearly(candidate: Candidate, batch_size: int, estimates: Estimates, verdict: str) -> Attempt:
    memory = estimates.about(estimates.plan(candidate, batch_size))
    return _attempt(candidate, batch_size, memory, estimates, verdict, is_exact=False)


def _attempt(
    candidate: Candidate, batch_size: int, memory: Memory, estimates: Estimates, verdict: str, *, is_exact: bool
) -> Attempt:
    return Attempt(
        base=_base_name(candidate.config, estimates.sizes),
        ranks=_ranks_text(candidate),
        recomputed=candidate.recomputed,
        batch_size=batch_size,
        total=memory.total,
        is_exact=is_exact,
        verdict=verdict,
    )


def _fit(
    candidate: Candidate,
    batch_size: int,
    memory: Memory,
    estimates: Estimates,
    attempts: Sequence[Attempt],
    settled: TrainConfig,
) -> Fit:
    """Return what is taken, after the attempts before it."""
    taken = _attempt(candidate, batch_size, memory, estimates, "taken", is_exact=True)
    config = candidate.config_with(batch_size)
    return Fit(config=config, memory=memory, options=_options(config, settled), attempts=(*attempts, taken))


def _options(config: TrainConfig, settled: TrainConfig) -> tuple[str, ...]:
    """Return the options by which a run gets this config, beside those that it has already."""
    options: list[str] = []
    names = ("quantize", "zero_stage", "model_parallel_size", "deepspeed_config")
    switches = ("checkpoint_activations", "vit_checkpoint_activations", "checkpoint_offload")
    for name in (*names, *switches, "batch_size", "gradient_accumulation_steps"):
        value = config.value(name)
        if value != settled.value(name) or (name == "batch_size" and is_open(settled, name)):
            options += [KNOWN[name].options[0], *([] if name in switches else [str(value)])]
    return tuple(options)


def _base_name(config: TrainConfig, sizes: dict[str, Any]) -> str:
    """Return how a base is held: a dtype, or the name of a scheme."""
    if KEY in sizes:
        return Quantization.from_dict(sizes[KEY]).scheme
    if config.quantization.quantize != NONE:
        return config.quantization.quantize
    return "bf16" if config.precision.bf16 else "fp16" if config.precision.fp16 else "fp32"


def _ranks_text(candidate: Candidate) -> str:
    """Return how the ranks share the work."""
    parts = candidate.config.parallel.model_parallel_size
    copies = f"{candidate.data_parallel} x {parts}" if parts > 1 else str(candidate.data_parallel)
    return f"{copies}, ZeRO {candidate.config.parallel.zero_stage}"


def fit_table(result: Fit) -> str:
    """Return a table with a line for each attempt, in GB (10^9 bytes) or, for small models, MB."""
    unit, scale = ("GB", 1e9) if max((attempt.total for attempt in result.attempts), default=0) >= 1e9 else ("MB", 1e6)
    lines = [("base", "GPUs", "recomputed", "batch", unit, "")]
    for attempt in result.attempts:
        size = f"{'' if attempt.is_exact else '~'}{attempt.total / scale:.1f}"
        lines.append((attempt.base, attempt.ranks, attempt.recomputed, str(attempt.batch_size), size, attempt.verdict))
    widths = [max(map(len, column)) for column in zip(*lines)]
    justify = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
    return "\n".join(
        "  ".join(place(cell, width) for place, cell, width in zip(justify, line, widths)).rstrip() for line in lines
    )
