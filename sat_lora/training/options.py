"""The command line: CogVLM's published launch options unchanged, and those of LoRA and the loop.

A value comes from the first that has one: an option given, the run that --resume names, a --deepspeed_config file
(see `deepspeed_config`), the embedded demo when no --from_pretrained is given, DEFAULTS.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from sat_lora.cogvlm.text import PROMPTS
from sat_lora.training.defaults import DEFAULTS, EMBEDDED_DEMO, demo_defaults
from sat_lora.training.lora_options import ABOUT, lora_options
from sat_lora.training.notice import is_first_rank
from sat_lora.training.option_types import count, fraction, not_negative, positive, positive_int, proportions, share
from sat_lora.training.schedule import DECAY_STYLES

# They belong to one start of a run.
NOT_RESUMED = {"resume", "local_rank", "distributed_backend", "trust_checkpoint", "doctor", "shrink", "replay"}
EXAMPLES = """examples:
  deepspeed finetune_cogvlm.py
  deepspeed finetune_cogvlm.py --from_pretrained cogvlm-base-490 --version base --train-data images/ --bf16 \\
      --zero-stage 2 --checkpoint-activations --vit_checkpoint_activations --batch-size 4
  deepspeed finetune_cogvlm.py --resume runs/mine
  deepspeed finetune_cogvlm.py --from_pretrained cogvlm-base-490 --train-data images/ --doctor --shrink 2"""


class OptionParser(argparse.ArgumentParser):
    """Takes `--a-b` for `--a_b` and the other way round; rank 0 alone speaks, every rank ends with status 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.spellings = {"__help": "--help"}

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._declared_spelling(argument) for argument in args], namespace)

    def _declared_spelling(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        return self.spellings.get(name.replace("-", "_"), name) + equals + value if name[:2] == "--" else argument

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
            near = [name for one in names for name in difflib.get_close_matches(one, self.spellings.values(), 1)]
            hint = f"; did you mean {', '.join(near)}?" if near else "; --help lists the options"
            self.error(f"unknown: {' '.join(unknown)}{hint}")
        return options

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _print_message(self, message, file=None):
        if is_first_rank():
            super()._print_message(message, file)


def build_parser() -> argparse.ArgumentParser:
    """The parser. It holds no defaults: its namespace has the given options, `parse_options` adds the rest."""
    parser = OptionParser(
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
        parser.spellings |= {one.replace("-", "_"): one for one in (name, *more_names)}
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
    add(set_by_people, "--batch-size", "samples a GPU takes at once", type=positive_int, metavar="N")
    add(set_by_people, "--lr", "peak learning rate; LoRA wants 1e-4 or more", type=positive)
    add(set_by_people, "--resume", "run folder to go on with, under its own settings", metavar="RUN_FOLDER")

    add(model, "--trust-checkpoint", "unpickle all of --from_pretrained: runs any code in it", **flag)
    add(model, "--version", "prompt format of the base", choices=list(PROMPTS))
    add(model, "--local_tokenizer", "tokenizer folder (default: the --from_pretrained folder)", metavar="DIR")
    add(model, "--max_length", "longest sequence in tokens, the image's included", type=positive_int, metavar="N")

    for (name, *more_names), help, settings in lora_options():
        add(lora, name, help, *more_names, **settings)

    add(data, "--prompt", "the query that goes with every image")
    add(data, "--split", "train,valid,test shares when there is no --valid-data", type=proportions, metavar="A,B,C")
    add(data, "--max-broken-share", "the run stops when more of the samples are broken", type=share, metavar="X")
    add(data, "--max-pixels", "a larger picture is a broken sample, not read", type=positive_int, metavar="N")
    add(data, "--num-workers", "processes that read images, per rank", type=count, metavar="N")

    add(schedule, "--warmup", "steps of warm-up; below 1: their share of all steps", type=not_negative, metavar="N")
    add(schedule, "--lr-decay-style", "how the learning rate falls after it", choices=list(DECAY_STYLES))
    add(schedule, "--min-lr-ratio", "the rate falls to this share of --lr", type=fraction, metavar="X")
    add(schedule, "--gradient-accumulation-steps", "batches per optimizer step", type=positive_int, metavar="N")
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
    add(saving, "--save-interval", "steps between saved adapters; 0: at the end only", type=count, metavar="N")
    add(saving, "--keep", "newest adapters to keep, the best aside; 0: all", type=count, metavar="K")
    add(saving, "--eval-interval", "steps between validation losses; 0: at the end only", type=count, metavar="N")
    add(saving, "--eval-iters", "validation batches per rank; 0: all", type=count, metavar="N")
    add(
        saving,
        "--eval-batch-size",
        "for validation and --test-data (default: --batch-size)",
        type=positive_int,
        metavar="N",
    )
    add(saving, "--log-interval", "steps between the lines of train.jsonl", type=positive_int, metavar="N")

    add(checking, "--doctor", "check everything with one step per kind of batch, write nothing, and end", **flag)
    add(
        checking,
        "--watchdog-limit",
        "end a run that gives no sign of life for so long, and for ten times the longest that its phase has taken; "
        "0: never",
        type=not_negative,
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


def parse_options(
    argv: list[str] | None = None, *, demo_folder: str | Path = EMBEDDED_DEMO, environ: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Every option with its value, plus `given` (names of those set by hand) and `run_folder`.

    Values are JSON's types (paths are strings). With --resume and --replay, the settings of that run's `run.json` stand
    in for what is not given. A mistake ends the process with status 2 and one line on rank 0.
    """
    parser = build_parser()
    explicit = vars(parser.parse_args(argv))
    if {"train_iters", "epochs"} <= explicit.keys():
        parser.error(
            f"--train-iters {explicit['train_iters']} and --epochs {explicit['epochs']:g}: both say how long to "
            "train; give one of them"
        )
    if "shrink" in explicit and not explicit.keys() & {"doctor", "replay"}:
        parser.error(f"--shrink {explicit['shrink']}: training takes the whole model; it is for --doctor and --replay")
    values, given = {**DEFAULTS, "local_rank": int(environ.get("LOCAL_RANK", 0))}, frozenset(explicit)
    source = next((name for name in ("replay", "resume") if name in explicit), None)
    if source is not None:
        try:
            stored = settings_of_run(explicit[source])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--{source}: {explicit[source]} is no run folder with a readable run.json: {error}")
        given |= frozenset(stored.pop("given"))
        values.update(stored)
    elif "from_pretrained" not in explicit:
        values.update(demo_defaults(demo_folder))
        if "train_data" in explicit:  # the demo's held-out captchas say nothing about other data
            values.update(valid_data=None, test_data=None)
    if "epochs" in explicit:
        values["train_iters"] = None
    if "train_iters" in explicit:
        values["epochs"] = None
    values.update(explicit)
    values["local_tokenizer"] = values["local_tokenizer"] or values["from_pretrained"]
    if values["replay"]:
        values["experiment_name"] = "replay"
    values["run_folder"] = values["resume"] or str(Path(values["save"] or "runs") / values["experiment_name"])
    return argparse.Namespace(**values, given=given)


def settings_of_run(folder: str) -> dict:
    """The settings in FOLDER/run.json that a resumed run takes over, and `given`."""
    settings = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["settings"]
    known = {name: value for name, value in settings.items() if name in DEFAULTS and name not in NOT_RESUMED}
    return {**known, "given": [name for name in settings.get("given", ()) if name in DEFAULTS]}
