"""Compare a CogVLM base with base + adapter on images whose answers are known, by greedy generation.

    python finetune_demo/evaluate_cogvlm.py --run runs/demo            # what a run was trained and tested with
    deepspeed --num_gpus 8 finetune_demo/evaluate_cogvlm.py --from_pretrained BASE --adapter ADAPTER --test-data IMAGES

Several ranks share the images. Prints a table and writes it to --out, or into the run folder of the adapter as
evaluation.json; an adapter or a base that is not that run's goes to evaluation-2.json, and so on.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", metavar="RUN_FOLDER", help="a run folder: what is not given is taken from its run.json")
    add("--from_pretrained", metavar="DIR", help="SAT folder of the base")
    add("--trust-checkpoint", action="store_true", default=None, help="unpickle all of the base: runs any code in it")
    add("--adapter", metavar="DIR", help="adapter folder (default: RUN_FOLDER/adapter)")
    add("--test-data", nargs="+", metavar="PATH", help="folders of images LABEL.png, or .jsonl files")
    add("--local_tokenizer", metavar="DIR", help="tokenizer folder (default: the base's)")
    add("--version", choices=["base", "chat", "vqa", "chat_old"], help="prompt format of the base (default: chat)")
    add("--prompt", help="the query that goes with every image (default: CAPTCHA:)")
    add("--max_length", type=int, metavar="N", help="longest sequence in tokens (default: 1288)")
    add("--eval-batch-size", "--batch-size", type=int, metavar="N", help="images generated for at once (default: 4)")
    add("--model-parallel-size", type=int, metavar="N", help="ranks that share one copy of the model (default: 1)")
    add("--bf16", action="store_true", default=None, help="bfloat16 (default on CUDA)")
    add("--fp16", action="store_true", default=None, help="float16")
    add("--out", metavar="FILE", help="where the json goes (default: evaluation.json in the run folder)")
    add("--local_rank", type=int, help="set by the launcher")
    return parser


DEFAULTS = dict(
    version="chat", prompt="CAPTCHA:", max_length=1288, eval_batch_size=4, model_parallel_size=1, trust_checkpoint=False
)


def read_settings(options: argparse.Namespace) -> argparse.Namespace:
    """The options, filled up from the run's settings and the defaults; ConfigError if something is still missing."""
    from sat_lora.errors import ConfigError
    from sat_lora.training.options import settings_of_run

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
    options = argparse.Namespace(**merged)
    options.local_tokenizer = options.local_tokenizer or options.from_pretrained
    missing = [f"--{name}" for name in ("from_pretrained", "adapter") if not getattr(options, name)]
    missing += [] if options.test_data else ["--test-data"]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing; give them, or --run RUN_FOLDER of a run that has them")
    return options


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from sat_lora.errors import ConfigError, SatLoraError
    from sat_lora.training.distributed import arrange, join, stop, together
    from sat_lora.training.evaluation import (
        evaluate_adapter,
        evaluation_file,
        evaluation_table,
        try_to_write,
        write_evaluation,
    )
    from sat_lora.training.run_lock import RunLock

    try:
        options = read_settings(options)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks % options.model_parallel_size:
            raise ConfigError(f"--model-parallel-size: {options.model_parallel_size} does not divide {ranks} ranks")
        device = join()
        world = arrange(device, options.model_parallel_size)
        options.bf16 = options.bf16 or (device.type == "cuda" and not options.fp16)
        out, run = evaluation_file(options)
        lock = contextlib.nullcontext()
        if run is not None:
            lock = RunLock(run, doing="evaluating", option="--run", instead="write elsewhere, with --out FILE")
        with lock:
            together(lambda: try_to_write(out) if world.is_main else None)
            result = together(evaluate_adapter, options, options.adapter, world)
            together(lambda: write_evaluation(out, result, options, options.adapter) if world.is_main else None)
    except SatLoraError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"evaluate_cogvlm.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    if world.is_main:
        why = "" if run or options.out else "; evaluation.json of a run is for its own adapter and base"
        print(f"{evaluation_table(result)}\nwritten to {out}{why if out.name != 'evaluation.json' else ''}")
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
