"""Compare a CogVLM base with base + adapter on images whose answers are known, by greedy generation.

    python finetune_demo/evaluate_cogvlm.py --run runs/demo            # what a run was trained and tested with
    deepspeed --num_gpus 8 finetune_demo/evaluate_cogvlm.py --from_pretrained BASE --adapter ADAPTER --test-data IMAGES

Several ranks share the images. Prints a table and writes it to --out, or into the run folder of the adapter as
evaluation.json; what is of another adapter, base or test data than the evaluation there goes to evaluation-2.json, ...
"""

import argparse
import contextlib
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """The parser. CogVLM's published evaluation scripts run with their options unchanged: what says nothing to an
    evaluation is taken under `no_effect`, a list of names.
    """
    from sat_lora.terminal.option_parser import OptionParser
    from sat_lora.terminal.option_types import batch, positive_int, seconds
    from sat_lora.training.settings.options import build_parser as finetune_parser

    parser = OptionParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The other options of finetune_cogvlm.py, and --strict-eval, are accepted without effect: all of the "
        "test data is always answered.",
    )
    add = parser.add_argument
    add("--run", metavar="RUN_FOLDER", help="a run folder: what is not given is taken from its run.json")
    add("--from_pretrained", metavar="DIR", help="SAT folder of the base, or of a merged model")
    add("--trust-checkpoint", action="store_true", default=None, help="unpickle all of the base: runs any code in it")
    add("--any-base", action="store_true", default=None, help="take a base that the adapter was not trained on")
    add("--adapter", metavar="DIR", help="adapter folder (default: RUN_FOLDER/adapter; without both, the base alone)")
    add("--test-data", nargs="+", metavar="PATH", help="folders of images LABEL.png, or .jsonl files")
    add("--local_tokenizer", metavar="DIR", help="tokenizer folder (default: the base's)")
    versions = ["base", "chat", "vqa", "chat_old"]
    add("--version", choices=versions, help="prompt format of the base (default: its config's, or chat)")
    add("--prompt", help="the query of every image without its own (default: What is this?)")
    add("--special-tokens-in-text", action="store_true", default=None, help="a text that spells </s> means the token")
    add("--ignore-keys", nargs="+", metavar="KEY", help="keys of .jsonl lines to pass over")
    add("--images-from", nargs="+", metavar="DIR", help="folders that .jsonl lines may lead to by ..")
    names = "of folders file names are the answers, whatever texts lie in or beside them"
    add("--names-are-answers", action="store_true", default=None, help=names)
    add("--max_length", type=positive_int, metavar="N", help="longest sequence in tokens (default: 1288)")
    add("--max-pixels", type=positive_int, metavar="N", help="a larger picture is not read (default: 89478485)")
    add("--eval-batch-size", "--batch-size", type=batch, metavar="N", help="images at once (default: 4)")
    add("--model-parallel-size", type=positive_int, metavar="N", help="ranks that share one model (default: 1)")
    add("--bf16", action="store_true", default=None, help="bfloat16 (default on CUDA)")
    add("--fp16", action="store_true", default=None, help="float16")
    add("--out", metavar="FILE", help="where the json goes (default: evaluation.json in the run folder)")
    add(
        "--watchdog-limit",
        type=seconds,
        metavar="SECONDS",
        help="end ranks that wait for each other without a sign of life for so long; 0: never (default: 120)",
    )
    add("--local_rank", type=int, help="set by the launcher")
    known = parser.spellings
    for action in finetune_parser()._actions:
        flags = [flag for flag in action.option_strings if flag.replace("-", "_") not in known]
        if flags and "--help" not in action.option_strings:
            add(*flags, action=_NoEffect, nargs=action.nargs, dest="no_effect", default=[], help=argparse.SUPPRESS)
    add("--strict-eval", action=_NoEffect, nargs=0, dest="no_effect", default=[], help=argparse.SUPPRESS)
    return parser


class _NoEffect(argparse.Action):
    """Notes that the option was given."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.no_effect = [*namespace.no_effect, self.option_strings[0]]


DEFAULTS = dict(
    version="chat",
    prompt="What is this?",
    max_length=1288,
    eval_batch_size=4,
    model_parallel_size=1,
    watchdog_limit=120.0,
    trust_checkpoint=False,
)


def read_settings(options: argparse.Namespace) -> argparse.Namespace:
    """The options, filled up from the run's settings and the defaults; ConfigError if something is still missing."""
    from sat_lora.errors import ConfigError
    from sat_lora.training.settings.defaults import version_of
    from sat_lora.training.settings.options import settings_of_run

    stored = {}
    if options.run:
        try:
            stored = settings_of_run(options.run)
        except ConfigError as error:
            raise ConfigError(f"--run: {error}") from error
        stored["adapter"] = str(Path(options.run) / "adapter")
        if options.bf16 or options.fp16:
            stored["bf16"] = stored["fp16"] = None
    given = {name: value for name, value in vars(options).items() if value is not None}
    known = set(vars(options))
    merged = {
        **dict.fromkeys(known),
        **DEFAULTS,
        **{k: v for k, v in stored.items() if k in known and v is not None},
        **given,
    }
    if merged["from_pretrained"] and not (given.get("version") or stored.get("version")):
        merged["version"] = version_of(merged["from_pretrained"]) or DEFAULTS["version"]
    options = argparse.Namespace(**merged)
    options.local_tokenizer = options.local_tokenizer or options.from_pretrained
    missing = [f"--{name}" for name in ("from_pretrained", "test-data") if not getattr(options, name.replace("-", "_"))]
    if missing:
        source = f"{options.run} has none; give" if options.run else "give"
        other = "" if options.run else ", or --run RUN_FOLDER of a run that has them"
        raise ConfigError(f"{', '.join(missing)} missing: {source} them{other}")
    return options


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    from sat_lora.terminal.edge import run_command

    return run_command("evaluate_cogvlm.py", lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    from sat_lora.errors import ConfigError
    from sat_lora.parallel.launch import announce, find_place
    from sat_lora.printable import printable
    from sat_lora.terminal.notice import is_first_rank

    parser = build_parser()
    options = parser.parse_args(argv)
    place = find_place()
    no_effect = list(dict.fromkeys(options.no_effect))
    options = read_settings(options)
    if place.size % options.model_parallel_size:
        raise ConfigError(f"--model-parallel-size: {options.model_parallel_size} does not divide {place.size} ranks")
    _check_early(options, place)
    if is_first_rank() and no_effect:
        print(f"no effect on an evaluation: {', '.join(no_effect)}", flush=True)
    if is_first_rank() and not options.adapter:
        print(f"no --adapter: {printable(options.from_pretrained)} is evaluated alone", flush=True)
    announce(place)
    from sat_lora.parallel.distributed import arrange, join, stop, together
    from sat_lora.training.evaluation import (
        evaluate_adapter,
        evaluation_file,
        evaluation_table,
        try_to_write,
        write_evaluation,
    )
    from sat_lora.training.marks import marks_of_options
    from sat_lora.training.runs.run_lock import RunLock
    from sat_lora.training.runs.traced import traced
    from sat_lora.training.steps.observers import Observers
    from sat_lora.watchdog.watchdog import watched_alone

    device = join(marks=marks_of_options(options))
    world = arrange(device, options.model_parallel_size)
    options.bf16 = options.bf16 or (device.type == "cuda" and not options.fp16)
    out, run = evaluation_file(options)
    lock = contextlib.nullcontext()
    if run is not None:
        lock = RunLock(run, doing="evaluating", option="--run", instead="write elsewhere, with --out FILE")
    with lock, watched_alone(options.watchdog_limit) as trace:
        any_base, observers = bool(options.any_base), Observers(traced(trace))
        together(lambda: try_to_write(out) if world.is_main else None)
        result = together(evaluate_adapter, options, options.adapter, world, observers=observers, any_base=any_base)
        together(lambda: write_evaluation(out, result, options, options.adapter) if world.is_main else None)
    if world.is_main:
        is_own = options.out or not options.adapter or out.name == "evaluation.json"
        why = "" if is_own else "; evaluation.json is another evaluation's"
        print(f"{evaluation_table(result)}\nwritten to {printable(out)}{why}", flush=True)
    stop()
    return 0


def _check_early(options: argparse.Namespace, place) -> None:
    """Before anything slow is imported: ConfigError or DataError, with what is not there."""
    from sat_lora.files.paths import missing_adapter
    from sat_lora.training.early import check_early

    problem = missing_adapter(options.adapter) if options.adapter else None
    check_early(options, place, writes=False, more=[f"--adapter: {problem}"] if problem else [])


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(f"evaluate_cogvlm.py: error: {error} in {sys.executable}; README.md says how to install", file=sys.stderr)
        sys.exit(2)
    run_script("evaluate_cogvlm.py", main)
