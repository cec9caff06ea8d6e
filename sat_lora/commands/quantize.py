"""`sat-lora quantize`."""

import argparse
from pathlib import Path

from sat_lora.commands.parts import bar, examples, refuse_existing, refuse_missing, size_text
from sat_lora.quantization.config import ALL, NAMES, Quantization


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    quantize = commands.add_parser(
        "quantize",
        help="write a base with quantised weights, which loads without being encoded each time",
        **examples(
            "sat-lora quantize --base cogvlm-base-490 --out cogvlm-nf4",
            "sat-lora quantize --base cogvlm-base-490 --out mixed --keep_modules vit-attention vit-mlp",
        ),
    )
    quantize.add_argument(
        "--base", required=True, metavar="DIR", help="SAT or Hugging Face folder of the base, cut or whole"
    )
    quantize.add_argument("--trust-checkpoint", action="store_true", help="unpickle all of it: runs any code in it")
    quantize.add_argument("--out", required=True, metavar="DIR", help="new SAT folder, for --from_pretrained")
    quantize.add_argument("--quantize", default=NAMES[0], choices=NAMES, help="4.25 or 8.25 bits (default: nf4)")
    quantize.add_argument(
        "--quantize_modules", nargs="+", default=[ALL], metavar="NAME", help=f"which linears (default: {ALL})"
    )
    quantize.add_argument("--keep_modules", nargs="+", default=[], metavar="NAME", help="what is left whole")
    quantize.add_argument("--device", choices=["cuda", "cpu"], help="that encodes (default: cuda where there is one)")
    quantize.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Write the quantised base; return 0. Raises a SatLoraError for a user's mistake."""
    from sat_lora.errors import ConfigError
    from sat_lora.printable import printable, shell_line
    from sat_lora.training.settings.lora_options import patterns_of

    refuse_existing(options.out)
    refuse_missing(base=options.base)
    import torch

    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ConfigError("--device: got cuda, and there is no CUDA device; leave it out")
    from sat_lora._sat import quiet_sat
    from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base

    quiet_sat()
    quantization = Quantization(
        scheme=options.quantize,
        modules=patterns_of(options.quantize_modules),
        keep_modules=patterns_of(options.keep_modules),
    )
    remarks = quantize_base(
        options.base,
        options.out,
        quantization,
        device=options.device or ("cuda" if has_cuda else "cpu"),
        trust=options.trust_checkpoint,
        progress=bar("encoding", "tensors"),
    )
    size = sum(path.stat().st_size for path in Path(options.out).rglob("*") if path.is_file())
    print(f"quantised base in {printable(options.out)}, {size_text(size)}")
    for remark in remarks:
        print(f"note        {remark}")
    print(f"use it as   --from_pretrained {shell_line([options.out])}, at any --model-parallel-size", flush=True)
    return 0
