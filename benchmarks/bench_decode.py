"""Greedy decoding of CogVLM: tokens per second with the adapters off, on and merged, and the time of the first token.

    python -m benchmarks.bench_decode --size full --out decode.json      # CogVLM-17B in bf16: 36 GB of a GPU
    python -m benchmarks.bench_decode --size full --quantize nf4

The prompt is an image and text. A token after the first is what the whole answer takes beyond its first token, over
their number; `weights_bytes` is what each of those tokens has to read. With --quantize nothing is merged: few bits
would round the deltas away.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.interleaved import CLOCKS, DTYPES, Work, environment, join_alone, measure, peak_bytes, progress
from benchmarks.models import SIZES, batch_of, config_of, random_model
from benchmarks.report import table, write_json
from benchmarks.variants import randomise
from sat_lora import LoraConfig, LoraMixin, add_lora, quantize_model
from sat_lora._sat import BaseModel
from sat_lora.cogvlm.decoding.generate import generate
from sat_lora.quantization.config import NAMES as SCHEMES
from sat_lora.quantized.layers import bytes_of

NEVER = -1  # no token is the end
MERGED = "merged"
STATES = ["on", "off", MERGED]


def answer(model: BaseModel, batch: dict, tokens: int) -> Work:
    """A work: the greedy answer of that many tokens to every prompt of the batch."""

    def work() -> list[list[int]]:
        return generate(model, batch, max_new_tokens=tokens, eos_token_id=NEVER)

    return work


def language_bytes(model: BaseModel) -> int:
    """Bytes of the language expert's linears and of the head, all of which a token reads."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    experts = ("transformer.layers.", "mixins.mlp.gate_proj.", "mixins.lm.lm_head.")
    read = [name for name in weights if name.startswith(experts) and weights[name].dim() == 2]
    return sum(bytes_of(weights[name]) for name in read)


def speed(model: BaseModel, batch: dict, tokens: int, repeats: int, clock: str, device: torch.device) -> dict:
    """Seconds of the first token and of each later one, the least of the repetitions, and what follows from them."""
    works = {"first": answer(model, batch, 1), "all": answer(model, batch, tokens)}
    times = measure(works, repeats, device, clock, warmup=1)
    first, whole = min(times["first"]), min(times["all"])
    later = (whole - first) / (tokens - 1)
    peak = peak_bytes(works["all"], device)
    result = {"first_seconds": first, "token_seconds": later, "tokens_per_second": len(batch["input_ids"]) / later}
    return result if peak is None else {**result, "peak_bytes": peak}


def compare(config: dict, args: argparse.Namespace, device: torch.device) -> tuple[list[dict], int]:
    """(a row for each batch size and each of off, on and merged; the bytes of weights that a token reads)."""
    dtype = DTYPES[args.dtype]
    model = random_model(config, dtype, device).eval()
    if args.quantize:
        quantize_model(model, scheme=args.quantize)
    weights_bytes = language_bytes(model)
    mixins = add_lora(model, LoraConfig(r=args.rank))
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    words = args.words or SIZES[args.size]["words"]
    rows = []
    for state in progress([state for state in args.states if state != MERGED or not args.quantize], "decoding"):
        for mixin in mixins:
            _bring_into(state, mixin)
        for samples in args.batches:
            batch = batch_of(config, words, device, dtype, samples)
            del batch["labels"]
            measured = speed(model, batch, args.tokens, args.repeats, args.clock, device)
            prompt = batch["input_ids"].shape[1]
            rows.append({"adapters": state, "batch": samples, "prompt": prompt, "tokens": args.tokens, **measured})
    return rows, weights_bytes


def _bring_into(state: str, mixin: LoraMixin) -> None:
    mixin.unmerge()
    mixin.enabled = state != "off"
    if state == MERGED:
        mixin.merge(keep_original=False)  # the originals would take as much memory on the CPU as the weights


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full" if on_cuda else "small")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_cuda else "fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--states", nargs="+", default=STATES, choices=STATES)
    parser.add_argument("--quantize", choices=SCHEMES, help="hold the linears in so few bits; nothing is merged then")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="prompts decoded at once")
    parser.add_argument("--words", type=int, help="tokens of text in a prompt, beside the image's")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for busy CPU machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Decode in every state, print and write the results, and return them."""
    args = options(arguments)
    device = torch.device(args.device)
    join_alone(device)
    torch.manual_seed(args.seed)
    config = config_of(args.size)
    rows, weights_bytes = compare(config, args, device)
    report = {
        "environment": environment(device, args.clock),
        "size": args.size,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "weights_bytes": weights_bytes,
        "rows": rows,
    }
    header = ["adapters", "batch", "prompt", "first token, ms", "later token, ms", "tokens/s"]
    cells = [
        [
            row["adapters"],
            str(row["batch"]),
            str(row["prompt"]),
            f"{1000 * row['first_seconds']:.1f}",
            f"{1000 * row['token_seconds']:.2f}",
            f"{row['tokens_per_second']:.1f}",
        ]
        for row in rows
    ]
    print(table(header, cells, args.markdown))
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    main()
