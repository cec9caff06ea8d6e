"""The command line: CogVLM's published launch options unchanged, and those of LoRA and the loop.

A value comes from the first that has one: an option given, the run that --resume names, a --deepspeed_config file
(see `deepspeed_config`), the embedded demo when neither --from_pretrained nor --train-data is given, DEFAULTS.
--version is looked up in the base's config before that.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat_lora.cogvlm.inputs.prompts import PROMPTS
from sat_lora.errors import ConfigError
from sat_lora.files.foreign import name_problem, read_json
from sat_lora.parallel.launch import find_place
from sat_lora.printable import printable
from sat_lora.terminal.option_parser import OptionParser
from sat_lora.terminal.option_types import (
    accumulation,
    batch,
    count,
    fraction,
    not_negative,
    positive,
    positive_int,
    proportions,
    rate,
    seconds,
    share,
    workers,
)
from sat_lora.training.metrics.registry import METRICS
from sat_lora.training.settings.defaults import (
    DEFAULTS,
    EMBEDDED_DEMO,
    NOT_RESUMED,
    demo_defaults,
    embedded_base,
    is_demo_data,
    version_of,
)
from sat_lora.training.settings.lora_options import ABOUT, LORA_FIELDS, lora_options
from sat_lora.training.settings.schedule import DECAY_STYLES

EXAMPLES = """examples:
  deepspeed finetune_cogvlm.py
  deepspeed finetune_cogvlm.py --from_pretrained cogvlm-base-490 --version base --train-data images/ --bf16 \\
      --zero-stage 2 --checkpoint-activations --vit_checkpoint_activations --batch-size 4
  deepspeed finetune_cogvlm.py --resume runs/mine
  deepspeed finetune_cogvlm.py --from_pretrained cogvlm-base-490 --train-data images/ --doctor --shrink 2"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser. It holds no defaults: its namespace has the given options, `parse_options` adds the rest."""
    parser = OptionParser(
        prog=prog,
        usage="%(prog)s [options]",
        description="Fine-tune CogVLM with LoRA. With no option at all: the embedded tiny base and captchas.",
        epilog="Every option may be written with - or _ between its words.\n\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(group, name: str, help: str, *more_names: str, **settings) -> None:
        default = DEFAULTS[settings.get("dest") or name[2:].replace("-", "_")]
        shown = " ".join(map(str, default)) if isinstance(default, list | dict) else default
        if settings.get("action") != "store_true" and shown not in (None, "") and group is not compatible:
            help += f" (default: {shown})"
        group.add_argument(name, *more_names, default=argparse.SUPPRESS, help=help.replace("%", "%%"), **settings)

    set_by_people = parser.add_argument_group("what people set", "the options that most runs need")
    model = parser.add_argument_group("model")
    lora = parser.add_argument_group("LoRA", ABOUT)
    data = parser.add_argument_group("data")
    schedule = parser.add_argument_group("schedule", "--lr and the number of steps matter most")
    memory = parser.add_argument_group("parallelism and memory", "out of memory: checkpoint activations, then ZeRO 3")
    saving = parser.add_argument_group("saving and evaluating")
    checking = parser.add_argument_group("checking", "why a backward hangs, or why nothing learns")
    compatible = parser.add_argument_group("accepted for compatibility", "of published scripts, without effect")
    flag = {"action": "store_true"}

    add(set_by_people, "--from_pretrained", "SAT folder of the base (default: the embedded tiny one)", metavar="DIR")
    add(
        set_by_people,
        "--train-data",
        "folders of images LABEL.png, .jsonl files or .tar shards",
        nargs="+",
        metavar="PATH",
    )
    add(set_by_people, "--valid-data", "the same, for the validation loss", nargs="+", metavar="PATH")
    add(
        set_by_people,
        "--test-data",
        "folders or .jsonl, answered after training",
        nargs="+",
        metavar="PATH",
    )
    add(set_by_people, "--experiment-name", "name of the run; its folder is SAVE/NAME", metavar="NAME")
    add(set_by_people, "--train-iters", "optimizer steps (default: one epoch)", type=positive_int, metavar="N")
    add(set_by_people, "--epochs", "passes over the data, instead of --train-iters", type=positive, metavar="N")
    add(set_by_people, "--batch-size", "samples a GPU takes at once", type=batch, metavar="N")
    add(set_by_people, "--lr", "peak learning rate; LoRA wants 1e-4 or more", type=rate)
    add(set_by_people, "--resume", "run folder to go on with, under its own settings", metavar="RUN_FOLDER")

    add(model, "--trust-checkpoint", "unpickle all of --from_pretrained: runs any code in it", **flag)
    add(model, "--any-base", "with --resume: go on with a base that the run was not trained on", **flag)
    add(model, "--version", "prompt format of the base, if its config names none", choices=list(PROMPTS))
    add(model, "--local_tokenizer", "tokenizer folder (default: the --from_pretrained folder)", metavar="DIR")
    add(model, "--max_length", "longest sequence in tokens, the image's included", type=positive_int, metavar="N")

    for (name, *more_names), help, settings in lora_options():
        add(lora, name, help, *more_names, **settings)

    add(data, "--prompt", "the query of every image that comes without one of its own")
    add(data, "--split", "train,valid,test shares, of sum 1; without --valid-data", type=proportions, metavar="A,B,C")
    add(data, "--special-tokens-in-text", "a text that spells a special token, such as </s>, means it", **flag)
    add(data, "--ignore-keys", "keys of .jsonl lines to pass over", nargs="+", metavar="KEY")
    add(data, "--images-from", "folders that .jsonl lines may lead to by ..", nargs="+", metavar="DIR")
    add(data, "--names-are-answers", "of folders, whatever texts lie in or beside them", **flag)
    add(data, "--max-broken-share", "the run stops when more of the samples are broken", type=share, metavar="X")
    add(data, "--max-pixels", "a larger picture is a broken sample, not read", type=positive_int, metavar="N")
    add(data, "--num-workers", "processes that read images, per rank", type=workers, metavar="N")

    add(schedule, "--warmup", "steps of warm-up; below 1: their share of all steps", type=not_negative, metavar="N")
    add(schedule, "--lr-decay-style", "how the learning rate falls after it", choices=list(DECAY_STYLES))
    add(schedule, "--min-lr-ratio", "the rate falls to this share of --lr", type=fraction, metavar="X")
    add(schedule, "--gradient-accumulation-steps", "batches per optimizer step", type=accumulation, metavar="N")
    add(schedule, "--clip-grad", "largest gradient norm; 0: not clipped", type=not_negative, metavar="X")
    add(schedule, "--weight-decay", "AdamW's weight decay", type=not_negative, metavar="X")
    add(schedule, "--skip-nonfinite", "steps with a NaN or infinity to leave out", type=count, metavar="N")
    add(schedule, "--seed", "of the adapters, the data order and dropout", type=count, metavar="N")

    add(memory, "--zero-stage", "DeepSpeed ZeRO stage; 3 shards the base too", type=int, choices=range(4))
    add(memory, "--deepspeed_config", "DeepSpeed json; an option given here beats it", metavar="FILE")
    add(memory, "--model-parallel-size", "ranks that share one copy of the model", type=positive_int, metavar="N")
    add(memory, "--bf16", "bfloat16 (default on CUDA)", **flag)
    add(memory, "--fp16", "float16 with loss scaling, for GPUs without bfloat16", **flag)
    add(memory, "--checkpoint-activations", "recompute the language layers in backward", **flag)
    add(memory, "--vit_checkpoint_activations", "recompute the ViT layers in backward", **flag)
    add(memory, "--distributed-backend", "default: nccl on CUDA, gloo on CPU", choices=["nccl", "gloo"])
    add(memory, "--local_rank", "set by the launcher", type=int, metavar="N")

    add(saving, "--save", "folder of the runs (default: runs)", metavar="DIR")
    add(saving, "--overwrite", "start in a run folder that holds results: they are removed", **flag)
    add(saving, "--any-data", "for --resume: go on though the training data is not what it was", **flag)
    add(saving, "--save-interval", "steps between saved adapters; 0: at the end only", type=count, metavar="N")
    add(saving, "--keep", "newest adapters to keep, the best aside; 0: all", type=count, metavar="K")
    add(saving, "--eval-interval", "steps between validation losses; 0: at the end only", type=count, metavar="N")
    add(saving, "--eval-iters", "validation batches per rank; 0: all", type=count, metavar="N")
    add(
        saving,
        "--eval-batch-size",
        "for validation and --test-data (default: --batch-size)",
        type=batch,
        metavar="N",
    )
    add(
        saving,
        "--valid-metrics",
        "what a validation measures beside the loss",
        nargs="+",
        choices=list(METRICS),
    )
    add(saving, "--log-interval", "steps between the lines of train.jsonl", type=positive_int, metavar="N")

    add(checking, "--doctor", "check everything with one step per kind of batch, write nothing, and end", **flag)
    add(
        checking,
        "--watchdog-limit",
        "end a run that gives no sign of life for so long, and for ten times the longest that its phase has taken; "
        "0: never",
        type=seconds,
        metavar="SECONDS",
    )
    add(
        checking,
        "--shrink",
        "for --doctor and --replay: the first N layers of each transformer alone",
        type=positive_int,
        metavar="N",
    )

    add(
        checking,
        "--replay",
        "run the last step of a run again: for sat-lora doctor --replay",
        metavar="RUN_FOLDER",
    )

    add(compatible, "--mode", "no effect: this always fine-tunes", choices=["finetune"])
    add(compatible, "--use_lora", "no effect: LoRA is always on", **flag)
    add(compatible, "--resume-dataloader", "no effect: --resume always goes on at the next sample", **flag)
    add(compatible, "--skip-init", "no effect: base weights are loaded, never drawn first", **flag)
    add(compatible, "--ignore_pad_token_for_loss", "no effect: padding never counts", **flag)
    add(compatible, "--deepspeed", "no effect: the engine is always DeepSpeed", **flag)
    return parser


@functools.cache
def option_names() -> dict[str, str]:
    """The first spelling of every option, by the name of its value."""
    return {action.dest: action.option_strings[0] for action in build_parser()._actions if action.option_strings}


def parse_options(
    argv: list[str] | None = None,
    *,
    demo_folder: str | Path = EMBEDDED_DEMO,
    environ: Mapping[str, str] = os.environ,
    prog: str | None = None,
) -> argparse.Namespace:
    """Every option with its value, plus `given` (names of those set by hand) and `run_folder`.

    Values are JSON's types (paths are strings). With --resume and --replay, the settings of that run's `run.json` stand
    in for what is not given. A mistake ends the process with status 2 and one line on rank 0, in the name of `prog`.
    """
    parser = build_parser(prog)
    explicit = vars(parser.parse_args(argv))
    if {"train_iters", "epochs"} <= explicit.keys():
        parser.error(
            f"--train-iters {explicit['train_iters']} and --epochs {explicit['epochs']:g}: both say how long to "
            "train; give one of them"
        )
    if "shrink" in explicit and not explicit.keys() & {"doctor", "replay"}:
        parser.error(f"--shrink {explicit['shrink']}: training takes the whole model; it is for --doctor and --replay")
    if {"overwrite", "resume"} <= explicit.keys():
        parser.error("--overwrite and --resume: the one removes what the other goes on with; give one of them")
    if "any_data" in explicit and "resume" not in explicit:
        parser.error("--any-data: a run that starts takes any data; it is for --resume")
    for name in ("save", "experiment_name"):
        if not explicit.get(name, "x").strip():
            got = f"{option_names()[name]}: got {explicit[name]!r}"
            parser.error(f"{got}, wanted a name; is a variable of the shell empty?")
    try:
        place = find_place(environ)
    except ConfigError as error:  # on every rank: which one this is, is what is wrong
        print(f"{parser.prog}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    values, given = {**DEFAULTS, "local_rank": place.local_rank}, frozenset(explicit)
    source = next((name for name in ("replay", "resume") if name in explicit), None)
    if source is not None:
        try:
            stored = settings_of_run(explicit[source])
        except ConfigError as error:
            parser.error(f"--{source}: {error}")
        given |= frozenset(stored.pop("given"))
        values.update(stored)
        if values["from_pretrained"] is None and "from_pretrained" not in explicit:
            parser.error(f"--{source}: {printable(explicit[source])}/run.json names no base; give --from_pretrained")
    elif "from_pretrained" not in explicit:
        if not Path(demo_folder).is_dir():  # sat_lora is installed without its checkout
            parser.error(
                f"--from_pretrained: missing, and the demo is not installed (no folder {printable(demo_folder)}): its "
                "base and images lie in finetune_demo/ of a clone of sat_lora; give the base's folder, or work there"
            )
        values.update(embedded_base(demo_folder))
        if is_demo_data(explicit.get("train_data", ()), demo_folder):
            values.update(demo_defaults(demo_folder))
        if "train_data" in explicit:  # the demo's held-out captchas say nothing about other data
            values.update(valid_data=None, test_data=None)
    else:
        values["version"] = version_of(explicit["from_pretrained"]) or values["version"]
    if "resume" in explicit:
        _refuse_another_folder(parser, explicit)
    if "epochs" in explicit:
        values["train_iters"] = None
    if "train_iters" in explicit:
        values["epochs"] = None
    values.update(explicit)
    values["local_tokenizer"] = values["local_tokenizer"] or values["from_pretrained"]
    if values["replay"]:
        values["experiment_name"] = "replay"
    values["run_folder"] = values["resume"] or str(Path(values["save"] or "runs") / values["experiment_name"])
    problem = name_problem(values["run_folder"])
    if problem and not (values["doctor"] or values["replay"]):
        option = "resume" if values["resume"] else "save"
        parser.error(f"--{option}: {printable(values['run_folder'])}: {problem}; give another folder, or rename it")
    return argparse.Namespace(**values, given=given)


def _refuse_another_folder(parser: argparse.ArgumentParser, explicit: Mapping[str, Any]) -> None:
    """A run goes on where it is: end with an error where --save or --experiment-name name another folder."""
    given = [name for name in ("save", "experiment_name") if name in explicit]
    run, save, name = Path(os.path.abspath(explicit["resume"])), explicit.get("save"), explicit.get("experiment_name")
    if save is not None and name is not None:
        fits = os.path.realpath(Path(save) / name) == os.path.realpath(run)
    elif name is not None:
        parts = Path(name).parts
        fits = run.parts[-len(parts) :] == parts
    else:
        fits = save is None or any(os.path.realpath(folder) == os.path.realpath(save) for folder in run.parents)
    if not fits:
        shown = " ".join(f"{option_names()[name]} {printable(explicit[name])}" for name in given)
        parser.error(
            f"{shown}: --resume goes on in {printable(explicit['resume'])} itself; leave it out, or copy that folder "
            "and resume the copy"
        )


def settings_of_run(folder: str | Path) -> dict:
    """The settings in FOLDER/run.json that a resumed run takes over, and `given`.

    ConfigError: the folder is none of a run, or a setting is of a type or value that no option has; all such in one.
    The fields of LoraConfig are for that to check.
    """
    folder = Path(folder)
    try:
        content = read_json(folder / "run.json")
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            raise ValueError("it has no settings")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"{printable(folder)} is no run folder with a readable run.json: {printable(reason)}; {_what_it_is(folder)}"
        ) from error
    settings = content["settings"]
    given = settings.get("given", [])
    problems = [*_wrong_settings(settings)]
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        problems.append("given: wanted a list of names")
    if problems:
        raise ConfigError(f"{printable(folder / 'run.json')} has settings that no run has: {'; '.join(problems)}")
    known = {name: value for name, value in settings.items() if name in DEFAULTS and name not in NOT_RESUMED}
    return {**known, "given": [name for name in given if name in DEFAULTS]}


def _what_it_is(folder: Path) -> str:
    """What to give instead of a folder that is none of a run."""
    wanted = "give a run folder like runs/NAME"
    if (folder / "run.json").exists():
        return "mend that file, or start a new run"
    for inner, outer in ((folder, folder.parent), (folder, folder.parent.parent)):
        if inner != outer and (outer / "run.json").is_file():
            return f"it lies in a run folder; give {printable(outer)}"
    if not folder.exists():
        return f"there is no such folder; {wanted}"
    if any((folder / name).exists() for name in ("lock", "watchdog")):
        return "a run there was ended before its first step; start it anew"
    runs = sorted(path.parent.name for path in folder.glob("*/run.json")) if folder.is_dir() else []
    return f"{wanted}; in it there are {printable(', '.join(runs[:5]))}" if runs else wanted


def _wrong_settings(settings: dict) -> Iterator[str]:
    """A sentence for each setting that its option would not take."""
    actions = {action.dest: action for action in build_parser()._actions}
    for name, value in settings.items():
        if name not in DEFAULTS or name in NOT_RESUMED or name in LORA_FIELDS:
            continue
        if json.dumps(value) == json.dumps(DEFAULTS[name]):  # as text, since True == 1 == 1.0
            continue
        try:
            wanted = _refusal(name, value, actions.get(name))
        except argparse.ArgumentTypeError as error:
            wanted = str(error).rpartition("wanted ")[2]
        if wanted is not None:
            shown = printable(repr(value))
            yield f"{name}: got {shown[:60]}{'...' * (len(shown) > 60)}, wanted {wanted}"


def _refusal(name: str, value, action: argparse.Action | None) -> str | None:
    """What was wanted, if `value` is nothing that the option gives; ArgumentTypeError says the same."""
    convert = None if action is None else action.type
    if name == "split":
        are_numbers = isinstance(value, list) and all(type(share) in (int, float) for share in value)
        fits = are_numbers and callable(convert) and convert(",".join(map(repr, value)))
        return None if fits else "one to three shares"
    if name in ("betas", "eps"):  # of a DeepSpeed file
        numbers = value if name == "betas" and isinstance(value, list) else [value]
        good = len(numbers) == len(DEFAULTS["betas"]) if name == "betas" else True
        good = good and all(type(number) in (int, float) and 0 <= number < 1 for number in numbers)
        return None if good else "two numbers below 1" if name == "betas" else "a number below 1"
    if isinstance(DEFAULTS[name], bool):
        return None if isinstance(value, bool) else "true or false"
    if action is None:
        return None
    if action.nargs == "+" and action.choices is not None:
        choices = [*action.choices]
        return None if isinstance(value, list) and all(one in choices for one in value) else _some_of(choices)
    if action.nargs == "+":
        texts = isinstance(value, list) and value and all(isinstance(text, str) and _is_path(text) for text in value)
        return None if texts else "a list of texts"
    if action.choices is not None:
        choices = [*action.choices]
        is_one = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if is_one else f"one of {', '.join(map(str, choices))}"
    if not callable(convert):
        return None if isinstance(value, str) and _is_path(value) else "a text"
    if type(value) not in (int, float):
        return "a number"
    convert(repr(value))
    return None


def _some_of(choices: list) -> str:
    return f"a list of {', '.join(map(str, choices))}"


def _is_path(text: str) -> bool:
    """Whether the system takes it as the name of a file."""
    return "\0" not in text
