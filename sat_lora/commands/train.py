"""`sat-lora train`, which finetune_demo/finetune_cogvlm.py is as a script: fine-tune CogVLM with LoRA."""

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sat_lora.commands.parts import demo_of_clone
from sat_lora.parallel.launch import Program, command_program

if TYPE_CHECKING:
    from sat_lora.training.settings.config import Saving, Schedule, Start, TrainConfig
    from sat_lora.training.settings.demo import Demo

TRAIN = command_program("train")
EVALUATE = command_program("evaluate")


def add(commands) -> None:
    """Add the command to the sub-parsers of `sat-lora`. Its options, --help among them, are those of a run."""
    train = commands.add_parser("train", help="fine-tune CogVLM with LoRA", add_help=False, takes_more=True)
    train.set_defaults(run_command=lambda options: run_training(options.more, demo=demo_of_clone()), takes_more=True)


def script_main(argv: list[str] | None, script: str, demo: "Demo") -> int:
    """Run as finetune_cogvlm.py, and return the exit status, see `run_training`; 2 for a mistake.

    script: its path; evaluate_cogvlm.py lies beside it. demo: what runs where no base is named.
    """
    from sat_lora.terminal.edge import run_command

    path = Path(script).resolve()
    program, evaluation = (Program(name, (str(path.with_name(name)),)) for name in (path.name, "evaluate_cogvlm.py"))
    return run_command(program.name, lambda: run_training(argv, demo=demo, program=program, evaluation=evaluation))


def run_training(
    argv: list[str] | None,
    *,
    demo: "Demo | None" = None,
    program: Program = TRAIN,
    evaluation: Program = EVALUATE,
) -> int:
    """Train, or let the doctor look, as the options say, and return the exit status: 0, 1 for a finding of the doctor,
    3 from the watchdog, 128 + N for signal N.

    argv: the options; None takes those of the process. demo: what runs where no base is named. program, evaluation:
    what the lines that go on with the run start. Raises a SatLoraError for a user's mistake.
    """
    from sat_lora.parallel.launch import announce, find_place
    from sat_lora.terminal.notice import is_first_rank
    from sat_lora.training.early import check_early
    from sat_lora.training.settings.options import parse_options

    config = parse_options(argv, demo=demo, prog=program.name)
    place = find_place()
    check_early(config, place, demo=demo, writes=not config.start.doctor, program=program.name)
    announce(place)
    if config.start.doctor:
        from sat_lora.doctor.run_checks.packages import report_missing

        if report_missing():
            return 1
        from sat_lora.doctor.diagnose import report

        return report(config, demo)
    from sat_lora.parallel.distributed import destroy
    from sat_lora.parallel.stop_signals import Stopped
    from sat_lora.training.finetune import finetune

    try:
        prepared = finetune(config, demo)
    except Stopped as stopped:
        if is_first_rank():
            line = _resume_line(config, program, *_code(config.saving, "metrics", "metric"))
            print(f"{stopped}; resume with: {line}", flush=True)
        return stopped.status
    if prepared.world.is_main and not config.start.replay:
        print(what_next(prepared.config, program, evaluation), flush=True)
    destroy()
    return 0


def what_next(config: "TrainConfig", program: Program, evaluation: Program) -> str:
    """Return what the run has made, and the lines that go on with it: each can be pasted into any shell."""
    from sat_lora.parallel.launch import relaunch, sat_lora_line
    from sat_lora.printable import printable

    run = Path(os.path.abspath(config.run_folder))
    trust = _trust(config.start)
    best = _best_adapter(run)
    chosen = ["--adapter", str(best)] if best else []
    lines = [f"adapter     {printable(best or run / 'adapter')}"]
    lines.append(f"chat        {sat_lora_line('chat', '--run', run, *chosen, *trust)}")
    if config.data.test_data:
        lines.append(f"evaluation  {printable(run / 'evaluation.json')}")
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environ = os.environ if config.parallel.model_parallel_size > 1 else alone
        line = relaunch(
            evaluation, "--run", str(run), *chosen, *trust, *_code(config.saving, "metrics"), environ=environ
        )
        lines += [f"evaluate    {line}"] if line else []
    base = os.path.abspath(config.model.base)
    out = _new_folder(run / "merged")
    onto = ["--onto", "trained"] if _is_quantized(base) else []
    merge = sat_lora_line("merge", "--base", base, *trust, "--adapter", best or run / "adapter", "--out", out, *onto)
    further = _resume_line(
        config, program, *_code(config.saving, "metrics", "metric"), *_beyond(config.schedule, config.saving, run)
    )
    lines += [f"merge       {merge}", f"resume      {further}"]
    return "\n".join(lines)


def _is_quantized(base: str) -> bool:
    """Return whether the folder of a base holds weights in fewer bits, which merge decodes where it is told to."""
    from sat_lora.cogvlm.checkpoints.load import read_config
    from sat_lora.cogvlm.checkpoints.quantized_files import KEY
    from sat_lora.errors import SatLoraError

    try:
        return KEY in read_config(base)
    except (SatLoraError, OSError):
        return False


def _best_adapter(run: Path) -> Path | None:
    """Return the adapter of the lowest validation loss; None where that is the latest, or there was no validation."""
    from sat_lora.files.step_folders import BEST, LATEST, read_pointer

    best, latest = (read_pointer(run / "adapter" / name) for name in (BEST, LATEST))
    return None if best in (None, latest) else run / "adapter" / BEST


def _new_folder(path: Path) -> Path:
    """Return the path, or the first of PATH-2, PATH-3, ... that does not exist where it does."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def _resume_line(config: "TrainConfig", program: Program, *more: object) -> str:
    """Return the line that goes on with the run, as it was launched. more: further options."""
    from sat_lora.parallel.launch import relaunch
    from sat_lora.printable import shell_line

    options = ["--resume", os.path.abspath(config.run_folder), *_trust(config.start), *map(str, more)]
    line = relaunch(program, *options)
    return line or f"the launcher and the ranks that the run had, and {shell_line(options)}"


def _beyond(schedule: "Schedule", saving: "Saving", run: Path) -> list[object]:
    """Return the options with which a run that has ended goes on: more steps, or no early end where it had one."""
    from sat_lora.errors import CheckpointError
    from sat_lora.training.resume import state_to_resume

    try:
        step = state_to_resume(run)["step"]
    except CheckpointError:
        step = schedule.steps
    ended_early = saving.early_stopping and step < schedule.steps
    return ["--early-stopping", 0] if ended_early else ["--train-iters", 2 * schedule.steps]


def _code(saving: "Saving", *fields: str) -> list[str]:
    """Return the options, of these fields, that name code of the user's: a run does not take them over."""
    from sat_lora.training.metrics.generated import is_code

    named = {"metrics": saving.metrics, "metric": (saving.metric,)}
    return [word for field in fields if any(map(is_code, named[field])) for word in (f"--{field}", *named[field])]


def _trust(start: "Start") -> list[str]:
    """Return the option that lets the base be unpickled, in a list that is empty where it was not given."""
    return ["--trust-checkpoint"] * start.trust_checkpoint
