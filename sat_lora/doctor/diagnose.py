"""All that can be known before a run: its model is built as the run would build it, one real step of each kind of batch
is taken on every rank, and nothing is written but the report.
"""

import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch

from sat_lora.doctor.batches import has_labels, kinds_of
from sat_lora.doctor.examine import examine
from sat_lora.doctor.run_checks.collectives import collective_findings, collective_times
from sat_lora.doctor.run_checks.configuration import bucket_findings, configuration_findings, unknown_keys
from sat_lora.doctor.run_checks.data import (
    batch_count_findings,
    data_findings,
    drawing_findings,
    drawn_samples,
    model_config_findings,
)
from sat_lora.doctor.run_checks.environment import environment_findings
from sat_lora.doctor.run_checks.optimization import effect_findings, learning_rate_findings, schedule_findings
from sat_lora.errors import SatLoraError
from sat_lora.findings.finding import Finding, as_text, has_errors, joined, looked_for, looks_for
from sat_lora.findings.finding import as_json as to_json
from sat_lora.lora.optimizer_groups import set_learning_rate
from sat_lora.memory.memory_report import estimated_findings, memory_report
from sat_lora.parallel.distributed import destroy, gather_lists, init_distributed
from sat_lora.parallel.sharding import gathered
from sat_lora.terminal.notice import is_first_rank
from sat_lora.training.preflight import option_problems
from sat_lora.training.prepare import PreparedRun, Run, build_run, on_first_rank, open_data, prepare
from sat_lora.training.same_base import base_of_run
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.settings.deepspeed_file import read_deepspeed_file
from sat_lora.training.settings.deepspeed_problems import file_problems, is_of_key
from sat_lora.training.settings.demo import Demo
from sat_lora.training.settings.schedule import learning_rate_factor, total_steps, warmup_steps
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens, sum_over_data_parallel
from sat_lora.training.steps.step import train_step

SAMPLES = 256  # of the training data that each rank looks at
PARTS = 7  # that `diagnose` says as it comes to them
NO_FORWARD = {"loader-failed", "token-ids", "image-size"}  # with these the passes would end in a traceback


def diagnose(
    config: TrainConfig,
    demo: Demo | None = None,
    *,
    tell: Callable[[str], None] = lambda table: None,
) -> list[Finding]:
    """Return the findings of all ranks, the same on every rank; each has to call it. demo: as in `finetune`.

    make_data: as in `finetune`. tell: is given what is no finding, as text: times of the groups, memory.
    """
    looked_for(anew=True)
    device = init_distributed(config.parallel.distributed_backend)
    _begin(1, "groups of ranks")
    broken = collective_findings()
    if broken:
        return broken  # what follows would wait for every rank
    _begin(2, "options, files, packages, machine")
    on_first_rank(partial(demo.make_missing, config.data) if demo is not None else None)
    findings = [*configuration_findings(config, os.environ, device.type), *_option_findings(config, device.type)]
    findings = joined(gather_lists([findings]))
    if any(finding.code == "options" for finding in findings):
        return findings
    try:
        prepared = prepare(config)
        findings += environment_findings(prepared.config, prepared.world)
        if any(finding.code == "collective" for finding in findings):
            return findings
        tell(collective_times())
        return [*findings, *_diagnose_model(prepared, tell)]
    except SatLoraError as error:  # `run_on_all_ranks` lets every rank have it
        return [*findings, Finding(code="options", seen=str(error))]


def report(config: TrainConfig, demo: Demo | None = None, *, as_json: bool = False) -> int:
    """Print what `diagnose` finds, once; return the exit status, 1 for an error. Every rank has to call it."""
    texts: list[str] = []
    findings = diagnose(config, demo, tell=texts.append)
    if is_first_rank():
        print(to_json(findings) if as_json else "\n\n".join([*texts, as_text(findings, len(looked_for()))]), flush=True)
    if any(finding.code == "collective" for finding in findings):
        os._exit(1)  # to leave a group that does not answer takes as long as to wait for it
    destroy()
    return 1 if has_errors(findings) else 0


def _begin(number: int, part: str) -> None:
    """Say on stderr what is looked at now."""
    if is_first_rank():
        print(f"doctor: {number} of {PARTS}, {part}", file=sys.stderr, flush=True)


@looks_for("options")
def _option_findings(config: TrainConfig, device: str) -> Iterator[Finding]:
    """Yield what keeps the run from starting; of the DeepSpeed file's keys `configuration` says more."""
    known_problems = set()
    if config.parallel.deepspeed_config is not None:
        try:
            content = read_deepspeed_file(config.parallel.deepspeed_config)
            keys = [key for _, key in unknown_keys(content)]
            problems, _ = file_problems(content, config.parallel.deepspeed_config)
            known_problems = {problem for problem in problems if any(is_of_key(problem, key) for key in keys)}
        except SatLoraError as error:
            known_problems = {str(error)}
    settings, data = option_problems(config, os.environ, device)
    for problem in (*settings, *data):
        option = re.match(r"--[\w-]+", problem)
        if problem not in known_problems:
            yield Finding(code="options", seen=problem, option=option.group() if option else None)


def _diagnose_model(prepared: PreparedRun, tell: Callable[[str], None]) -> list[Finding]:
    config = prepared.config
    world = prepared.world
    too_much = estimated_findings(prepared)
    if too_much:
        return too_much  # it would end in the middle
    _begin(3, "the base")
    base_of_run(config)
    run = build_run(prepared, layers=config.start.shrink)
    model = run.model
    sizes = run.sizes
    model.train()
    _begin(4, "the data")
    sources = open_data(prepared)
    data = sources.training
    valid = sources.validation
    rank_findings = model_config_findings(sizes, config.model.base)
    batches, failed = _read_batches(data, -(-SAMPLES // config.schedule.batch_size))
    rank_findings += failed
    rank_findings += data_findings(
        batches,
        image_length=sizes["image_length"],
        max_length=config.model.max_length,
        max_broken_share=config.data.max_broken_share,
        vocab_size=sizes.get("vocab_size"),
        image_size=tuple(sizes["eva_args"]["image_size"]),
    )
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    size = next(p.element_size() for p in model.parameters() if p.requires_grad)
    rank_findings += bucket_findings(prepared.engine, trained, size)
    findings = joined(gather_lists([rank_findings]))
    if any(finding.code in NO_FORWARD for finding in findings):
        return findings
    steps = data.samples // (config.schedule.batch_size * world.data_parallel_size)  # whole ones of an epoch
    place = dict(rank=world.rank, data_parallel_rank=world.data_parallel_rank)
    findings += drawing_findings(gather_lists([drawn_samples(data.training(0), batches, steps, **place)]))
    if valid is not None:
        findings += batch_count_findings(gather_lists([valid.validation_batches]), "validation data")
    batch = next((candidate for candidate in batches if has_labels(candidate)), None)
    if any(gather_lists([batch is None])) or batch is None:
        return findings  # every rank stops here; what is wrong with the data has been said
    _begin(5, "forward and backward without an engine")
    torch.manual_seed(config.schedule.seed + world.data_parallel_rank)
    kinds = kinds_of(batch, world.data_parallel_rank)
    if len({*gather_lists([tuple(kinds)])}) > 1:  # some ranks drew text alone
        kinds = {"this rank's first batch": batch}
    bucket = prepared.engine.get("zero_optimization", {}).get("reduce_bucket_size", 500_000_000)
    if not run.is_partitioned:
        findings += examine(model, kinds, _loss_of, optimizer=run.optimizer, bucket_size=bucket)
    if has_errors(findings):
        return findings  # a step with an engine might hang
    _begin(6, "memory")
    longest = max(batches, key=lambda candidate: candidate["input_ids"].numel())  # what does not fit fails there
    table, too_much = memory_report(prepared, model, lambda: _loss_of(model, longest).backward())
    tell(table)
    findings += too_much
    return findings + _take_steps(run, kinds, data.epoch_samples)


@looks_for("loader-failed")
def _read_batches(data, count: int) -> tuple[list[dict], list[Finding]]:
    """Return (the first `count` batches of this rank, or those before the loader raised; what it raised)."""
    batches = []
    try:
        for batch in itertools.islice(data.training(0), count):
            batches.append(batch)
    except Exception as error:  # of a dataset, in a process of its own or not
        lines = str(error).strip().splitlines() or [""]
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__}: {lines[-1]} ({last.filename}:{last.lineno})"
        return batches, [Finding(code="loader-failed", seen=f"after {len(batches)} batches: {place}")]
    return batches, []


def _take_steps(run: Run, kinds: dict[str, dict], samples: int) -> list[Finding]:
    """Return what goes wrong in one real step per kind of batch, by the engine of the run."""
    _begin(7, "a real step for each kind of batch")
    config = run.prepared.config
    world = run.prepared.world
    model = run.model
    partitioned = run.is_partitioned
    steps = total_steps(
        train_iters=config.schedule.train_iters,
        epochs=config.schedule.epochs,
        samples=samples,
        batch_size=config.schedule.batch_size,
        gradient_accumulation_steps=config.schedule.gradient_accumulation_steps,
        data_parallel_size=world.data_parallel_size,
    )
    findings = joined(gather_lists([schedule_findings(config.schedule, config.optimizer.lr, steps)]))
    before = _trainable_values(model)
    run.start_engine(gradient_accumulation_steps=1)
    engine = run.engine
    if partitioned:  # the weights are there while a layer runs, and nowhere else
        findings += examine(engine, kinds, _loss_of)
    for number, (kind, batch) in enumerate(kinds.items()):
        factor = learning_rate_factor(
            number,
            total_steps=max(steps, len(kinds)),
            warmup_steps=warmup_steps(config.schedule.warmup, steps),
            style=config.schedule.lr_decay_style,
            floor=config.schedule.min_lr_ratio,
        )
        set_learning_rate(engine.optimizer.param_groups, config.optimizer.lr * factor)
        if number == 0:
            of_rate = learning_rate_findings(engine.optimizer.param_groups, config.optimizer.lr)
            findings += joined(gather_lists([of_rate]))
        (tokens,) = sum_over_data_parallel(count_answer_tokens(batch["labels"]), device=world.device)
        result = train_step(engine, [batch], world, tokens, checks_gradients=not config.precision.fp16)
        if result.nonfinite is not None:
            findings.append(Finding(code="not-finite", seen=f"with {kind} {result.nonfinite}"))
            return findings
    return findings + joined(gather_lists([effect_findings(before, _trainable_values(model))]))


def _loss_of(model, batch: dict) -> torch.Tensor:
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return answer_loss_sum(model, moved) / max(1, count_answer_tokens(moved["labels"]))


def _trainable_values(model) -> dict[str, torch.Tensor]:
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                values[name] = parameter.detach().to("cpu", copy=True)
    return values
