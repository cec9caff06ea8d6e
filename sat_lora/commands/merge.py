"""`sat-lora merge`."""

import argparse

from sat_lora.commands.parts import ANY_BASE, bar, examples


def add(commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="fold an adapter into a base checkpoint",
        **examples(
            "sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged",
            "sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter/800 --out cut --model-parallel-size 2",
            "sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged-hf --to hf --verify",
        ),
    )
    merge.add_argument(
        "--base", required=True, metavar="DIR", help="SAT or Hugging Face folder of the base, cut or whole"
    )
    merge.add_argument("--trust-checkpoint", action="store_true", help="unpickle all of it: runs any code in it")
    merge.add_argument("--any-base", action="store_true", help=ANY_BASE)
    merge.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="new folder")
    merge.add_argument(
        "--to", default="sat", choices=["sat", "hf"], help="SAT's layout, or safetensors as Hugging Face"
    )
    merge.add_argument("--model-parallel-size", type=int, default=1, metavar="N", help="cut the SAT folder for N ranks")
    merge.add_argument(
        "--verify", action="store_true", help="compare its logits with base and adapter; loads both whole"
    )
    merge.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    from sat_lora.errors import ConfigError
    from sat_lora.merge_checkpoint import merge_adapter

    if options.model_parallel_size < 1 or (options.to == "hf" and options.model_parallel_size > 1):
        raise ConfigError(
            f"--model-parallel-size: got {options.model_parallel_size}, wanted 1 or more; only SAT folders are cut"
        )
    merge_adapter(
        options.base,
        options.adapter,
        options.out,
        to=options.to,
        model_parallel_size=options.model_parallel_size,
        trust=options.trust_checkpoint,
        any_base=options.any_base,
        progress=bar("merging", "tensors"),
    )
    print(f"merged model in {options.out}")
    if not options.verify:
        return 0
    from sat_lora.verify_merge import lost_share

    trust, any_base = options.trust_checkpoint, options.any_base
    share, allowed = lost_share(options.base, options.adapter, options.out, trust=trust, any_base=any_base)
    verdict = "verified" if share <= allowed else "WRONG"
    print(f"{verdict}: merging lost {share:.2%} of the adapter's effect on the logits, {allowed:.2%} is rounding")
    return 0 if share <= allowed else 1
