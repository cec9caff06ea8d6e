"""scaling.md: the costs of COGVLM_17B as text and tables."""

from collections.abc import Iterator

from benchmarks.scaling import layouts
from benchmarks.scaling.communication import MicroBatch, Setting
from benchmarks.scaling.layouts import Cost, best, costs, operations, recommended
from benchmarks.scaling.sizes import COGVLM_17B, Sizes

BATCH = MicroBatch(samples=4, length=1288, images=4, vision_tokens=4 * 1226, labelled=4 * 16)
SETTING = Setting(sizes=Sizes(COGVLM_17B), batch=BATCH, rank=16, size=2, checkpointing=True)
GPUS, GIGABYTES = (8, 64, 512), (80, 40, 24)

ASSUMED = f"""\
# What scaling costs

**Computed, not measured.** `python -m benchmarks.scaling > benchmarks/scaling.md` writes this page.

- **Counted.** The collectives, with their bytes, are those that one training step of a tiny CogVLM makes on two gloo
  ranks, caught at torch's c10d operators: data-parallel with ZeRO 1, 2 and 3, model-parallel with and without
  activation checkpointing; with `-m matrix` also both at once on four ranks. `tests/benchmarks/test_scaling.py`
  demands that the formulas in `benchmarks/scaling/communication.py` give the same, and that the numbers of weights and
  adapter parameters are the model's. The versions are those of constraints.txt (DeepSpeed 0.19.8).
- **Computed from them**: everything below, with the sizes of CogVLM-17B.
- **Assumed**: {layouts.NVLINK / 1e9:.0f} GB/s per direction and GPU within a machine of {layouts.MACHINE} GPUs, and
  {layouts.NETWORK / 1e9:.0f} GB/s per GPU between machines; a group with k GPUs in each machine uses their k network
  cards. Rings: an all-reduce sends 2 (n - 1) / n of its payload, a gather or scatter (n - 1) / n. A collective takes at
  least {layouts.LATENCY_INSIDE * 1e6:.0f} us within a machine, {layouts.LATENCY_BETWEEN * 1e6:.0f} us between. Matrix
  products run at {layouts.ARITHMETIC / 1e12:.0f} TFLOP/s. **Nothing overlaps**: the seconds are an upper bound, above
  all those of ZeRO-3, which prefetches. Reading images is left out.
- **Estimated**: memory, by `sat-lora estimate`: a step of the same code on tensors without memory. A layout fits if
  it takes {layouts.SPARE:.0%} of the memory or less. That is while training; loading needs more where all of a rank's
  part passes through the GPU.
"""

READING = """\
## How to read it

- **ZeRO 1 and 2 cost the same and next to nothing**: only adapters have gradients. DeepSpeed sums whole buckets under
  either stage (an all-reduce, not the reduce-scatter that the paper has for stage 2) and gathers the adapters after the
  step. Stage 2 saves memory where several micro-batches make a step: only then do gradients wait beside activations.
- **ZeRO-3 moves the frozen base twice in every micro-batch**, whatever its gradients. It is the way to fit, not to
  scale. The bytes are an upper bound, with nothing kept between uses: counted with DeepSpeed's limits at 0. Its default
  of 1e9 live parameters saves up to 6 %.
- **Model parallelism sends activations**: two all-reduces per linear and pass, one of tokens x width and one of
  tokens x r for the adapter. It belongs inside a machine, and it divides the samples of a step as well.
- **From 8 to 512 GPUs hardly anything changes per rank** with ZeRO 1 and 2; what changes is the batch. 512 GPUs with 4
  samples each make steps of 2,048 samples: with a small data set, take a smaller `--batch-size`, not more parts.
- Not covered: GPUs without NVLink (model parallelism and ZeRO-3 get slower by the ratio of the speeds; many with
  24 GB are such), FP8, offloading, DeepSpeed's hierarchical options (`zero_hpz_partition_size` would keep ZeRO-3's
  second gather inside a machine).
"""


def report() -> Iterator[str]:
    """The lines of scaling.md."""
    yield ASSUMED
    weights, adapter = SETTING.sizes.weights() / 1e9, SETTING.sizes.adapter(SETTING.rank) / 1e6
    yield f"Setting: {weights:.2f} billion weights, {adapter:.1f} million adapter parameters in all linears,"
    yield f"r {SETTING.rank}, bf16; micro-batches of {BATCH.samples} samples x {BATCH.length} tokens, each with an"
    yield f"image of 490 x 490 and {BATCH.labelled // BATCH.samples} tokens of answer; activations checkpointed; no"
    yield "accumulation. The linears take"
    yield f"{operations(SETTING) / 1e12:.0f} TFLOP per micro-batch.\n"
    yield from _recommendations()
    for gpus in GPUS:
        yield from _table(gpus)
    yield READING.rstrip()


def _recommendations() -> Iterator[str]:
    yield "## Recommended layouts\n"
    yield "The most samples per second of what fits; of equals, the one with less memory.\n"
    yield "| GPUs | memory of each | take | samples/s | memory per rank | why not another |"
    yield "|---|---|---|---|---|---|"
    for gpus in GPUS:
        for gigabytes in GIGABYTES:
            chosen = recommended(SETTING, gpus, gigabytes)
            if chosen is None:
                yield f"| {gpus} | {gigabytes} GB | nothing fits | | | |"
                continue
            yield (
                f"| {gpus} | {gigabytes} GB | {_name(chosen)} | {chosen.samples_per_second:,.0f} "
                f"| {chosen.memory.total / 1e9:.1f} GB | {_why(chosen, gigabytes)} |"
            )
    yield ""


def _why(chosen: Cost, gigabytes: float) -> str:
    """What a faster layout would need, and how much slower the fastest of the other kinds that fit would be."""
    faster = [one for one in costs(SETTING, chosen.gpus) if one.samples_per_second > 1.01 * chosen.samples_per_second]
    reasons = []
    if faster:
        smallest = min(faster, key=lambda one: (round(one.memory.total), -one.stage))
        reasons.append(f"{_name(smallest)} is faster, but takes {smallest.memory.total / 1e9:.1f} GB")
    kind = (chosen.parts, chosen.stage == 3)
    second = best([o for o in costs(SETTING, chosen.gpus) if o.fits(gigabytes) and (o.parts, o.stage == 3) != kind])
    if second is not None:
        slower = 1 - second.samples_per_second / chosen.samples_per_second
        reasons.append(f"{_name(second)}: {slower:.0%} fewer samples/s")
    return "; ".join(reasons)


def _name(one: Cost) -> str:
    return f"ZeRO-{one.stage}, model-parallel {one.parts}"


def _table(gpus: int) -> Iterator[str]:
    """Every layout at one size. GB are 1e9 bytes."""
    yield f"## {gpus} GPUs\n"
    yield "Per rank and step: GB sent, and seconds, between data-parallel and between model-parallel ranks; GB held.\n"
    yield (
        "| ZeRO | model-parallel | samples | sent, data | sent, model | s, data | s, model | s, arithmetic | samples/s "
        "| weights | adapter, Adam | activations | buffers | GB in all |"
    )
    yield "|" + "---|" * 14
    for one in costs(SETTING, gpus):
        held = one.memory
        adapter = held.adapters + held.gradients + held.optimizer
        parts = (held.weights, adapter, held.activations, held.buffers, held.total)
        yield (
            f"| {one.stage} | {one.parts} | {one.samples} | {one.data_bytes / 1e9:.2f} | {one.model_bytes / 1e9:.1f} "
            f"| {one.data_seconds:.3f} | {one.model_seconds:.3f} | {one.arithmetic_seconds:.2f} "
            f"| {one.samples_per_second:,.1f} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |"
        )
    yield ""
