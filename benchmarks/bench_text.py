"""A step on text alone: what it costs that the vision transformer runs on every batch, on no images if need be.

    python -m benchmarks.bench_text --clock cpu

`without` leaves the image side out of the graph, `text` is a batch as `collate` makes it, and `blank` carries one blank
image, as the step did before. Adapters on all linears.
"""

import argparse

import torch

from benchmarks.interleaved import CLOCKS, DTYPES, join_alone, measure, summarise
from benchmarks.models import SIZES, batch_of, config_of, random_model
from benchmarks.variants import randomise
from sat_lora import add_lora
from sat_lora.training.steps.loss import answer_loss_sum


def text_batch(config: dict, rows: int, words: int) -> dict:
    """`rows` of `words` tokens, the last quarter the answer, and no image."""
    batch = batch_of(config, words, torch.device("cpu"), torch.float32)
    text = {name: value[:, -words:].repeat(rows, 1) for name, value in batch.items() if name != "images"}
    return {**text, "images": batch["images"][:0]}


def works_of(size: str, dtype: torch.dtype, rows: int, words: int) -> dict:
    config = config_of(size)
    models = [random_model(config, dtype, torch.device("cpu")) for _ in range(2)]
    for model in models:
        add_lora(model, r=16, lora_alpha=32)
        randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    images = models[1].mixins["eva"]
    images.forward = lambda images, end=images.boi: end.expand(0, config["image_length"] + 2, -1)
    text = text_batch(config, rows, words)
    blank = {**text, "images": torch.zeros(1, 3, *config["eva_args"]["image_size"])}
    cases = {"without": (models[1], text), "text": (models[0], text), "blank": (models[0], blank)}
    return {name: lambda m=m, b=b: answer_loss_sum(m, b).backward() for name, (m, b) in cases.items()}


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print the medians, and return the quartiles of seconds and of ratios to `without`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args(arguments)
    join_alone(torch.device("cpu"))
    torch.manual_seed(0)
    works = works_of(args.size, DTYPES[args.dtype], args.rows, args.words)
    results = summarise(measure(works, args.repeats, torch.device("cpu"), args.clock), base="without")
    for name, result in results.items():
        print(name, result)
    return results


if __name__ == "__main__":
    main()
