"""`sat-lora doctor`: before a run, with its options; after one that hung, with its folder."""

import argparse
import subprocess
import sys

from sat_lora.commands.parts import demo_of_clone, examples
from sat_lora.terminal.option_types import positive_int


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    doctor = commands.add_parser(
        "doctor",
        help="find why a backward hangs, or why nothing learns",
        usage="%(prog)s [--ranks N] [--shrink N] [--json] [options of sat-lora train]\n"
        "       %(prog)s --run RUN_FOLDER [--log FILE ...] [--plot PNG] [--json]\n"
        "       %(prog)s --run RUN_FOLDER --replay [--shrink N]",
        description="Before a run: builds the model as the run would, takes one step per kind of batch on every rank, "
        "and writes nothing.\nAfter one that hung: says which rank stopped where, and the likely cause. "
        "docs/doctor.md explains every code.",
        takes_more=True,
        **examples(
            "sat-lora doctor --from_pretrained cogvlm-base-490 --train-data images/ --version base --bf16",
            "sat-lora doctor --ranks 2 --shrink 2 --from_pretrained cogvlm-base-490 --train-data images/",
            "sat-lora doctor --run runs/mine --plot gradients.png",
            "sat-lora doctor --run runs/mine --log slurm-4711.out",
            "sat-lora doctor --run runs/mine --replay --shrink 2",
        ),
    )
    doctor.add_argument(
        "--ranks",
        type=positive_int,
        default=1,
        metavar="N",
        help="start N gloo ranks on this machine's CPU, as for --model-parallel-size N; on GPUs a launcher starts "
        "them: torchrun --nproc_per_node N -m sat_lora.cli train --doctor ...",
    )
    doctor.add_argument("--shrink", metavar="N", help="take the first N layers of each transformer alone")
    doctor.add_argument("--json", action="store_true", help="findings for programs")
    doctor.add_argument("--run", metavar="DIR", help="folder of a run that hangs, hung or died")
    doctor.add_argument("--log", nargs="+", default=[], metavar="FILE", help="what its ranks printed: NCCL's lines")
    doctor.add_argument("--plot", metavar="PNG", help="draw when each gradient came, with the gap marked")
    doctor.add_argument(
        "--replay", action="store_true", help="run that step again, on gloo ranks with TORCH_DISTRIBUTED_DEBUG=DETAIL"
    )
    doctor.set_defaults(run_command=run, takes_more=True)


def run(options: argparse.Namespace) -> int:
    """Print findings before a run or after it; return 0 without any that matters, else 1, or the status of other ranks.

    Raises a SatLoraError for a user's mistake.
    """
    from sat_lora.errors import ConfigError
    from sat_lora.watchdog.rank_files import refuse_no_traces

    if options.run is None:
        wrong = [name for name in ("log", "plot", "replay") if getattr(options, name)]
        if wrong:
            raise ConfigError(f"--{wrong[0]}: needs --run, the folder of the run to look at")
        return _before(options)
    if options.more:
        raise ConfigError(f"--run: takes no options of a run, got {' '.join(options.more)}")
    if options.shrink and not options.replay:
        raise ConfigError("--shrink: with --run it is for --replay")
    if options.ranks > 1:
        raise ConfigError("--ranks: it is for the doctor before a run; with --run the ranks are those of the run")
    refuse_no_traces(options.run)
    return _replay(options) if options.replay else _after(options)


def _before(options: argparse.Namespace) -> int:
    """Look at a run that has not begun, on as many ranks as are asked for, and return the exit status."""
    from sat_lora.errors import ConfigError
    from sat_lora.parallel.launch import find_place
    from sat_lora.training.early import check_early
    from sat_lora.training.settings.options import parse_options

    more = [*options.more, *(("--shrink", options.shrink) if options.shrink else ())]
    demo = demo_of_clone()
    config = parse_options(["--doctor", *more], prog="sat-lora doctor", demo=demo)
    place = find_place()
    if options.ranks > 1 and place.size > 1:
        raise ConfigError(f"--ranks {options.ranks}: {place.size} ranks run already (WORLD_SIZE); leave it out")
    if not options.json:  # which says all as findings
        check_early(config, place, writes=False)
    from sat_lora.doctor.run_checks.packages import report_missing

    if report_missing():
        return 1
    if options.ranks > 1:
        from sat_lora.watchdog.replay import gloo_ranks

        command, environment = gloo_ranks(options.ranks)
        json_too = ["--json"] if options.json else []
        command += ["-m", "sat_lora.cli", "doctor", *json_too, *more]
        return subprocess.run(command, env=environment, check=False).returncode
    from sat_lora.doctor.diagnose import report

    return report(config, demo, as_json=options.json)


def _after(options: argparse.Namespace) -> int:
    """Look at what a run has left, print the verdict, and return 1 where it is a finding, else 0."""
    from sat_lora.doctor.timeline import draw_timeline
    from sat_lora.findings.finding import as_json
    from sat_lora.printable import printable, printable_lines
    from sat_lora.watchdog.rank_state import read_states
    from sat_lora.watchdog.verdict import verdict
    from sat_lora.watchdog.watchdog import when_alarmed

    result = verdict(options.run, options.log)
    if options.json:
        print(as_json([result.finding] if result.finding else []))
    else:
        intro = f"{result.finding.level}: {result.finding.code}\n" if result.finding else ""
        print(intro + printable_lines(result.text), flush=True)
    if options.plot:
        draw_timeline(read_states(options.run), options.plot, when_alarmed(options.run))
        print(f"gradients in {printable(options.plot)}", file=sys.stderr)
    return 0 if result.finding is None else 1


def _replay(options: argparse.Namespace) -> int:
    """Run the last step of a run again, and return the exit status."""
    from sat_lora.watchdog.replay import replay

    return replay(options.run, ["--shrink", options.shrink] if options.shrink else [])
