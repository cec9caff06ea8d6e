"""`sat-lora merge`."""

import argparse
import sys
from pathlib import Path

from sat_lora.commands.parts import ANY_BASE, bar, examples, refuse_existing, refuse_missing, size_text


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    merge = commands.add_parser(
        "merge",
        help="fold an adapter into a base checkpoint",
        **examples(
            "sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged",
            "sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter/800 --out cut --model-parallel-size 2",
            "sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged-hf --to hf --verify",
            "sat-lora merge --base cogvlm-base-490 --adapter runs/nf4/adapter --out merged --onto trained --verify",
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
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the merged weights (default: the base's); float32 keeps what bfloat16 rounds away of a weak adapter",
    )
    merge.add_argument(
        "--onto",
        default="base",
        choices=["base", "trained"],
        help="of an adapter trained on a quantised base: the base's own weights, or the decoded ones that it was "
        "trained beside (default: base)",
    )
    merge.add_argument(
        "--verify",
        action="store_true",
        help="compare its logits and weights with base and adapter, in float32; loads both whole, one after the other",
    )
    merge.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Write the merged model, and verify it where that is asked for; return 0, or 1 where it is wrong.

    Raises a SatLoraError for a user's mistake.
    """
    from sat_lora.errors import ConfigError
    from sat_lora.printable import printable, shell_line

    refuse_existing(options.out)
    refuse_missing(options.adapter, base=options.base)
    from sat_lora.adapters.merge import DTYPES, merge_adapter

    if options.model_parallel_size < 1 or (options.to == "hf" and options.model_parallel_size > 1):
        raise ConfigError(
            f"--model-parallel-size: got {options.model_parallel_size}, wanted 1 or more; only SAT folders are cut"
        )
    remarks = merge_adapter(
        options.base,
        options.adapter,
        options.out,
        to=options.to,
        model_parallel_size=options.model_parallel_size,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        trust=options.trust_checkpoint,
        any_base=options.any_base,
        onto=options.onto,
        progress=bar("merging", "tensors"),
    )
    size = sum(path.stat().st_size for path in Path(options.out).rglob("*") if path.is_file())
    print(f"merged model in {printable(options.out)}, {size_text(size)}")
    for remark in remarks:
        print(f"note        {remark}")
    if options.to == "hf":
        use = f"AutoModelForCausalLM.from_pretrained({printable(repr(options.out))}, trust_remote_code=True)"
    else:
        use = f"--from_pretrained {shell_line([options.out])}, without an adapter"
    print(f"use it as   {use}", flush=True)
    return verify(options) if options.verify else 0


def verify(options: argparse.Namespace) -> int:
    """Print what merging lost, and the verdict; return 0, or 1 where the merged model is wrong."""
    from sat_lora.adapters.verify import verify_merge
    from sat_lora.printable import printable
    from sat_lora.terminal.progress import shown

    verification = verify_merge(
        options.base,
        options.adapter,
        options.out,
        trust=options.trust_checkpoint,
        any_base=options.any_base,
        onto=options.onto,
        progress=lambda items, what: shown(items, what, "weights" if "comparing" in what else "modules"),
        tell=lambda line: print(f"verify: {line}", file=sys.stderr, flush=True),
    )
    lost = f"merging lost {verification.merge_error:.2%} of the adapter's effect on the logits"
    if verification.problems:
        print(f"WRONG: {lost}: {'; '.join(verification.problems)}; do not use {printable(options.out)}")
        return 1
    if not verification.is_measurable:
        print("verified: the weights are base plus adapter; what the adapter does to the logits is beyond float32")
        return 0
    dtype = str(verification.dtype).removeprefix("torch.")
    advice = "" if dtype == "float32" else "; --dtype float32 keeps it, and so does the adapter beside its base"
    print(f"verified: {lost}, which {dtype} rounds away{advice}")
    return 0
