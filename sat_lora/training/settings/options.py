"""The command line: CogVLM's published launch options unchanged, and those of LoRA and the loop.

`resolve` says what beats what. This module reads all that has a say: options, a --config file, run.json, a DeepSpeed
file and the config of the base.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_lora.cogvlm.inputs.prompts import settings_of_base
from sat_lora.errors import ConfigError
from sat_lora.files.foreign import name_problem
from sat_lora.parallel.launch import find_place
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn
from sat_lora.terminal.option_parser import OptionParser
from sat_lora.training.settings.config import BASIC, GROUPS, KNOWN, TrainConfig
from sat_lora.training.settings.config_file import as_yaml, read_config_file
from sat_lora.training.settings.deepspeed_file import read_deepspeed_file
from sat_lora.training.settings.demo import Demo
from sat_lora.training.settings.lora_options import add_layer_range
from sat_lora.training.settings.resolve import resolve
from sat_lora.training.settings.run_settings import settings_of_run

EXAMPLES = (
    "",
    "--from_pretrained cogvlm-base-490 --version base --train-data images/ --bf16 \\\n"
    "      --zero-stage 2 --checkpoint-activations --vit_checkpoint_activations --batch-size 4",
    "--config mine.yaml --lr 2e-4",
    "--resume runs/mine",
    "--from_pretrained cogvlm-base-490 --train-data images/ --doctor --shrink 2",
)


def build_parser(prog: str | None = None, *, takes_more: bool = False) -> OptionParser:
    """Return the parser. It holds no defaults: its namespace has the given options, `parse_options` adds the rest.

    prog: the name of the program; None takes that of the process. takes_more: what it does not know is left over
    instead of refused.
    """
    parser = OptionParser(
        prog=prog,
        takes_more=takes_more,
        usage="%(prog)s [options]",
        description="Fine-tune CogVLM with LoRA. In a clone, with no option at all: the demo's tiny base and captchas.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.epilog = "Every option may be written with - or _ between its words.\n\n" + _examples(parser.prog)
    groups = {title: parser.add_argument_group(title, about) for title, about in GROUPS.items()}
    for known in KNOWN.values():
        known.add_to(groups[known.group])
    add_layer_range(groups["LoRA"])
    add_config_options(groups[BASIC])
    return parser


def _examples(prog: str) -> str:
    """Return lines that start the program: a script under its launcher, or the command, which takes one GPU alone."""
    is_script = prog.endswith(".py")
    start = f"deepspeed {prog}" if is_script else prog
    lines = [f"{start} {options}".rstrip() for options in EXAMPLES]
    if not is_script:
        lines.append("deepspeed --num_gpus 8 --module sat_lora.cli train --config mine.yaml")
    return "\n  ".join(["examples:", *lines])


def add_config_options(group: Any) -> None:
    """Add --config and --print-config to a parser or to a group of one."""
    text = "settings as YAML or JSON; an option given here beats it"
    group.add_argument("--config", action=_Once, metavar="FILE", default=argparse.SUPPRESS, help=text)
    group.add_argument(
        "--print-config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="write all settings as such a file, with where each comes from, and end",
    )


class _Once(argparse.Action):
    """Takes a value, and a second one for a mistake."""

    def __call__(self, parser, namespace, values, option_string=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string}: given twice; put the settings of both into one file")
        setattr(namespace, self.dest, values)


@functools.cache
def option_names() -> dict[str, str]:
    """Return the first spelling of every option, by the name of its setting."""
    return {action.dest: action.option_strings[0] for action in build_parser()._actions if action.option_strings}


def parse_options(
    argv: list[str] | None = None,
    *,
    demo: Demo | None = None,
    environ: Mapping[str, str] = os.environ,
    prog: str | None = None,
    takes_paths: bool = False,
) -> TrainConfig:
    """Return the config that a command line asks for, with what its files and the run that it goes on with say.

    demo: what runs where no base is named; without it a base has to be. A mistake ends the process with status 2 and
    one line on rank 0, in the name of `prog`; --print-config ends it with status 0. takes_paths: what stands among the
    options and belongs to none is training data.
    """
    parser = build_parser(prog, takes_more=takes_paths)
    options, left = parser.parse_known_args(argv)
    if any(argument.startswith("-") for argument in left):
        parser.refuse_unknown([argument for argument in left if argument.startswith("-")])
    given = vars(options)
    if left:
        given["train_data"] = [*left, *given.get("train_data", [])]
    prints = given.pop("print_config", False)
    path = given.pop("config", None)
    try:
        config, warnings = _resolved(parser, given, path, demo, environ)
    except ConfigError as error:
        parser.error(str(error))
    for warning in warnings:
        warn(warning, environ)
    if prints and not config.problems:
        parser._print_message(as_yaml(config, file=path), sys.stdout)
        raise SystemExit(0)
    if prints:
        parser.error("; ".join(config.problems))
    problem = name_problem(config.run_folder)
    if problem and not (config.start.doctor or config.start.replay):
        option = "resume" if config.start.resume else "save"
        parser.error(f"--{option}: {printable(config.run_folder)}: {problem}; give another folder, or rename it")
    return config


def _resolved(
    parser: argparse.ArgumentParser,
    given: dict[str, Any],
    path: str | None,
    demo: Demo | None,
    environ: Mapping[str, str],
) -> tuple[TrainConfig, list[str]]:
    """Return (the config, warnings) that `resolve` makes of the options, after reading all files that they name.

    path: of the --config file. Raises ConfigError for a mistake in any of it.
    """
    resolve(given)  # options that contradict each other are a mistake whatever the files say
    file = {} if path is None else read_config_file(path)
    try:
        place = find_place(environ)
    except ConfigError as error:  # on every rank: which one this is, is what is wrong
        print(f"{parser.prog}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    by_hand = {**file, **given}
    run: dict[str, Any] = {}
    base: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    source = next((name for name in ("replay", "resume") if name in given), None)
    if source is not None:
        try:
            run = settings_of_run(given[source])
        except ConfigError as error:
            raise ConfigError(f"--{source}: {error}") from error
        if run.get("from_pretrained") is None and "from_pretrained" not in by_hand:
            folder = printable(given[source])
            raise ConfigError(f"--{source}: {folder}/run.json names no base; give --from_pretrained")
    elif "from_pretrained" not in by_hand:
        if demo is None or not demo.is_here:
            raise ConfigError(
                "--from_pretrained: missing, and the demo is not installed: its base and images lie in finetune_demo/ "
                "of a clone of sat_lora; give the base's folder, or work there"
            )
        defaults = demo.values(by_hand.get("train_data"))
    else:
        base = settings_of_base(by_hand["from_pretrained"])
    if "resume" in given:
        _refuse_another_folder(given)
    return resolve(
        given,
        file=file,
        resumed_run=run,
        deepspeed_json=_deepspeed_json(by_hand.get("deepspeed_config", run.get("deepspeed_config"))),
        demo=defaults,
        base=base,
        local_rank=place.local_rank,
    )


def _deepspeed_json(path: str | None) -> dict:
    """Return the content of a DeepSpeed file; an empty one where it cannot be read, which `check_options` says."""
    with contextlib.suppress(ConfigError):
        return {} if path is None else read_deepspeed_file(path)
    return {}


def _refuse_another_folder(given: Mapping[str, Any]) -> None:
    """Raise ConfigError where --save or --experiment-name name another folder than --resume: a run goes on
    where it is.
    """
    names = [name for name in ("save", "experiment_name") if name in given]
    run = Path(os.path.abspath(given["resume"]))
    save = given.get("save")
    name = given.get("experiment_name")
    if save is not None and name is not None:
        fits = os.path.realpath(Path(save) / name) == os.path.realpath(run)
    elif name is not None:
        parts = Path(name).parts
        fits = run.parts[-len(parts) :] == parts
    else:
        fits = save is None or any(os.path.realpath(folder) == os.path.realpath(save) for folder in run.parents)
    if not fits:
        shown = " ".join(f"{option_names()[name]} {printable(given[name])}" for name in names)
        raise ConfigError(
            f"{shown}: --resume goes on in {printable(given['resume'])} itself; leave it out, or copy that folder "
            "and resume the copy"
        )
