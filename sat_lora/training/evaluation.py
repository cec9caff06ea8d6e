"""What a fine-tuned model reads: generated answers against the right ones, base against base + adapter."""

from argparse import Namespace
from pathlib import Path

from sat_lora.adapter_file import load_adapter
from sat_lora.cogvlm.checkpoint import load_cogvlm
from sat_lora.cogvlm.generation import generate
from sat_lora.cogvlm.model import CogVLMModel
from sat_lora.cogvlm.pictures import MAX_PIXELS
from sat_lora.cogvlm.text import Sample, load_tokenizer
from sat_lora.errors import DataError
from sat_lora.mixin import lora_mixins
from sat_lora.training.data import ImageTextDataset, collate, read_items
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
    [0, 1]; unreadable items are left out of n, their paths are listed under "broken" and they are counted as
    "broken_samples". Both come from what lies on disk.
    """
    items = read_items(options.test_data)
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
        max_pixels=vars(options).get("max_pixels") or MAX_PIXELS,
    )
    share = range(world.data_parallel_rank, len(dataset), world.data_parallel_size)
    right = {"base": [0, 0], "adapter": [0, 0]}
    images, broken = 0, []
    longest = max(len(tokenizer.encode(item.answer, add_special_tokens=False)) for item in dataset.items) + 1
    for start in range(0, len(share), options.eval_batch_size):
        indices = list(share[start : start + options.eval_batch_size])
        samples = [(dataset[i], dataset.items[i].answer.strip()) for i in indices]
        broken += [(s.path, s.reason, s.sample) for s, _ in samples if not isinstance(s, Sample)]
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
    if not broken:
        return result
    return {**result, "broken": sorted({path for path, _, _ in broken}), "broken_samples": len(broken)}


def evaluation_table(result: dict) -> str:
    """The result of `evaluate_adapter` as text."""
    lines = [f"{result['images']} images{'':<18}exact match   ignoring case"]
    for side, title in (("base", "base"), ("adapter", "base + adapter")):
        exact, loose = result[side].values()
        lines.append(f"  {title:<25}{100 * exact:>9.1f} %{100 * loose:>14.1f} %")
    if result.get("broken"):
        count = result.get("broken_samples", len(result["broken"]))  # earlier versions counted paths alone
        lines.append(f"  {count} samples could not be read and do not count")
    return "\n".join(lines)
