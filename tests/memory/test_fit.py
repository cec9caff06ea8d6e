"""`sat-lora estimate --fit`: the search, on arithmetic in place of estimates; and the command, on the tiny base."""

import contextlib
import io
import json
import shlex

import pytest

from benchmarks.models import config_of as sizes_of_benchmark
from sat_lora.cli import main
from sat_lora.errors import ConfigError
from sat_lora.memory.components import Memory
from sat_lora.memory.fit import LARGEST_BATCH, Candidate, Estimates, fit, fit_table
from tests.support.configs import parse_options
from tests.support.paths import ROOT, TINY_BASE
from tests.support.patience import patient
from tests.support.ranks import run_ranks

FULL = sizes_of_benchmark("full")
OFFLOAD = ROOT / "finetune_demo" / "offload_optimizer.json"
GB = 1e9
HELD = {None: 35.3 * GB, "int8": 18.4 * GB, "nf4": 9.8 * GB}
SAMPLE = {(False, False): 20 * GB, (False, True): 14 * GB, (True, False): 8 * GB, (True, True): 1.2 * GB}
INPUTS = 0.7 * GB  # of a sample, where both towers are recomputed
ADAM = 1.6 * GB


class Arithmetic(Estimates):
    """Estimates of a model whose memory is known. optimism: what `about` says of what the activations are."""

    def __init__(self, optimism=1.0):
        super().__init__(FULL)
        self.optimism = optimism
        self.exact = 0

    def of(self, plan, share):
        step, zero = plan.step, plan.engine["zero_optimization"]
        scheme = None if step["quantize"] is None else step["quantize"].scheme
        copies = plan.data_parallel_size if zero["stage"] == 3 and scheme is None else 1
        sample = SAMPLE[step["checkpoint_activations"], step["vit_checkpoint_activations"]]
        kept = (sample - INPUTS * step["checkpoint_offload"]) * step["batch_size"]
        return Memory(
            weights=HELD[scheme] / step["model_parallel_size"] / copies,
            adapters=0.3 * GB,
            gradients=0.3 * GB,
            optimizer=0 if "offload_optimizer" in zero else ADAM,
            buffers=0,
            activations=kept * share,
        )

    def memory(self, plan):
        self.exact += 1
        return self.of(plan, 1)

    def about(self, plan):
        return self.of(plan, self.optimism)

    def without_step(self, plan):
        return self.of(plan, 0)


def search(size, *options, ranks=1, optimism=1.0, offload=OFFLOAD, **more):
    config = parse_options(["--from_pretrained", str(TINY_BASE), *map(str, options)])
    estimates = Arithmetic(optimism)
    found = fit(config, ranks=ranks, available=size * GB, offload=offload, estimates=estimates, **more)
    if found.memory is not None:
        assert found.memory.total <= size * GB
        assert found.attempts[-1].is_exact and found.attempts[-1].total == found.memory.total
    return " ".join(found.options).replace(str(OFFLOAD), "OFFLOAD"), found, estimates


BOTH = "--checkpoint-activations --vit_checkpoint_activations"
ON_HOST = f"{BOTH} --checkpoint_offload"


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (10, None),
        (11.1, f"--quantize nf4 --deepspeed_config OFFLOAD {ON_HOST} --batch-size 1"),
        (12.6, f"--quantize nf4 {ON_HOST} --batch-size 1"),
        (14, f"--quantize nf4 {ON_HOST} --batch-size 4"),  # BOTH alone would take one sample
        (16, f"--quantize nf4 {ON_HOST} --batch-size 8"),
        (17, f"--quantize nf4 {BOTH} --batch-size 4"),
        (21.9, f"--quantize nf4 {BOTH} --batch-size 8"),  # int8 would take one sample, and decode for it alone
        (25.5, f"--quantize int8 {BOTH} --batch-size 4"),
        (24, f"--quantize int8 {ON_HOST} --batch-size 6"),
        (36.7, f"--deepspeed_config OFFLOAD {ON_HOST} --batch-size 1"),
        (38.3, f"{ON_HOST} --batch-size 1"),
        (39, f"{BOTH} --batch-size 1"),
        (46, "--checkpoint-activations --batch-size 1"),
        (52, "--vit_checkpoint_activations --batch-size 1"),
        (73, "--batch-size 1"),
        (128, "--batch-size 4"),
    ],
)
def test_the_first_that_fits_is_taken_with_the_largest_batch(size, options):
    line, found, _ = search(size)
    assert (found.memory is None) == (options is None) and line == (options or "")
    assert [attempt.base for attempt in found.attempts][:1] == ["bf16"]


@pytest.mark.parametrize("optimism", [0.9, 0.97, 1.0, 1.01])
@pytest.mark.parametrize("size", [13, 17, 24, 30, 44])
def test_whatever_small_models_say_what_is_taken_fits_and_a_larger_batch_does_not(size, optimism):
    _, found, estimates = search(size, "--quantize", "nf4", *BOTH.split(), optimism=optimism)
    batch = found.config.schedule.batch_size
    larger = estimates.plan(Candidate(config=found.config, ranks=1, total_batch=None), batch + 1)
    assert batch == LARGEST_BATCH or estimates.of(larger, 1).total > size * GB
    assert estimates.exact <= 8


def test_with_good_estimates_of_small_models_one_large_one_is_made():
    assert search(21.9, optimism=0.999)[2].exact == 1


@pytest.mark.parametrize(
    ("ranks", "size", "options"),
    [
        (8, 40, f"{BOTH} --batch-size 2"),
        (8, 24, f"--zero-stage 3 {BOTH} --batch-size 14"),
        (2, 17.5, f"--quantize nf4 {BOTH} --batch-size 4"),
        (2, 23, f"--zero-stage 3 {ON_HOST} --batch-size 6"),
        (2, 21, f"--model-parallel-size 2 {ON_HOST} --batch-size 2"),
        (4, 12.5, f"--model-parallel-size 4 {BOTH} --batch-size 1"),  # ZeRO-3 would gather all weights for one sample
    ],
)
def test_several_gpus_share_the_work_in_the_order_that_is_told(ranks, size, options):
    assert search(size, ranks=ranks)[0] == options


def test_model_parallelism_comes_where_nothing_whole_fits_on_a_rank():
    line, found, _ = search(8, "--quantize", "nf4", ranks=2)
    assert line.startswith("--model-parallel-size 2 ") and found.config.parallel.model_parallel_size == 2


@pytest.mark.parametrize(
    ("given", "size", "options"),
    [
        (["--quantize", "int8"], 22.1, f"{ON_HOST} --batch-size 3"),
        (["--quantize", "int8"], 23.5, f"{ON_HOST} --batch-size 5"),
        (["--quantize", "int8", "--checkpoint_offload"], 200, "--vit_checkpoint_activations --batch-size 13"),
        (["--quantize", "int8", "--checkpoint_offload"], 23.5, f"{BOTH} --batch-size 5"),
        (["--batch-size", "2"], 22.5, f"--quantize int8 {ON_HOST}"),
        (["--batch-size", "5"], 21.9, f"--quantize int8 --deepspeed_config OFFLOAD {ON_HOST}"),
        (["--batch-size", "9"], 21.9, f"--quantize nf4 {ON_HOST}"),
        (["--batch-size", "21"], 21.9, f"--quantize nf4 --deepspeed_config OFFLOAD {ON_HOST}"),
        (["--batch-size", "24"], 21.9, None),
        (["--checkpoint-activations"], 73, "--batch-size 4"),
        (["--keep_modules", "projector"], 60, "--quantize int8 --checkpoint-activations --batch-size 4"),
        (["--zero-stage", "1"], 39, f"{BOTH} --batch-size 1"),
        (["--r", "8", "--lora_dropout", "0.1"], 39, f"{BOTH} --batch-size 1"),
    ],
)
def test_what_is_given_stays_as_it_is(given, size, options):
    line, found, _ = search(size, *given)
    assert line == (options or "") and (found.config is None) == (options is None)


def test_what_a_deepspeed_file_says_is_given(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 1}}))
    line, found, _ = search(21.9, "--deepspeed_config", file, ranks=2)
    assert line == f"--quantize nf4 {BOTH}" and found.config.schedule.batch_size == 3
    assert {attempt.ranks for attempt in found.attempts} == {"2, ZeRO 1"}


@pytest.mark.parametrize(
    ("total", "ranks", "batch", "steps"),
    [
        (32, 1, 8, 4),
        (12, 1, 6, 2),
        (7, 1, 7, 1),
        (11, 1, 11, 1),
        (47, 1, 1, 47),
        (3, 1, 3, 1),
        (24, 2, 6, 2),
        (64, 4, 8, 2),
    ],
)
def test_a_wanted_total_is_made_of_equal_batches(total, ranks, batch, steps):
    line, found, _ = search(21.9, "--quantize", "nf4", "--zero-stage", "2", ranks=ranks, total_batch=total)
    schedule = found.config.schedule
    assert (schedule.batch_size, schedule.gradient_accumulation_steps) == (batch, steps)
    assert ("--gradient-accumulation-steps" in line) == (steps > 1)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ((), dict(total_batch=13, ranks=4, options=("--model-parallel-size", "1")), "wanted a multiple of 4 data-par"),
        (("--batch-size", "5"), dict(total_batch=12), "wanted a multiple of 1 data-parallel ranks x --batch-size 5"),
        (("--gradient-accumulation-steps", "2"), dict(total_batch=12), "--gradient-accumulation-steps 2 is given as"),
        (("--model-parallel-size", "3"), dict(ranks=4), "4 ranks do not divide into groups of 3"),
        (("--max_length", "99"), {}, "--max_length: 99 is too short"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_error(options, more, message):
    options = (*options, *more.pop("options", ()))
    with pytest.raises(ConfigError, match=message):
        search(24, *options, **more)


def test_on_a_cpu_nothing_is_put_on_the_host():
    line, found, _ = search(14, "--quantize", "nf4", device="cpu")
    assert line == f"{BOTH} --batch-size 1" and not found.config.checkpointing.checkpoint_offload


def test_what_fits_nowhere_is_said_with_what_takes_the_most():
    _, found, estimates = search(8, offload=None)
    assert found.config is None and found.options == () and estimates.exact == 0
    assert [attempt.base for attempt in found.attempts] == ["bf16", "int8", "nf4"]
    assert (
        fit_table(found).splitlines()[1]
        == "bf16  1, ZeRO 2  both, inputs on host      1  ~37.5  too large: 94% are weights"
    )


# The estimates of small models, and the command

FIRST_OPTIONS = f"--from_pretrained {shlex.quote(str(TINY_BASE))} --max_length 64"


def nearly_and_exactly(cases):
    from sat_lora.memory.estimate_run import sizes_of

    vit = {**sizes_of(TINY_BASE)["eva_args"], "num_layers": 5}
    sizes = {**sizes_of(TINY_BASE), "num_layers": 6, "eva_args": vit}
    estimates = Estimates(sizes)
    pairs = []
    for options, batch in cases:
        config = parse_options(["--from_pretrained", str(TINY_BASE), "--max_length", "64", *options])
        plan = estimates.plan(Candidate(config=config, ranks=1, total_batch=None), batch)
        pairs.append((estimates.about(plan).activations, estimates.memory(plan).activations))
    return pairs


def commands(lines):
    results = []
    for line in lines:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
            status = main(["estimate", "--from_pretrained", str(TINY_BASE), "--max_length", "64", *line])
        results.append((status, printed.getvalue()))
    return results


@pytest.mark.matrix
def test_small_models_tell_nearly_what_a_deep_one_takes():
    cases = [((), 3), (["--quantize", "nf4", *BOTH.split()], 4), (["--quantize", "nf4", *ON_HOST.split()], 4)]
    (pairs,) = run_ranks(nearly_and_exactly, 1, cases, timeout=patient(120))
    for nearly, exactly in pairs:
        assert nearly == pytest.approx(exactly, rel=0.02), pairs


def estimate_no_step_twice():
    """Let the searches of this process share their steps."""
    from sat_lora.memory import fit

    made, fake_step = {}, fit.fake_step

    def once(*arguments, **settings):
        key = repr((arguments, settings))
        if key not in made:
            made[key] = fake_step(*arguments, **settings)
        return made[key]

    fit.fake_step = once


def found_and_estimated(folder):
    """What --fit finds for a card, and what a plain estimate says of the line that it gives."""
    estimate_no_step_twice()
    file = folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    given = ["--deepspeed_config", str(file)]
    ((status, text),) = commands([["--fit", "0.1", "--json", *given]])
    found = json.loads(text)
    batch = int(found["options"][found["options"].index("--batch-size") + 1])
    plain = ["--json", "--device-memory", str(found["usable"] / 2**30), *found["options"]]
    larger = [*plain, "--batch-size", str(batch + 1)]
    shown = commands([["--fit", "0.1", *given], ["--fit", "0.004", *given], plain, larger])
    return status, found, shown


def test_the_command_prints_options_that_fit_and_refuses_what_it_cannot_search():
    lines = [["--fit", "2", "--batch-size", "1"], ["--fit", "24", "--quantize", "nf4", "--quantize_modules", "gate"]]
    (((status, text), (refused, nothing)),) = run_ranks(commands, 1, lines, timeout=patient(120))
    assert status == 0 and text.splitlines()[-1].startswith(FIRST_OPTIONS)
    assert refused == 2 and nothing == ""


@pytest.mark.matrix
def test_the_command_gives_options_that_fit_as_a_plain_estimate_says(tmp_path):
    """Those of the table of GPUs are in tests/docs/test_pages.py, and how it searches is above."""
    ((status, found, shown),) = run_ranks(found_and_estimated, 1, tmp_path, timeout=patient(120))
    (text_status, text), (nothing_status, nothing), (same_status, same), (larger_status, _) = shown
    assert (status, text_status, same_status) == (0, 0, 0) and found["fits"]
    assert json.loads(same)["total"] == found["total"]
    assert larger_status == 1 or f"--batch-size {LARGEST_BATCH}" in text
    assert text.splitlines()[0] == "1 x 0.1 GB, of which a step may take 0.0909"
    assert text.splitlines()[-1].startswith(FIRST_OPTIONS)
    assert "after `deepspeed --num_gpus 1 finetune_demo/finetune_cogvlm.py`" in text
    assert nothing_status == 1 and "nothing fits: take larger cards" in nothing
