"""`sat-lora evaluate`, which finetune_demo/evaluate_cogvlm.py is as a script: base against base + adapter."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sat_lora.parallel.launch import Place
    from sat_lora.training.settings.config import TrainConfig


NAME = "sat-lora evaluate"
DESCRIPTION = """\
Compare a CogVLM base with base + adapter on images whose answers are known, by greedy generation.

    sat-lora evaluate --run runs/demo                     # what a run was trained and tested with
    torchrun --nproc_per_node 8 -m sat_lora.cli evaluate --from_pretrained BASE --adapter ADAPTER --test-data IMAGES

Several ranks share the images. Prints a table and writes it to --out, or into the run folder of the adapter as
evaluation.json; what is of another adapter, base or test data than the evaluation there goes to evaluation-2.json, ...
Beside it predictions.jsonl has all answers. The metrics are in docs/evaluation.md.
"""


def add(commands) -> None:
    """Add the command to the sub-parsers of `sat-lora`. It parses its options, --help among them, itself."""
    about = "compare a base with base + adapter on images whose answers are known"
    evaluate = commands.add_parser("evaluate", help=about, add_help=False, takes_more=True)
    evaluate.set_defaults(run_command=lambda options: run_evaluation(options.more), takes_more=True)


def build_parser(name: str = NAME, description: str = DESCRIPTION) -> argparse.ArgumentParser:
    """Return the parser of the program of that name.

    CogVLM's published evaluation scripts run with their options unchanged: options that mean nothing to an evaluation
    are taken under `no_effect`, a list of names.
    """
    from sat_lora.data.reading import Reading
    from sat_lora.terminal.option_parser import OptionParser
    from sat_lora.training.metrics.generated import GENERATED
    from sat_lora.training.settings.config import KNOWN
    from sat_lora.training.settings.options import add_config_options
    from sat_lora.training.settings.options import build_parser as finetune_parser

    parser = OptionParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The other options of `sat-lora train`, and --strict-eval, are accepted without effect: all of the "
        "test data is always answered.",
    )
    add = parser.add_argument
    add("--run", metavar="RUN_FOLDER", help="a run folder: what is not given is taken from its run.json")
    KNOWN["from_pretrained"].add_to(parser, help="SAT folder of the base, or of a merged model")
    KNOWN["trust_checkpoint"].add_to(parser)
    KNOWN["any_base"].add_to(parser, help="take a base that the adapter was not trained on")
    folders = "adapter folders, side by side (default: RUN_FOLDER/adapter; without both, the base alone)"
    add("--adapter", nargs="+", metavar="DIR", help=folders)
    add("--no-base", action="store_true", help="leave out the answers of the base alone")
    KNOWN["test_data"].add_to(parser, help="folders of images LABEL.png, or files of samples")
    for name in ("local_tokenizer", "version", "prompt", "special_tokens_in_text"):
        KNOWN[name].add_to(parser)
    for name in Reading.__dataclass_fields__:
        if name in KNOWN:
            KNOWN[name].add_to(parser)
    KNOWN["max_length"].add_to(parser, help="longest sequence in tokens (default: as in training)")
    KNOWN["eval_batch_size"].add_to(parser, "--batch-size", help="images at once (default: 4)")
    for name in ("max_pixels", "model_parallel_size", "bf16"):
        KNOWN[name].add_to(parser)
    KNOWN["fp16"].add_to(parser, help="float16, for GPUs without bfloat16")
    held = "how the base's linears are held: none (whole), nf4, int8 (default: as in the run, or by its folder)"
    KNOWN["quantize"].add_to(parser, help=held)
    for name in ("quantize_modules", "keep_modules"):
        KNOWN[name].add_to(parser)
    names = f"{', '.join(GENERATED)}, or MODULE:FUNCTION (default: the two exact matches)"
    KNOWN["metrics"].add_to(parser, help=names)
    add("--out", metavar="FILE", help="where the json goes (default: evaluation.json in the run folder)")
    page = "a page of the pictures with all answers, the worst first (default PAGE: beside the json)"
    add("--gallery", nargs="?", const="", metavar="PAGE", help=page)
    limit = "end ranks that wait for each other without a sign of life for so long; 0: never (default: 120)"
    KNOWN["watchdog_limit"].add_to(parser, help=limit)
    for name in ("local_rank", "image_length", "cross_image_pix", "eva_args"):
        KNOWN[name].add_to(parser)
    add_config_options(parser)
    known = parser.spellings
    for action in finetune_parser()._actions:
        flags = [flag for flag in action.option_strings if flag.replace("-", "_") not in known]
        if flags and "--help" not in action.option_strings:
            add(*flags, action=_NoEffect, nargs=action.nargs, dest="no_effect", default=[], help=argparse.SUPPRESS)
    add("--strict-eval", action=_NoEffect, nargs=0, dest="no_effect", default=[], help=argparse.SUPPRESS)
    return parser


class _NoEffect(argparse.Action):
    """An action that notes the name of the option."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.no_effect = [*namespace.no_effect, self.option_strings[0]]


def read_config_of(options: argparse.Namespace) -> "TrainConfig":
    """Return the config that the options ask for, filled up from a --config file, the run's settings and the defaults.

    Base and test data may be missing. Raises ConfigError where a file or run cannot be read.
    """
    from sat_lora.cogvlm.inputs.prompts import settings_of_base
    from sat_lora.errors import ConfigError
    from sat_lora.training.settings.config import KNOWN
    from sat_lora.training.settings.config_file import read_config_file
    from sat_lora.training.settings.resolve import resolve
    from sat_lora.training.settings.run_settings import settings_of_run

    stored = {}
    if options.run:
        try:
            stored = settings_of_run(options.run)
        except ConfigError as error:
            raise ConfigError(f"--run: {error}") from error
        if {"bf16", "fp16"} & vars(options).keys():
            stored |= {"bf16": False, "fp16": False}
        stored |= {"given": [], "train_iters": None, "epochs": None}
    path = vars(options).get("config")
    file = {} if path is None else read_config_file(path)
    given = {name: value for name, value in vars(options).items() if name in KNOWN}
    base = {**stored, **file, **given}.get("from_pretrained")
    stored = {name: value for name, value in stored.items() if name != "version" or value}
    config, _ = resolve(given, file=file, resumed_run=stored, base={} if base is None else settings_of_base(base))
    return config


def read_settings(options: argparse.Namespace) -> "Evaluation":
    """Return the evaluation that the options ask for, see `read_config_of`.

    Raises ConfigError where something is still missing, or a file or run cannot be read.
    """
    from sat_lora.commands.chat import names_of
    from sat_lora.errors import ConfigError
    from sat_lora.training.settings.resolve import held_as_its_folder

    config = read_config_of(options)
    folders = options.adapter or ([str(Path(options.run) / "adapter")] if options.run else [])
    adapter: str | dict[str, str] | None = folders[0] if folders else None
    if len(folders) > 1:
        adapter = names_of(folders)
    missing = [
        option
        for option, value in (
            ("--from_pretrained", config.model.from_pretrained),
            ("--test-data", config.data.test_data),
        )
        if not value
    ]
    if missing:
        source = f"{options.run} has none; give" if options.run else "give"
        other = "" if options.run else ", or --run RUN_FOLDER of a run that has them"
        raise ConfigError(f"{', '.join(missing)} missing: {source} them{other}")
    config = held_as_its_folder(config)
    if options.no_base and adapter is None:
        raise ConfigError("--no-base: there is no --adapter, so nobody would answer; leave it out")
    return Evaluation(
        config=config,
        adapter=adapter,
        run=options.run,
        out=options.out,
        any_base=config.start.any_base,
        has_base=not options.no_base,
        gallery=options.gallery,
    )


class Evaluation(NamedTuple):
    """The config and adapters of an evaluation, and where the result goes; see the options."""

    config: "TrainConfig"
    adapter: str | dict[str, str] | None
    """The folder, or several by what they are called."""
    run: str | None
    out: str | None
    any_base: bool
    has_base: bool
    gallery: str | None
    """The page's file; empty: beside the json; None: none is written."""


def run_evaluation(argv: list[str] | None, name: str = NAME, description: str = DESCRIPTION) -> int:
    """Evaluate as the options say, and return the exit status: 0. Raises a SatLoraError for a user's mistake.

    argv: the options; None takes those of the process. name, description: of the program, in its messages and help.
    """
    from sat_lora.errors import ConfigError
    from sat_lora.parallel.launch import announce, find_place
    from sat_lora.printable import printable
    from sat_lora.terminal.notice import is_first_rank
    from sat_lora.training.settings.config_file import as_yaml

    options = build_parser(name, description).parse_args(argv)
    place = find_place()
    if vars(options).get("print_config"):
        if is_first_rank():
            print(as_yaml(read_config_of(options), file=vars(options).get("config")), end="", flush=True)
        return 0
    evaluation = read_settings(options)
    config = evaluation.config
    mp_size = config.parallel.model_parallel_size
    if place.size % mp_size:
        raise ConfigError(f"--model-parallel-size: {mp_size} does not divide {place.size} ranks")
    _check_early(evaluation, place, name)
    no_effect = list(dict.fromkeys(options.no_effect))
    if is_first_rank() and no_effect:
        print(f"no effect on an evaluation: {', '.join(no_effect)}", flush=True)
    if is_first_rank() and not evaluation.adapter:
        print(f"no --adapter: {printable(config.model.base)} is evaluated alone", flush=True)
    announce(place)
    from sat_lora.parallel.distributed import destroy, init_distributed, init_model_parallel, run_on_all_ranks
    from sat_lora.training.answers.gallery import gallery_file, refuse_other_page, write_gallery
    from sat_lora.training.evaluation import (
        answer_test_data,
        evaluation_file,
        evaluation_table,
        predictions_file,
        try_to_write,
        write_evaluation,
    )
    from sat_lora.training.marks import marks_of_options
    from sat_lora.training.runs.card_sections import add_evaluation
    from sat_lora.training.runs.run_lock import RunLock
    from sat_lora.training.runs.traced import traced
    from sat_lora.training.steps.observers import Observers
    from sat_lora.watchdog.watchdog import watched_alone

    adapter = evaluation.adapter
    device = init_distributed(marks=marks_of_options(config))
    world = init_model_parallel(device, mp_size)
    config = config.replaced(bf16=config.precision.bf16 or (device.type == "cuda" and not config.precision.fp16))
    has_base = evaluation.has_base
    out, run = evaluation_file(config, adapter=adapter, run=evaluation.run, out=evaluation.out, has_base=has_base)
    lock: contextlib.AbstractContextManager = contextlib.nullcontext()
    if run is not None:
        lock = RunLock(run, doing="evaluating", option="--run", instead="write elsewhere, with --out FILE")
    with lock, watched_alone(config.checks.watchdog_limit) as trace:
        observers = Observers(traced(trace))
        any_base = evaluation.any_base
        page = None if evaluation.gallery is None else gallery_file(out, evaluation.gallery)
        run_on_all_ranks(lambda: try_to_write(out) if world.is_main else None)
        if page is not None:
            run_on_all_ranks(lambda: refuse_other_page(page) if world.is_main else None)
        measured = run_on_all_ranks(
            answer_test_data,
            config,
            adapter,
            world,
            observers=observers,
            any_base=any_base,
            has_base=has_base,
        )
        run_on_all_ranks(lambda: write_evaluation(out, measured, config, adapter, has_base) if world.is_main else None)
        if page is not None:
            run_on_all_ranks(lambda: write_gallery(page, measured, config.data.max_pixels) if world.is_main else None)
        if world.is_main and run is not None and out.name == "evaluation.json" and isinstance(adapter, str):
            add_evaluation(adapter, measured.result)
    if world.is_main:
        is_own = evaluation.out or not adapter or out.name == "evaluation.json"
        why = "" if is_own else "; evaluation.json is another evaluation's"
        lines = [evaluation_table(measured.result), f"written to {printable(out)}{why}"]
        lines.append(f"predictions {printable(predictions_file(out))}")
        lines += [] if page is None else [f"gallery     {printable(page)}"]
        print("\n".join(lines), flush=True)
    destroy()
    return 0


def _check_early(evaluation: Evaluation, place: "Place", name: str) -> None:
    """Raise ConfigError or DataError, before anything slow is imported, with all that is not there."""
    from sat_lora.files.paths import missing_adapter
    from sat_lora.training.early import check_early

    adapter = evaluation.adapter
    folders = [*adapter.values()] if isinstance(adapter, dict) else [adapter] if adapter else []
    problems = [problem for problem in map(missing_adapter, folders) if problem]
    more = [f"--adapter: {problem}" for problem in problems]
    check_early(evaluation.config, place, writes=False, trains=False, more=more, program=name)
