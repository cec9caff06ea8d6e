"""What is wrong with the samples that a run would train on."""

import itertools
from collections.abc import Iterable, Sequence

import torch

from sat_lora.cogvlm.text import IGNORED
from sat_lora.doctor.findings import Finding
from sat_lora.training.broken_samples import broken_in

LISTED = 5  # paths that a finding names


def data_findings(
    batches: Iterable[dict], *, image_length: int, max_length: int, max_broken_share: float
) -> list[Finding]:
    """Of collated batches of this rank; goes through all of them."""
    broken: dict[tuple[str, str], str] = {}
    samples = empty = cut = longest = 0
    counts: set[int] = set()
    for batch in batches:
        broken |= {(path, sample): reason for path, reason, sample in broken_in([batch])}
        rows = [] if _is_padding_only(batch) else range(len(batch["input_ids"]))
        samples += len(rows) + len(batch["broken"])
        for row in rows:
            labels = batch["labels"][row]
            empty += bool((labels[1:] == IGNORED).all())
            cut += bool(batch["left_out"][row])
            longest = max(longest, int(batch["lengths"][row] + batch["left_out"][row]))
            counts.add(int(batch["image_embed_mask"][row].sum()))
    findings = []
    if empty:
        seen = f"{empty} of {samples} samples looked at have no label"
        findings.append(Finding(code="no-labels", seen=seen, option="--train-data"))
    if cut:
        seen = f"the answers of {cut} of {samples} samples looked at do not fit --max_length {max_length} and are cut"
        findings.append(Finding(code="too-long", seen=seen, option="--max_length", fix=f"set --max_length {longest}"))
    odd = sorted(count for count in counts if count % (image_length + 2))
    if odd:
        seen = f"a sample has {odd[0]} places for images, an image of {image_length} patches takes {image_length + 2}"
        findings.append(Finding(code="image-tokens", seen=seen))
    if broken:
        share, reasons = len(broken) / max(samples, 1), [*dict.fromkeys(broken.values())]
        first_path = next(iter(broken))[0]
        seen = f"{len(broken)} of {samples} samples looked at are broken ({share:.0%}): " + "; ".join(reasons[:LISTED])
        over = f"; that is more than --max-broken-share {max_broken_share:g}, the run would end" * (
            share > max_broken_share
        )
        findings.append(Finding(code="broken-files", seen=seen + over, file=first_path, option="--train-data"))
    return findings


def model_config_findings(config: dict, folder: str) -> list[Finding]:
    """Whether the image size and the patch size of model_config.json make its image_length."""
    vit = config.get("eva_args", {})
    if not vit.get("image_size") or not vit.get("patch_size"):
        return []
    patches = 1
    for side in vit["image_size"]:
        patches *= side // vit["patch_size"]
    if patches == config.get("image_length"):
        return []
    seen = f"images of {vit['image_size']} in patches of {vit['patch_size']} make {patches}, image_length is "
    return [Finding(code="image-tokens", seen=seen + str(config.get("image_length")), file=folder)]


def batch_count_findings(counts: Sequence[int], what: str) -> list[Finding]:
    """counts: batches of `what` by rank."""
    if len({*counts}) < 2:
        return []
    short = tuple(rank for rank, count in enumerate(counts) if count < max(counts))
    words = ", ".join(f"rank {rank} {count}" for rank, count in itertools.islice(enumerate(counts), 8))
    return [Finding(code="unequal-batches", seen=f"batches of {what}: {words}", ranks=short)]


def _is_padding_only(batch: dict) -> bool:
    """What `collate` makes of broken samples alone."""
    return len(batch["input_ids"]) == 1 and not bool(torch.as_tensor(batch["input_ids"]).any())
