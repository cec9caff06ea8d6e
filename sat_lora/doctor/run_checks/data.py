"""What is wrong with the samples that a run would train on."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sat_lora.cogvlm.families import family_of
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.training.steps.broken_samples import broken_in

LISTED = 5  # paths that a finding names
INDICES = 100_000  # of a sampler that are looked at
MOST_ALIKE = 0.25  # share of equal samples that data may have
CHANNELS = 3  # of an image
THINNED = 7  # every so many pixels of an image are enough to tell it from others


@looks_for("no-labels", "too-long", "image-tokens", "broken-files", "wrong-labels", "token-ids", "image-size")
def data_findings(
    batches: Iterable[dict],
    *,
    image_length: int,
    max_length: int,
    max_broken_share: float,
    vocab_size: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> list[Finding]:
    """Return what is wrong with collated batches of this rank; all of them are gone through.

    image_length, vocab_size, image_size (height, width): the base's; None is not looked at.
    """
    broken: dict[tuple[str, str], str] = {}
    samples = 0
    empty = 0
    cut = 0
    longest = 0
    counts: set[int] = set()
    wrong_labels: Counter[str] = Counter()
    sizes: set[tuple[int, ...]] = set()
    unknown: set[int] = set()
    for batch in batches:
        broken |= {(path, sample): reason for path, reason, sample in broken_in([batch])}
        rows = [] if _is_padding_only(batch) else range(len(batch["input_ids"]))
        samples += len(rows) + len(batch["broken"])
        places = int(batch["image_embed_mask"].sum())
        if places != len(batch["images"]) * (image_length + 2) and places % (image_length + 2) == 0:
            counts.add(places + 1)  # images are missing or left over
        if len(batch["images"]):
            sizes.add(tuple(batch["images"].shape[1:]))
        if vocab_size is not None:
            learned = batch["labels"][batch["labels"] != IGNORED]
            for ids in (batch["input_ids"].flatten(), learned):
                unknown.update(ids[(ids < 0) | (ids >= vocab_size)].tolist())
        for row in rows:
            labels = batch["labels"][row]
            empty += bool((labels[1:] == IGNORED).all())
            cut += bool(batch["left_out"][row])
            longest = max(longest, int(batch["lengths"][row] + batch["left_out"][row]))
            counts.add(int(batch["image_embed_mask"][row].sum()))
            wrong_labels.update(filter(None, [what_is_wrong_with_labels(batch, row)]))
    findings = []
    for fault, count in wrong_labels.items():
        seen = f"{count} of {samples} samples looked at have labels {fault}"
        findings.append(Finding(code="wrong-labels", seen=seen))
    if unknown and vocab_size is not None:
        ids = ", ".join(map(str, sorted(unknown)[:LISTED]))
        seen = f"token ids {ids} are in the samples, the base's vocabulary is from 0 to {vocab_size - 1}"
        findings.append(Finding(code="token-ids", seen=seen, option="--local_tokenizer"))
    wrong_sizes = sorted(sizes - {(CHANNELS, *image_size)}) if image_size is not None else []
    if wrong_sizes and image_size is not None:
        sizes_in_words = " and ".join(_size_in_words(size) for size in wrong_sizes)
        seen = f"images come as {sizes_in_words}, the base takes {' x '.join(map(str, image_size))}"
        findings.append(Finding(code="image-size", seen=seen))
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
        share = len(broken) / max(samples, 1)
        reasons = [*dict.fromkeys(broken.values())]
        first_path = next(iter(broken))[0]
        seen = f"{len(broken)} of {samples} samples looked at are broken ({share:.0%}): " + "; ".join(reasons[:LISTED])
        over = f"; that is more than --max-broken-share {max_broken_share:g}, the run would end" * (
            share > max_broken_share
        )
        findings.append(Finding(code="broken-files", seen=seen + over, file=first_path, option="--train-data"))
    return findings


def _size_in_words(shape: tuple[int, ...]) -> str:
    """Return the size of an image (channels, height, width), in words."""
    channels = f" in {shape[0]} channels" * (shape[0] != CHANNELS)
    return f"{' x '.join(map(str, shape[1:]))} pixels{channels}"


@looks_for("image-tokens")
def model_config_findings(config: dict, folder: str) -> list[Finding]:
    """Return a finding if the image and patch sizes of model_config.json do not make its image_length."""
    vit = config.get("eva_args", {})
    if not vit.get("image_size") or not vit.get("patch_size"):
        return []
    places = family_of(config).image_length(vit["image_size"], vit["patch_size"])
    if places == config.get("image_length"):
        return []
    seen = f"images of {vit['image_size']} in patches of {vit['patch_size']} make {places}, image_length is "
    return [Finding(code="image-tokens", seen=seen + str(config.get("image_length")), file=folder)]


@looks_for("unequal-batches")
def batch_count_findings(counts: Sequence[int], what: str) -> list[Finding]:
    """Return a finding if ranks have different numbers of batches. counts: by rank. what: they are batches of."""
    if len({*counts}) < 2:
        return []
    short = tuple(rank for rank, count in enumerate(counts) if count < max(counts))
    listed = ", ".join(f"rank {rank} {count}" for rank, count in itertools.islice(enumerate(counts), 8))
    return [Finding(code="unequal-batches", seen=f"batches of {what}: {listed}", ranks=short)]


def what_is_wrong_with_labels(batch: dict, row: int) -> str | None:
    """Return, in words, where a label of the row is not the token at its own place; None if all are.

    The loss compares the output at each place with the label at the next one, so a label is the token itself.
    """
    ids = batch["input_ids"][row]
    labels = batch["labels"][row]
    length = int(batch["lengths"][row])
    learned = labels != IGNORED
    if learned[length:].any():
        return "on padding"
    if (learned & (batch["image_embed_mask"][row] > 0)).any():
        return "on the places of an image"
    wrong = learned & (labels != ids)
    if not wrong.any() or _are_ends_of_turns(wrong, labels):
        return None
    for step, fault in ((-1, "shifted already by one; the loss shifts them again"), (1, "shifted by one backwards")):
        if bool((labels == ids.roll(step))[learned].all()):
            return fault
    other_rows = (other for other in range(len(batch["input_ids"])) if other != row)
    if any(bool((labels == batch["input_ids"][other])[learned].all()) for other in other_rows):
        return "of another row of their batch"
    return "that are not the tokens at their places"


def _are_ends_of_turns(wrong: torch.Tensor, labels: torch.Tensor) -> bool:
    """Return whether the labels that are not the tokens at their places end earlier answers of a conversation: EOS is
    to be predicted where the next prompt begins.
    """
    learned = labels != IGNORED
    ends = learned & ~torch.cat([learned[1:], learned[:1]])
    last = int(learned.nonzero()[-1])
    return not wrong[last] and bool(ends[wrong].all()) and len(labels[wrong].unique()) == 1


@dataclass(frozen=True)
class Drawn:
    """What a rank reads of its first epoch."""

    rank: int
    data_parallel_rank: int
    indices: list[int] | None
    """The indices of the sampler, None without one."""
    contents: list[str]
    """A digest of text and image of each sample looked at."""


def drawn_samples(loader, batches: Sequence[dict], steps: int, *, rank: int, data_parallel_rank: int) -> Drawn:
    """Return what this rank reads of its first epoch.

    steps: whole batches that this rank has in an epoch. batches: the first of them, or more, collated.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if getattr(sampler, "repeats", False):  # of a mixture by weights that is no fault
        return Drawn(rank, data_parallel_rank, None, [])
    indices = None
    if sampler is not None:
        steps_read = min(steps, -(-INDICES // max(1, getattr(sampler, "batch_size", 1))))
        indices = [int(index) for batch in itertools.islice(sampler, steps_read) for index in batch]
    contents = [digest for batch in itertools.islice(batches, steps) for digest in _digests(batch)]
    return Drawn(rank, data_parallel_rank, indices, contents)


@looks_for("repeated-samples", "shared-samples")
def drawing_findings(by_rank: Sequence[Drawn]) -> list[Finding]:
    """Return findings on samples that come twice on a rank, or on two, within their first epoch.

    Whatever the sampler gives twice is a fault. Content may be there twice: it is one from a share of MOST_ALIKE on.
    """
    drawn = {
        rank_drawn.data_parallel_rank: rank_drawn for rank_drawn in reversed(by_rank)
    }  # those of a model-parallel group are alike
    findings = []
    repeats, shares = _repeats_and_shares(drawn, "indices", 0.0)
    unit = "indices of the sampler"
    if not repeats and not shares:
        repeats, shares = _repeats_and_shares(drawn, "contents", MOST_ALIKE)
        unit = "samples by text and image"
    for rank_drawn, (count, whole) in repeats.items():
        seen = f"{count} of the {whole} {unit} that this rank reads in its first epoch came before"
        findings.append(Finding(code="repeated-samples", seen=seen, ranks=(drawn[rank_drawn].rank,)))
    if shares:
        count, whole = map(sum, zip(*shares.values()))
        seen = f"{count} of {whole} {unit} of the first epoch are read by another rank too"
        ranks = tuple(sorted(drawn[rank_drawn].rank for rank_drawn in shares))
        findings.append(Finding(code="shared-samples", seen=seen, ranks=ranks))
    return findings


def _repeats_and_shares(drawn: dict[int, Drawn], field: str, allowed: float) -> tuple[dict, dict]:
    """Return, by data-parallel rank, (how many came before, of how many), and the same of those another rank has.

    Ranks with too few of them are left out.
    """
    values = {number: getattr(rank_drawn, field) or [] for number, rank_drawn in drawn.items()}
    owners: dict = {}
    for number, rank_values in values.items():
        for value in rank_values:
            owners.setdefault(value, set()).add(number)
    repeats = {n: (len(rank_values) - len({*rank_values}), len(rank_values)) for n, rank_values in values.items()}
    shares = {
        n: (sum(len(owners[value]) > 1 for value in rank_values), len(rank_values)) for n, rank_values in values.items()
    }

    def too_many(counts: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
        return {n: (count, whole) for n, (count, whole) in counts.items() if count > allowed * whole}

    return too_many(repeats), too_many(shares)


def _digests(batch: dict) -> list[str]:
    """Return a digest of each row's tokens, labels and images."""
    if _is_padding_only(batch):
        return []
    digests = []
    used = 0
    ends = (batch["image_embed_mask"] - batch["vision_expert_mask"]).sum(1)  # an image ends with one such token
    for row, length in enumerate(batch["lengths"].tolist()):
        count = int(ends[row])
        pixels = batch["images"][used : used + count, :, ::THINNED, ::THINNED]
        used += count
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (batch["input_ids"][row][:length], batch["labels"][row][:length], pixels):
            digest.update(tensor.contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def _is_padding_only(batch: dict) -> bool:
    """Return whether a batch is what `collate` makes of broken samples alone."""
    return len(batch["input_ids"]) == 1 and not bool(torch.as_tensor(batch["input_ids"]).any())
