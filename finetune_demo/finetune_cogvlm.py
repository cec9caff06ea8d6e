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
    if "--doctor" in (sys.argv[1:] if argv is None else argv):
        from sat_lora.doctor.packages import report_missing

        if report_missing():
            return 1
    from sat_lora.errors import SatLoraError
    from sat_lora.training.options import parse_options

    options = parse_options(argv, demo_folder=HERE)
    from sat_lora.training.distributed import stop
    from sat_lora.training.finetune import finetune
    from sat_lora.training.stop_signals import Stopped

    try:
        if options.doctor:
            from sat_lora.doctor.before_run import report

            return report(options, make_data=lambda: _make_demo_data(options))
        world = finetune(options, make_data=lambda: _make_demo_data(options))
    except SatLoraError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"finetune_cogvlm.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; resume with: {_resume_command(options)}", flush=True)
        return stopped.status
    if world.is_main and not options.replay:
        print(_what_next(options))
    stop()
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
    run, base = map(_from_here, (options.run_folder, options.from_pretrained))
    lines = [
        f"adapter     {run / 'adapter'}",
        f"evaluate    python {_from_here(HERE / 'evaluate_cogvlm.py')} --run {run}",
        f"merge       sat-lora merge --base {base} --adapter {run / 'adapter'} --out {run / 'merged'}",
        f"resume      {_resume_command(options)} --train-iters {2 * options.train_iters}",
    ]
    if options.test_data:
        lines.insert(1, f"evaluation  {run / 'evaluation.json'}")
    return "\n".join(lines)


def _resume_command(options) -> str:
    return f"deepspeed {_from_here(__file__)} --resume {_from_here(options.run_folder)}"


def _from_here(path) -> Path:
    """The path relative to the working directory, if it lies below it."""
    path, here = Path(path).resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    sys.exit(main())
