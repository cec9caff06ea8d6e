"""Fine-tune CogVLM with LoRA.

    deepspeed finetune_demo/finetune_cogvlm.py                      # the tiny base on captcha images; a CPU will do
    deepspeed --num_gpus 8 finetune_demo/finetune_cogvlm.py --from_pretrained cogvlm-base-490 --train-data my_images

`torchrun` and plain `python` start it just as well. `--help` lists the options.
"""

import itertools
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Run as the options say, and return the exit status: 0, 1 for a finding of the doctor, 2 for a mistake, 3 from the
    watchdog, 128 + N for signal N.
    """
    from sat_lora.terminal.edge import run_command

    return run_command("finetune_cogvlm.py", lambda: _finetune(argv))


def _finetune(argv: list[str] | None) -> int:
    """Train, or let the doctor look, as the options say, and return the exit status.

    Raises a SatLoraError for a user's mistake.
    """
    from sat_lora.parallel.launch import announce, find_place
    from sat_lora.terminal.notice import is_first_rank
    from sat_lora.training.early import check_early
    from sat_lora.training.settings.options import parse_options

    demo = _demo()
    config = parse_options(argv, demo=demo)
    place = find_place()
    check_early(config, place, demo=demo, writes=not config.start.doctor)
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
        setting = finetune(config, demo)
    except Stopped as stopped:
        if is_first_rank():
            print(f"{stopped}; resume with: {_resume_line(config)}", flush=True)
        return stopped.status
    if setting.world.is_main and not config.start.replay:
        print(_what_next(setting.config), flush=True)
    destroy()
    return 0


def _demo():
    """Return the demo, which lies beside this script."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    from demo import DEMO

    return DEMO


def _what_next(config) -> str:
    """Return what the run has made, and the lines that go on with it: each can be pasted into any shell."""
    from sat_lora.parallel.launch import relaunch, sat_lora_line
    from sat_lora.printable import printable

    run = Path(os.path.abspath(config.run_folder))
    trust = _trust(config)
    best = _best_adapter(run)
    chosen = ["--adapter", str(best)] if best else []
    lines = [f"adapter     {printable(best or run / 'adapter')}"]
    lines.append(f"chat        {sat_lora_line('chat', '--run', run, *chosen, *trust)}")
    if config.data.test_data:
        lines.append(f"evaluation  {printable(run / 'evaluation.json')}")
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environ = os.environ if config.parallel.model_parallel_size > 1 else alone
        line = relaunch(HERE / "evaluate_cogvlm.py", "--run", str(run), *chosen, *trust, environ=environ)
        lines += [f"evaluate    {line}"] if line else []
    base = os.path.abspath(config.model.base)
    out = _new_folder(run / "merged")
    merge = sat_lora_line("merge", "--base", base, *trust, "--adapter", best or run / "adapter", "--out", out)
    further = _resume_line(config, "--train-iters", 2 * config.schedule.steps)
    lines += [f"merge       {merge}", f"resume      {further}"]
    return "\n".join(lines)


def _best_adapter(run: Path) -> Path | None:
    """Return the adapter of the lowest validation loss; None where that is the latest, or there was no validation."""
    from sat_lora.files.step_folders import BEST, LATEST, read_pointer

    best, latest = (read_pointer(run / "adapter" / name) for name in (BEST, LATEST))
    return None if best in (None, latest) else run / "adapter" / BEST


def _new_folder(path: Path) -> Path:
    """Return the path, or the first of PATH-2, PATH-3, ... that does not exist where it does."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def _resume_line(config, *more) -> str:
    """Return the line that goes on with the run, as it was launched. more: further options."""
    from sat_lora.parallel.launch import relaunch
    from sat_lora.printable import shell_line

    options = ["--resume", os.path.abspath(config.run_folder), *_trust(config), *map(str, more)]
    line = relaunch(__file__, *options)
    return line or f"the launcher and the ranks that the run had, and {shell_line(options)}"


def _trust(config) -> list[str]:
    """Return the option that lets the base be unpickled, in a list that is empty where it was not given."""
    return ["--trust-checkpoint"] * config.start.trust_checkpoint


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(
            f"finetune_cogvlm.py: error: {error} for {sys.executable}; see Two commands in README.md", file=sys.stderr
        )
        sys.exit(2)
    run_script("finetune_cogvlm.py", main)
