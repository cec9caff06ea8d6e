"""`sat-lora estimate`: the memory of a run, without starting it."""

import argparse
import json
import sys

from sat_lora.commands.parts import demo_of_clone, examples
from sat_lora.terminal.option_types import positive, positive_int


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "estimate",
        help="tell how much memory a run would take, for any size, on any machine",
        usage="%(prog)s [--gpus N] [--device-memory GIB] [--device cuda|cpu] [--json] [options of finetune_cogvlm.py]",
        description="Takes the options of finetune_cogvlm.py; --from_pretrained may also name a model_config.json, or "
        "a published model that is not here: cogvlm2-llama3-chat-19B, cogvlm2-video-llama3-chat, cogagent-chat. "
        "Rows are as long as --max_length. Needs no GPU and no weights.",
        takes_more=True,
        **examples(
            "sat-lora estimate --from_pretrained cogvlm-base-490 --gpus 8 --zero-stage 2 --batch-size 4 \\\n"
            "      --checkpoint-activations --vit_checkpoint_activations --device-memory 80",
            "sat-lora estimate --from_pretrained model_config.json --gpus 4 --zero-stage 3 --r 64 --json",
            "sat-lora estimate --from_pretrained cogvlm-base-490 --gpus 2 --model-parallel-size 2 --device-memory 40",
        ),
    )
    command.add_argument("--gpus", type=positive_int, default=1, metavar="N", help="ranks of the run (default: 1)")
    command.add_argument("--device-memory", type=positive, metavar="GIB", help="of each; status 1 if it is not enough")
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

    config = parse_options(options.more, prog="sat-lora estimate", environ={}, demo=demo_of_clone())
    if not is_published(config.model.base):
        raise_problems(base_problems(config.model.base), [])
    from sat_lora.findings.codes import CODES
    from sat_lora.memory.components import memory_table
    from sat_lora.memory.estimate_run import estimate_run

    if config.origin("from_pretrained") is Origin.DEMO:
        _refuse_no_base(options)
        print(f"no --from_pretrained: of the demo's tiny CogVLM, {config.model.base}", file=sys.stderr)
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
    if given:
        raise ConfigError(
            f"--from_pretrained: missing, and {given[0]} speaks of a run; give the base's folder or its "
            "model_config.json (without any option the demo's tiny CogVLM is estimated)"
        )
