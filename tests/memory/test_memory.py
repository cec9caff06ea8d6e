"""The memory of a run: its estimate against what the model, DeepSpeed and the process really take."""

import ctypes
import gc
import time
from operator import gt

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.models import config_of as sizes_of_benchmark
from sat_lora import LoraConfig, add_lora, quantize_model
from sat_lora.cogvlm import build_cogvlm
from sat_lora.memory.components import GLOO_THREADS, Memory, memory_findings, memory_table
from sat_lora.memory.estimate import estimate, fake_step
from sat_lora.memory.estimate_run import plan_of
from sat_lora.memory.live_memory import LiveBytes, peak_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.quantization.config import NAMES, Quantization
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.loss import answer_loss_sum
from sat_lora.training.steps.optimizer_state import create_moments
from tests.support.configs import parse_options
from tests.support.estimated_models import DTYPES, ENGINE, rows_of, sizes
from tests.support.memory import anonymous_memory, data_memory, peak_of_anonymous_memory
from tests.support.paths import TINY_BASE
from tests.support.ranks import run_ranks

CPU, WORDS = torch.device("cpu"), 24
LORA = LoraConfig(r=8, lora_dropout=0.1)
PATIENCE = 300  # seconds, on a machine with other work


def engine_config(stage, dtype):
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_max_live_parameters": 10**9}
    return {**ENGINE, "zero_optimization": zero, "bf16": {"enabled": dtype == "bf16"}}


def built(name, dtype, checkpoint, parts, scheme=None):
    config = sizes(name)
    switches = dict(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint)
    model = build_cogvlm(config, dtype=DTYPES[dtype], model_parallel_size=parts, **switches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    if scheme is not None:
        quantize_model(model, scheme=scheme)
    add_lora(model, LORA)
    return model.train(), config


def step_of(config, dtype, checkpoint, rows, parts, scheme=None):
    return dict(
        quantize=None if scheme is None else Quantization(scheme=scheme),
        dtype=DTYPES[dtype], batch_size=rows, length=config["image_length"] + 2 + WORDS, labelled=WORDS // 4,
        model_parallel_size=parts, checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint,
    )  # fmt: skip


def estimated(name, stage, dtype, checkpoint, rows, ranks, parts, on_device=True, scheme=None):
    config = sizes(name)
    step = step_of(config, dtype, checkpoint, rows, parts, scheme)
    return estimate(
        config, LORA, engine_config(stage, dtype), data_parallel_size=ranks // parts, on_device=on_device, **step
    )


# Activations


def let_go_of_tensors():
    """From now on a collective operation returns when gloo's threads hold none of its tensors, as they else may for a
    moment: by chance those of one layer are then counted with the next one's.
    """
    for name in ("all_reduce", "all_gather"):
        setattr(torch.distributed, name, released(getattr(torch.distributed, name)))


def released(collective):
    def collective_and_release(*args, **kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        holders = [tensor._use_count() for tensor in tensors]
        handle = collective(*args, **kwargs)
        while handle is None and any(map(gt, (tensor._use_count() for tensor in tensors), holders)):
            time.sleep(0.0001)
        return handle

    return collective_and_release


def measured_activations(name, dtype, checkpoint, rows, parts, scheme=None):
    init_model_parallel(init_distributed(), parts)
    let_go_of_tensors()
    model, config = built(name, dtype, checkpoint, parts, scheme)
    batch = rows_of(config, rows)
    return peak_of(lambda: answer_loss_sum(model, batch).backward(), model, CPU)


def estimated_activations(name, dtype, checkpoint, rows, parts, scheme=None):
    config = sizes(name)
    return fake_step(config, LORA, **step_of(config, dtype, checkpoint, rows, parts, scheme))[1]


@pytest.mark.parametrize(
    "name, dtype, checkpoint, rows, parts",
    [("tiny", "fp32", False, 1, 1), ("tiny", "fp32", True, 3, 1), ("tiny", "bf16", False, 2, 2),
     ("tiny", "bf16", True, 2, 1), *(pytest.param(*case, marks=pytest.mark.matrix) for case in
                                    (("large", "fp32", True, 1, 1), ("large", "bf16", False, 1, 2)))],
)  # fmt: skip
def test_activations_are_estimated_as_they_are_measured(name, dtype, checkpoint, rows, parts):
    measured = run_ranks(measured_activations, parts, name, dtype, checkpoint, rows, parts)
    (found,) = run_ranks(estimated_activations, 1, name, dtype, checkpoint, rows, parts)
    for wanted in measured:
        assert found == pytest.approx(wanted, rel=0.02), (found, measured)


@pytest.mark.parametrize(
    ("name", "dtype", "checkpoint", "scheme"),
    [("tiny", "fp32", False, "nf4"), pytest.param("large", "bf16", True, "int8", marks=pytest.mark.matrix)],
)
def test_those_of_a_quantised_base_too(name, dtype, checkpoint, scheme):
    case = name, dtype, checkpoint, 1, 1, scheme
    (measured,) = run_ranks(measured_activations, 1, *case)
    (found,) = run_ranks(estimated_activations, 1, *case)
    assert found == pytest.approx(measured, rel=0.02), (found, measured)


# The whole, by the process's memory


def measured_peak(stage, dtype, checkpoint, parts, at_once=True, scheme=None):
    """Anonymous memory at its peak over two whole steps, beyond what was there before the model.

    Of a second engine: with the first come modules and oneDNN's kernels and caches, 50 to 130 MB. at_once: ZeRO-3's
    gathers are waited for where they begin. Else it is a matter of chance what they meet with the second buffer that
    gloo gathers into, and that no GPU has.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    init_model_parallel(init_distributed(), parts)
    if at_once:
        wait_for_gathers()
    return [taken_by_a_run(stage, dtype, checkpoint, parts, libc, scheme) for _ in range(2)][1]


def wait_for_gathers():
    from deepspeed.runtime.zero import partition_parameters

    gather = partition_parameters._dist_allgather_fn

    def gather_and_wait(*args, **kwargs):
        handle = gather(*args, **kwargs)
        handle.wait()
        return handle

    partition_parameters._dist_allgather_fn = gather_and_wait


def taken_by_a_run(stage, dtype, checkpoint, parts, libc, scheme):
    gc.collect()
    libc.malloc_trim(0)
    before = anonymous_memory()
    model, config = built("large", dtype, checkpoint, parts, scheme)
    engine = start_engine(model, adapter_optimizer(model, lr=1e-3), engine_config(stage, dtype))
    create_moments(engine)
    batch = rows_of(config, 1)
    gc.collect()
    libc.malloc_trim(0)

    def train():
        for _ in range(2):
            engine.backward(answer_loss_sum(engine, batch))
            engine.step()

    return anonymous_memory() - before + peak_of_anonymous_memory(train)


SETTINGS = [
    (2, "bf16", True, 1, 1),
    *(
        pytest.param(*one, marks=pytest.mark.matrix)
        for one in (
            (0, "fp32", False, 1, 1),
            (1, "fp32", True, 2, 1),
            (2, "fp32", False, 2, 1),
            (0, "fp32", True, 2, 2),
            (1, "bf16", False, 2, 2),
            (3, "bf16", True, 2, 1),
            (3, "fp32", False, 2, 1),
        )
    ),
]


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("stage, dtype, checkpoint, ranks, parts", SETTINGS)
def test_the_whole_estimate_is_within_ten_percent_of_the_peak(stage, dtype, checkpoint, ranks, parts):
    (found,) = run_ranks(estimated, 1, "large", stage, dtype, checkpoint, 1, ranks, parts)
    for peak in run_ranks(measured_peak, ranks, stage, dtype, checkpoint, parts, timeout=PATIENCE):
        assert found.total == pytest.approx(peak, rel=0.1), (found, found.total / peak)


def estimated_recipes():
    """The bytes of a step of CogVLM-17B by the recipe for small cards of docs/quantized.md, for each of two ends."""
    recipe = "--quantize nf4 --checkpoint-activations --vit_checkpoint_activations --max_length 1288 --zero-stage 2"
    given = ["--from_pretrained", str(TINY_BASE), *recipe.split(), "--r", "16", "--bf16", "--batch-size", "1"]
    sizes_of_17b = sizes_of_benchmark("full")
    return [
        plan_of(parse_options([*given, *more]), sizes_of_17b, ranks=1).memory.total
        for more in ([], ["--checkpoint_offload"])
    ]


@pytest.mark.matrix
@pytest.mark.timeout(2 * PATIENCE)
def test_cogvlm_17b_in_nf4_takes_less_than_13_gib():
    ((alone, with_inputs_on_host),) = run_ranks(estimated_recipes, 1, timeout=PATIENCE)
    assert with_inputs_on_host < alone < 13 * 2**30


@pytest.mark.matrix
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("stage, dtype, checkpoint, ranks", [(2, "bf16", True, 1), (3, "fp32", False, 2)])
def test_the_estimate_of_a_quantised_run_is_so_too(stage, dtype, checkpoint, ranks, scheme):
    (found,) = run_ranks(estimated, 1, "large", stage, dtype, checkpoint, 1, ranks, 1, True, scheme)
    for peak in run_ranks(measured_peak, ranks, stage, dtype, checkpoint, 1, True, scheme, timeout=PATIENCE):
        assert found.total == pytest.approx(peak, rel=0.1), (found, found.total / peak)


@pytest.mark.matrix
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("dtype, checkpoint", [("bf16", True), ("fp32", False)])
def test_a_cpu_takes_no_more_than_is_estimated_with_gloos_buffers(dtype, checkpoint):
    """Between the estimates without and with them: how many there are at the peak depends on the other rank."""
    setting = "large", 3, dtype, checkpoint, 1, 2, 1
    (without,) = run_ranks(estimated, 1, *setting)
    (found,) = run_ranks(estimated, 1, *setting, on_device=False)
    for peak in run_ranks(measured_peak, 2, 3, dtype, checkpoint, 1, at_once=False, timeout=PATIENCE):
        assert 0.9 * without.total < peak < found.total, (without.total / peak, found.total / peak)


GATHERED = 100_000_000  # bytes


def memory_of_gathers(count):
    """Bytes that gloo takes for `count` gathers which wait for the other rank, beside their tensors."""
    init_model_parallel(init_distributed())
    outputs = [torch.zeros(GATHERED, dtype=torch.uint8) for _ in range(count)]
    own = torch.zeros(GATHERED // 2, dtype=torch.uint8)
    group, other = torch.distributed.group.WORLD, torch.distributed.new_group()
    before, is_first = data_memory(), torch.distributed.get_rank() == 0
    if not is_first:
        torch.distributed.barrier(other)  # until the first rank has looked
    works = [torch.distributed.all_gather_into_tensor(out, own, group=group, async_op=True) for out in outputs]
    taken = settled(data_memory) - before  # when gloo's threads have begun, and wait
    if is_first:
        torch.distributed.barrier(other)
    for work in works:
        work.wait()
    return taken


def settled(look):
    """What `look` says when it has said the same for two seconds."""
    seen, since = look(), time.monotonic()
    while time.monotonic() - since < 2:
        time.sleep(0.1)
        now = look()
        if now != seen:
            seen, since = now, time.monotonic()
    return seen


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.matrix), 3])
def test_gloo_takes_a_buffer_of_its_own_for_each_gather_that_a_thread_works_on(count):
    taken, _ = run_ranks(memory_of_gathers, 2, count)
    assert taken == pytest.approx(min(count, GLOO_THREADS) * GATHERED, rel=0.05)


# Small parts


def test_live_bytes_counts_every_storage_once_until_it_is_freed():
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        one = torch.zeros(256)
        view = one[:10]
        _ = known[5:]
        assert (live.now, live.peak) == (1024, 1024)
        two = one + 1
        del one
        assert (live.now, live.peak) == (2048, 2048)
        del view, two
    assert (live.now, live.peak) == (0, 2048)


def test_what_does_not_fit_is_a_finding_with_its_largest_parts():
    memory = Memory(weights=3e9, adapters=1e6, gradients=1e6, optimizer=6e6, buffers=1e8, activations=9e9)
    assert memory_findings(memory, 13e9) == [] == memory_findings(memory, None)
    (finding,) = memory_findings(memory, 12e9)
    assert finding.code == "memory"
    assert "takes 11.28 GiB, the device has 11.18 GiB" in finding.seen
    assert "activations 8.38 GiB, weights 2.79 GiB, buffers 0.09 GiB" in finding.seen


def test_alike_ranks_share_a_line_of_the_table():
    memory = Memory(weights=2**30, adapters=0, gradients=0, optimizer=0, buffers=0)
    other = Memory(weights=2**31, adapters=0, gradients=0, optimizer=0, buffers=0)
    lines = memory_table([memory, memory, memory, other, memory], [2**33, 2**33, 2**33, None, 2**32]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0-2", "3", "4"]
    assert lines[2].split()[-2:] == ["1.00", "8.00"] and lines[3].split()[-2:] == ["2.00", "?"]
