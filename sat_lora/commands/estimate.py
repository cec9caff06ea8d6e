"""`sat-lora estimate`: the memory of a run, without starting it."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from sat_lora.commands.parts import DEMO, demo_of_clone, examples
from sat_lora.terminal.option_types import positive, positive_int

if TYPE_CHECKING:
    from sat_lora.training.settings.config import TrainConfig


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "estimate",
        help="tell how much memory a run would take, for any size, on any machine",
        usage="%(prog)s [--gpus N] [--device-memory GIB] [--device cuda|cpu] [--json] [options of sat-lora train]\n"
        "       %(prog)s --fit GB [--total-batch N] [--gpus N] [--json] [options of sat-lora train]",
        description="Takes the options of `sat-lora train`; --from_pretrained may also name a model_config.json, or "
        "a published model that is not here: cogvlm2-llama3-chat-19B, cogvlm2-video-llama3-chat, cogagent-chat. "
        "Rows are as long as --max_length. Needs no GPU and no weights.\n--fit finds what the options leave open: how "
        "the base is held, how the GPUs share the work, what is recomputed, the batch and its accumulation.",
        takes_more=True,
        **examples(
            "sat-lora estimate --from_pretrained cogvlm-base-490 --gpus 8 --zero-stage 2 --batch-size 4 \\\n"
            "      --checkpoint-activations --vit_checkpoint_activations --device-memory 80",
            "sat-lora estimate --from_pretrained model_config.json --gpus 4 --zero-stage 3 --r 64 --json",
            "sat-lora estimate --from_pretrained cogvlm-base-490 --gpus 2 --model-parallel-size 2 --device-memory 40",
            "sat-lora estimate --from_pretrained cogvlm-base-490 --fit 24 --total-batch 32",
        ),
    )
    command.add_argument("--gpus", type=positive_int, default=1, metavar="N", help="ranks of the run (default: 1)")
    command.add_argument("--device-memory", type=positive, metavar="GIB", help="of each; status 1 if it is not enough")
    command.add_argument(
        "--fit",
        type=positive,
        metavar="GB",
        help="find the options for cards of so many GB; status 1 if there are none",
    )
    command.add_argument(
        "--total-batch", type=positive_int, metavar="N", help="with --fit: samples of a step, made up by accumulation"
    )
    command.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="decides the default precision")
    command.add_argument("--json", action="store_true", help="bytes, for programs")
    command.set_defaults(run_command=run, takes_more=True)


def run(options: argparse.Namespace) -> int:
    """Print the memory of a run; return 0, or 1 where a device has too little. Raises a SatLoraError for a user's
    mistake.
    """
    from dataclasses import asdict

    from sat_lora.cogvlm.families import is_published
    from sat_lora.training.early import base_problems, raise_problems
    from sat_lora.training.settings.config import Origin
    from sat_lora.training.settings.options import parse_options

    _refuse_half_a_search(options)
    config = parse_options(options.more, prog="sat-lora estimate", environ={}, demo=demo_of_clone())
    if not is_published(config.model.base):
        raise_problems(base_problems(config.model.base), [])
    from sat_lora._sat import quiet_sat
    from sat_lora.cogvlm.checkpoints.quantized_files import note_of_folder
    from sat_lora.findings.codes import CODES
    from sat_lora.memory.components import memory_table
    from sat_lora.memory.estimate_run import estimate_run

    quiet_sat()
    note = note_of_folder(config.model.base)
    if note is not None:
        raise_problems(config.quantization.unheeded(config.given_here, note, config.model.base), [])
    if config.origin("from_pretrained") is Origin.DEMO:
        _refuse_no_base(options)
        print(f"no --from_pretrained: of the demo's tiny CogVLM, {config.model.base}", file=sys.stderr)
    if options.fit is not None:
        return _fit(options, config)
    memory = estimate_run(config, ranks=options.gpus, device=options.device)
    available = None if options.device_memory is None else options.device_memory * 2**30
    fits = available is None or memory.total <= available
    if options.json:
        print(json.dumps({**asdict(memory), "total": memory.total, "available": available, "fits": fits}))
        return 0 if fits else 1
    print(memory_table([memory] * options.gpus, [available] * options.gpus))
    if not fits:
        print(f"it does not fit: {CODES['memory'].fix}")
    return 0 if fits else 1


def _refuse_no_base(options: argparse.Namespace) -> None:
    """Raise ConfigError where options speak of a run, and none names the base that it would train."""
    from sat_lora.errors import ConfigError

    given = list(options.more)
    given += ["--gpus"] * (options.gpus != 1) + ["--device-memory"] * (options.device_memory is not None)
    given += ["--fit"] * (options.fit is not None)
    if given:
        raise ConfigError(
            f"--from_pretrained: missing, and {given[0]} speaks of a run; give the base's folder or its "
            "model_config.json (without any option the demo's tiny CogVLM is estimated)"
        )


def _refuse_half_a_search(options: argparse.Namespace) -> None:
    """Raise ConfigError where options of a search and of a plain estimate do not go together."""
    from sat_lora.errors import ConfigError

    if options.fit is not None and options.device_memory is not None:
        raise ConfigError("--device-memory: --fit says how much a card has; leave one of them out")
    if options.fit is None and options.total_batch is not None:
        raise ConfigError("--total-batch: it is for --fit GB; a plain estimate has --gradient-accumulation-steps")


def _fit(options: argparse.Namespace, config: "TrainConfig") -> int:
    """Print the options with which the run fits, and what was considered; return 0, or 1 where nothing fits."""
    from dataclasses import asdict

    from sat_lora.memory.fit import SPARE, fit, fit_table
    from sat_lora.printable import printable_lines, shell_line

    size = options.fit * 1e9
    result = fit(
        config,
        ranks=options.gpus,
        available=size / SPARE,
        device=options.device,
        total_batch=options.total_batch,
        offload=_offload_file(),
        tell=lambda line: print(f"estimating {line}", file=sys.stderr, flush=True),
    )
    fits = result.memory is not None
    line = [*options.more, *result.options]
    if options.json:
        memory = {} if result.memory is None else {**asdict(result.memory), "total": result.memory.total}
        chosen = {"options": line if fits else None, "considered": [asdict(attempt) for attempt in result.attempts]}
        print(json.dumps({**memory, "available": size, "usable": size / SPARE, "fits": fits, **chosen}))
        return 0 if fits else 1
    print(f"{options.gpus} x {options.fit:g} GB, of which a step may take {options.fit / SPARE:.3g}")
    print(fit_table(result))
    if not fits:
        print(
            "nothing fits: take larger cards or more of them (--gpus), a smaller --max_length or --r, or fewer "
            "--target_modules"
        )
        return 1
    program = "finetune_demo/finetune_cogvlm.py" if DEMO.is_file() else "--module sat_lora.cli train"
    print(f"after `deepspeed --num_gpus {options.gpus} {program}`, with your data:")
    print(printable_lines(shell_line(line)))
    return 0


def _offload_file() -> str | None:
    """Return the DeepSpeed file of a clone that puts the optimizer's state on the host; None without a clone."""
    from pathlib import Path

    file = DEMO.with_name("offload_optimizer.json")
    if not file.is_file():
        return None
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
