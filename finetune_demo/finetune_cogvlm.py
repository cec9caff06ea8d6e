"""Fine-tune CogVLM with LoRA.

    deepspeed finetune_demo/finetune_cogvlm.py                      # the tiny base on captcha images; a CPU will do
    deepspeed --num_gpus 8 finetune_demo/finetune_cogvlm.py --from_pretrained cogvlm-base-490 --train-data my_images

`torchrun` and plain `python` start it just as well. `--help` lists the options.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 for a finding of the doctor, 2 for a mistake, 3 from the watchdog, 128 + N for signal N."""
    from sat_lora.terminal.edge import run_command

    return run_command("finetune_cogvlm.py", lambda: _finetune(argv))


def _finetune(argv: list[str] | None) -> int:
    from sat_lora.parallel.launch import announce, find_place
    from sat_lora.terminal.notice import is_first_rank
    from sat_lora.training.early import check_early
    from sat_lora.training.settings.options import parse_options

    options, place = parse_options(argv, demo_folder=HERE), find_place()
    check_early(options, place, demo_data=HERE / "captchas", writes=not options.doctor)
    announce(place)
    if options.doctor:
        from sat_lora.doctor.run_checks.packages import report_missing

        if report_missing():
            return 1
        from sat_lora.doctor.diagnose import report

        return report(options, make_data=lambda: _make_demo_data(options))
    from sat_lora.parallel.distributed import destroy
    from sat_lora.parallel.stop_signals import Stopped
    from sat_lora.training.finetune import finetune

    try:
        world = finetune(options, make_data=lambda: _make_demo_data(options))
    except Stopped as stopped:
        if is_first_rank():
            print(f"{stopped}; resume with: {_resume_line(options)}", flush=True)
        return stopped.status
    if world.is_main and not options.replay:
        print(_what_next(options), flush=True)
    destroy()
    return 0


def _make_demo_data(options) -> None:
    """Render the captchas, if the demo's own folders are what the options name and they are not there yet."""
    folder = HERE / "captchas"
    named = [*(options.train_data or ()), *(options.valid_data or ()), *(options.test_data or ())]
    if any(Path(path).parent == folder for path in named) and not folder.exists():
        sys.path.insert(0, str(HERE))
        from make_captchas import make_captchas

        make_captchas(folder)


def _what_next(options) -> str:
    """What the run has made, and the lines that go on with it: each can be pasted into any shell."""
    from sat_lora.parallel.launch import relaunch, sat_lora_line
    from sat_lora.printable import printable

    run, trust = Path(os.path.abspath(options.run_folder)), ["--trust-checkpoint"] * options.trust_checkpoint
    best = _best_adapter(run)
    lines = [f"adapter     {printable(best or run / 'adapter')}"]
    if options.test_data:
        lines.append(f"evaluation  {printable(run / 'evaluation.json')}")
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environ = os.environ if options.model_parallel_size > 1 else alone
        chosen = ["--adapter", str(best)] if best else []
        line = relaunch(HERE / "evaluate_cogvlm.py", "--run", str(run), *chosen, *trust, environ=environ)
        lines += [f"evaluate    {line}"] if line else []
    base, out = os.path.abspath(options.from_pretrained), _new_folder(run / "merged")
    merge = sat_lora_line("merge", "--base", base, *trust, "--adapter", best or run / "adapter", "--out", out)
    lines += [f"merge       {merge}", f"resume      {_resume_line(options, '--train-iters', 2 * options.train_iters)}"]
    return "\n".join(lines)


def _best_adapter(run: Path) -> Path | None:
    """The adapter of the lowest validation loss, if it is not the latest."""
    from sat_lora.files.step_folders import BEST, LATEST, read_pointer

    best, latest = (read_pointer(run / "adapter" / name) for name in (BEST, LATEST))
    return None if best in (None, latest) else run / "adapter" / BEST  # None: there was no validation


def _new_folder(path: Path) -> Path:
    """The path, or with the first number behind it that is not there yet."""
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free


def _resume_line(options, *more) -> str:
    from sat_lora.parallel.launch import relaunch
    from sat_lora.printable import shell_line

    run, trust = os.path.abspath(options.run_folder), ["--trust-checkpoint"] * options.trust_checkpoint
    words = ["--resume", run, *trust, *map(str, more)]
    line = relaunch(__file__, *words)
    return line or f"the launcher and the ranks that the run had, and {shell_line(words)}"


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(
            f"finetune_cogvlm.py: error: {error} for {sys.executable}; see Two commands in README.md", file=sys.stderr
        )
        sys.exit(2)
    run_script("finetune_cogvlm.py", main)
