"""What a fine-tuned model reads: generated answers against the right ones, base against base + adapter."""

from argparse import Namespace
from pathlib import Path

from sat_lora.adapter_file import load_adapter
from sat_lora.cogvlm.checkpoint import load_cogvlm
from sat_lora.cogvlm.generation import generate
from sat_lora.cogvlm.model import CogVLMModel
from sat_lora.cogvlm.text import Sample, load_tokenizer
from sat_lora.cogvlm.tokens import first_tokens
from sat_lora.errors import DataError
from sat_lora.foreign import printable
from sat_lora.mixin import lora_mixins
from sat_lora.training.data import BrokenSample, ImageTextDataset, Item, collate, read_items, reading_options
from sat_lora.training.deepspeed_config import base_dtype
from sat_lora.training.distributed import World, gather_lists
from sat_lora.training.loss import sum_over_data_parallel
from sat_lora.training.step import to_device


def evaluate_adapter(
    options: Namespace, adapter: str | Path, world: World, trained: tuple[CogVLMModel, dict] | None = None
) -> dict:
    """Answers every item of --test-data by greedy decoding, with and without the adapter; the ranks share the items.

    options: from_pretrained, local_tokenizer, test_data, version, prompt, max_length, eval_batch_size, bf16, fp16,
    model_parallel_size and trust_checkpoint, as `parse_options` names them.
    trained: a model that has trained this adapter on that base, and its config, to be used instead of loading another:
    disabled it is the base bit for bit, and the adapter on disk is read into it.
    Returns {"images": n, "base": {"exact_match": x, "exact_match_ignoring_case": y}, "adapter": {...}} with shares in
    [0, 1]; unreadable items are left out of n and listed under "broken". Both come from what lies on disk.
    """
    items = read_items(options.test_data, **reading_options(options))
    if not items:
        raise DataError(
            f"--test-data: {', '.join(options.test_data)}: no images there; give folders of images LABEL.png"
        )
    tokenizer = load_tokenizer(options.local_tokenizer)
    model, config = trained or load_cogvlm(
        options.from_pretrained,
        dtype=base_dtype(options),
        device=world.device,
        model_parallel_size=options.model_parallel_size,
        trust=options.trust_checkpoint,
    )
    load_adapter(model, adapter)
    dataset = ImageTextDataset(
        items,
        tokenizer,
        version=options.version,
        prompt=options.prompt,
        image_size=tuple(config["eva_args"]["image_size"]),
        image_length=config["image_length"],
        max_length=options.max_length,
        with_answer=False,
        special_tokens=vars(options).get("special_tokens_in_text", False),
    )
    share = range(world.data_parallel_rank, len(dataset), world.data_parallel_size)
    right = {"base": [0, 0], "adapter": [0, 0]}
    images, broken = 0, []
    lengths = [length_of_answer(dataset, item) for item in dataset.items]
    longest = max((length for length in lengths if isinstance(length, int)), default=0) + 1
    for start in range(0, len(share), options.eval_batch_size):
        indices = list(share[start : start + options.eval_batch_size])
        questions = [dataset[i] if isinstance(lengths[i], int) else lengths[i] for i in indices]
        samples = [(question, dataset.items[i].answer.strip()) for question, i in zip(questions, indices)]
        broken += [(s.path, s.reason) for s, _ in samples if not isinstance(s, Sample)]
        usable = [(s, answer) for s, answer in samples if isinstance(s, Sample)]
        images += len(usable)
        if not usable:
            continue
        batch = to_device(collate([sample for sample, _ in usable], image_size=dataset.image_size), world.device)
        for side, counts in right.items():
            for mixin in lora_mixins(model).values():
                mixin.enabled = side == "adapter"
            tokens = generate(model, batch, max_new_tokens=longest, eos_token_id=tokenizer.eos_token_id)
            for ids, (_, answer) in zip(tokens, usable):
                said = tokenizer.decode(ids, skip_special_tokens=True).strip()
                counts[0] += said == answer
                counts[1] += said.lower() == answer.lower()
    images, *sums = sum_over_data_parallel(images, *right["base"], *right["adapter"], device=world.device)
    broken = sorted(set(gather_lists(broken)))
    if not images:
        raise DataError(f"--test-data: none of {options.test_data} can be read; the first: {broken[0][1]}")
    shares = [value / images for value in sums]
    names = ("exact_match", "exact_match_ignoring_case")
    result = {"images": int(images), "base": dict(zip(names, shares[:2])), "adapter": dict(zip(names, shares[2:]))}
    return {**result, "broken": [path for path, _ in broken]} if broken else result


def length_of_answer(dataset: ImageTextDataset, item: Item) -> int | BrokenSample:
    """Tokens of an answer, at most --max_length of them; what is wrong with one that cannot be encoded."""
    try:
        tokens, _ = first_tokens(dataset.tokenizer, item.answer, dataset.max_length, dataset.special_tokens, "answer")
    except DataError as error:
        name = printable(item.place or item.image)
        return BrokenSample(name, f"{name}: {error}")
    return len(tokens)


def evaluation_table(result: dict) -> str:
    """The result of `evaluate_adapter` as text."""
    lines = [f"{result['images']} images{'':<18}exact match   ignoring case"]
    for side, title in (("base", "base"), ("adapter", "base + adapter")):
        exact, loose = result[side].values()
        lines.append(f"  {title:<25}{100 * exact:>9.1f} %{100 * loose:>14.1f} %")
    if result.get("broken"):
        lines.append(f"  {len(result['broken'])} images could not be read and do not count")
    return "\n".join(lines)
