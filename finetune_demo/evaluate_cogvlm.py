"""Compare a CogVLM base with base + adapter on images whose answers are known, by greedy generation.

    python finetune_demo/evaluate_cogvlm.py --run runs/demo            # what a run was trained and tested with
    deepspeed --num_gpus 8 finetune_demo/evaluate_cogvlm.py --from_pretrained BASE --adapter ADAPTER --test-data IMAGES

Several ranks share the images. Writes evaluation.json beside the adapter (or to --out) and prints it as a table.
"""

import argparse
import json
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
    versions = ["base", "chat", "vqa", "chat_old"]
    add("--version", choices=versions, help="prompt format of the base (default: its config's, or chat)")
    add("--prompt", help="the query of every image without its own (default: What is this?)")
    add("--max_length", type=int, metavar="N", help="longest sequence in tokens (default: 1288)")
    add("--eval-batch-size", "--batch-size", type=int, metavar="N", help="images generated for at once (default: 4)")
    add("--model-parallel-size", type=int, metavar="N", help="ranks that share one copy of the model (default: 1)")
    add("--bf16", action="store_true", default=None, help="bfloat16 (default on CUDA)")
    add("--fp16", action="store_true", default=None, help="float16")
    add("--out", metavar="FILE", help="where the json goes (default: evaluation.json beside the adapter)")
    add("--local_rank", type=int, help="set by the launcher")
    return parser


DEFAULTS = dict(
    version="chat",
    prompt="What is this?",
    max_length=1288,
    eval_batch_size=4,
    model_parallel_size=1,
    trust_checkpoint=False,
)


def read_settings(options: argparse.Namespace) -> argparse.Namespace:
    """The options, filled up from the run's settings and the defaults; ConfigError if something is still missing."""
    from sat_lora.errors import ConfigError
    from sat_lora.training.defaults import version_of

    stored = {}
    if options.run:
        try:
            stored = json.loads((Path(options.run) / "run.json").read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--run: {options.run} is no run folder with a readable run.json: {error}") from error
        stored.pop("trust_checkpoint", None)  # whoever runs the code of a file says so each time
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
    missing = [f"--{name}" for name in ("from_pretrained", "adapter") if not getattr(options, name)]
    missing += [] if options.test_data else ["--test-data"]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing; give them, or --run RUN_FOLDER of a run that has them")
    return options


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from sat_lora.errors import ConfigError, SatLoraError
    from sat_lora.training.distributed import arrange, join, stop, together
    from sat_lora.training.evaluation import evaluate_adapter, evaluation_table
    from sat_lora.training.run_folder import write_json

    try:
        options = read_settings(options)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks % options.model_parallel_size:
            raise ConfigError(f"--model-parallel-size: {options.model_parallel_size} does not divide {ranks} ranks")
        device = join()
        world = arrange(device, options.model_parallel_size)
        options.bf16 = options.bf16 or (device.type == "cuda" and not options.fp16)
        result = together(evaluate_adapter, options, options.adapter, world)
    except SatLoraError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"evaluate_cogvlm.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    if world.is_main:
        out = Path(options.out or Path(options.adapter).parent / "evaluation.json")
        write_json(out, result)
        print(f"{evaluation_table(result)}\nwritten to {out}")
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
