"""A whole training step of CogVLM: forward, loss, backward and the optimizer's step on the adapters.

    python -m benchmarks.bench_step --out step.json --markdown

Variants: `frozen` has no adapter, `all-linear` is sat_lora's default, `attention` is sat_lora on what SAT's lora2 can
reach (the language expert's and the vision transformer's q/k/v and dense), and `lora2` is lora2 on the same linears.
In every variant gradients flow down to the embeddings, so that all do the same work in the base.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn

from benchmarks.interleaved import CLOCKS, DTYPES, environment, join_alone, measure, progress, saved_bytes, summarise
from benchmarks.report import step_table, write_json
from benchmarks.variants import randomise
from sat_lora import LoraConfig, add_lora
from sat_lora._sat import BaseModel
from sat_lora.cogvlm import build_cogvlm
from sat_lora.training.loss import answer_loss_sum

NAMES = ("frozen", "all-linear", "attention", "lora2")
TARGETS = {"all-linear": "all-linear", "attention": ("language-attention", "vit-attention")}
# hidden, inner and layers of the language model and of the vision transformer, side of the image, words of text
SIZES = {
    "tiny": dict(language=(64, 96, 1), vit=(32, 64, 1), image=28, words=8),
    "small": dict(language=(1024, 2752, 2), vit=(512, 4352, 4), image=224, words=40),
    "large": dict(language=(4096, 11008, 4), vit=(1792, 15360, 8), image=490, words=62),
}
PATCH = 14


def config_of(size: str) -> dict:
    """The content of a model_config.json for one of SIZES; head sizes grow with the widths, up to CogVLM's."""
    language, vit, image = (SIZES[size][key] for key in ("language", "vit", "image"))
    patches = (image // PATCH) ** 2
    runtime = dict(layernorm_order="pre", use_bias=False, max_sequence_length=2048)
    vit_fixed = dict(layernorm_order="post", use_final_layernorm=False, layernorm_epsilon=1e-6, patch_size=PATCH)
    places = dict(pre_len=1, post_len=0, in_channels=3, image_size=[image, image], max_sequence_length=patches + 1)
    return {
        **_widths(*language, max(1, language[0] // 128)),
        **runtime,
        "vocab_size": 32000 if size == "large" else 1024,
        "image_length": patches,
        "eva_args": {**_widths(*vit, max(1, vit[0] // 112)), "vocab_size": 1, **vit_fixed, **places},
    }


def _widths(hidden: int, inner: int, layers: int, heads: int) -> dict:
    return dict(hidden_size=hidden, inner_hidden_size=inner, num_layers=layers, num_attention_heads=heads)


def batch_of(config: dict, words: int, device: torch.device, dtype: torch.dtype) -> dict:
    """One sample: the image's patches + 2 places, then `words` tokens of text, the last quarter the answer."""
    places = config["image_length"] + 2
    ids = torch.randint(1, config["vocab_size"], (1, places + words), device=device)
    embed, vision, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
    embed[:, :places] = 1
    vision[:, : places - 1] = 1
    answer = max(1, words // 4)
    labels[:, -answer:] = ids[:, -answer:]
    images = torch.randn(1, 3, *config["eva_args"]["image_size"], device=device, dtype=dtype)
    positions = torch.arange(ids.shape[1], device=device)[None]
    inputs = dict(input_ids=ids, position_ids=positions, images=images)
    return {**inputs, "image_embed_mask": embed, "vision_expert_mask": vision, "labels": labels}


def let_gradients_through(model: BaseModel) -> None:
    """Gradients flow to the word embeddings of both towers although every weight is frozen.

    Without it the frozen variant has no backward at all, and an adapted first layer needs no gradient of its input.
    """
    for inner in (model, model.mixins["eva"].vit_model):
        inner.transformer.word_embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())


def build(name: str, config: dict, rank: int, dropout: float, dtype: torch.dtype, device: torch.device):
    """CogVLM as one of NAMES, in training mode, neither A nor B zero."""
    model = build_cogvlm(config, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.requires_grad_(False)
    fields = dict(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    if name in TARGETS:
        add_lora(model, LoraConfig(**fields, target_modules=TARGETS[name]))
    elif name == "lora2":
        for inner in (model, model.mixins["eva"].vit_model):
            _add_lora2(inner, **fields)
    randomise([p for p in model.parameters() if p.requires_grad])
    let_gradients_through(model)
    return model.train()


def _add_lora2(model: BaseModel, **fields) -> None:
    """SAT's own mixin. It replaces `attention.query_key_value` and `attention.dense` of every layer."""
    from sat.model.finetune.lora2 import LoraMixin as Lora2Mixin

    model.add_mixin("lora2", Lora2Mixin(len(model.transformer.layers), **fields), reinit=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".matrix_A." in name or ".matrix_B." in name)


def training_step(model: nn.Module, batch: dict):
    """A work: one step of AdamW on what trains, with a rate so small that the step can be repeated for ever."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def work():
        answer_loss_sum(model, batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return work


def compare(size: str, dtype: str, rank: int, dropout: float, repeats: int, clock: str, device: torch.device) -> dict:
    """One case: every variant's quartiles of seconds and of ratios to the frozen step, and its saved bytes."""
    config, kind = config_of(size), DTYPES[dtype]
    batch = batch_of(config, SIZES[size]["words"], device, kind)
    models = {name: build(name, config, rank, dropout, kind, device) for name in NAMES}
    works = {name: training_step(model, batch) for name, model in models.items()}
    results = summarise(measure(works, repeats, device, clock), base="frozen")
    for name, model in models.items():
        kept = saved_bytes(lambda model=model: answer_loss_sum(model, batch), model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        results[name] |= {"saved_bytes": kept, "trained": trained}
    return {"size": size, "dtype": dtype, "rank": rank, "dropout": dropout, "variants": results}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="small on a CPU, large (CogVLM's widths, fewer layers) on CUDA")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for busy CPU machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of lines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Run every case, print and write the results, and return them."""
    args = options(arguments)
    device = torch.device(args.device)
    join_alone(device)
    torch.manual_seed(args.seed)
    size = args.size or {"cpu": "small", "cuda": "large"}[device.type]
    results = []
    for dtype, rank, dropout in progress(list(itertools.product(args.dtypes, args.ranks, args.dropouts)), "steps"):
        results.append(compare(size, dtype, rank, dropout, args.repeats, args.clock, device))
    report = {"environment": environment(device, args.clock), "repeats": args.repeats, "cases": results}
    print(step_table(report, markdown=args.markdown))
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    main()
