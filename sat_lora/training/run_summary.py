"""What a run is about to train, in ten lines at most: to be read before its first step."""

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.quantized_files import KEY
from sat_lora.cogvlm.inputs.prompts import version_of
from sat_lora.cogvlm.inputs.text import IGNORED, Sample
from sat_lora.data.answer_lengths import AnswerLengths
from sat_lora.data.batches.sources import Source
from sat_lora.data.folders import unreadable_folders, unreadable_notes
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.files.paths import split_weight
from sat_lora.parallel.distributed import World
from sat_lora.printable import printable
from sat_lora.training.metrics.registry import LOSS
from sat_lora.training.settings.config import (
    NONE,
    Data,
    Model,
    Optimizer,
    Parallel,
    Precision,
    Quantizing,
    Saving,
    Schedule,
    TrainConfig,
)
from sat_lora.training.settings.demo import Demo
from sat_lora.training.settings.schedule import warmup_steps

COLUMNS = 80  # columns of a line
LABEL = 10  # columns of the word at its beginning
COUNTED = 1000  # samples that are tokenised, whatever there are
LONGEST = 64  # characters a token, at most: what lies beyond is cut off anyhow, and is not tokenised


@dataclass(frozen=True)
class Texts:
    """The first samples of a run as tokens: how many, how long, and what is wrong with them."""

    items: int
    """Items that were looked at."""
    own_prompts: int
    """Items with a prompt of their own."""
    unusable: int
    """Items that cannot be laid out."""
    longest: int
    """Tokens of the longest sample, the cut ones counted."""
    cut: int
    """Answers that are cut."""
    lengths: AnswerLengths | None
    """The lengths of all answers; None with tar shards, which nobody looks through before."""
    first: Sample | None
    """The first sample that can be laid out."""
    unknown_id: int | None
    """A token id that the vocabulary lacks."""


def look_at(source: Source, vocabulary: int) -> Texts:
    """Return what the first COUNTED samples of a source are as tokens, or fewer of a stream.

    Images are read from streams alone. vocabulary: how many token ids the base has.
    """
    count = 0
    own_prompts = 0
    unusable = 0
    longest = 0
    cut = 0
    first = None
    unknown = None
    for item in source.first_items(COUNTED):
        count += 1
        own_prompts += item.prompt is not None
        answer = item.answer[: LONGEST * source.dataset.max_length]
        try:
            sample = source.dataset.lay_out(dataclasses.replace(item, answer=answer))
        except (SatLoraError, TypeError, ValueError):  # the run names it when its turn comes
            unusable += 1
            continue
        first = first or sample
        longest = max(longest, len(sample.input_ids) + sample.left_out)
        cut += sample.left_out > 0
        outside = (sample.input_ids < 0) | (sample.input_ids >= vocabulary)
        if unknown is None and outside.any():
            unknown = int(sample.input_ids[outside][0])
    return Texts(count, own_prompts, unusable, longest, cut, source.answer_lengths(), first, unknown)


def left_out(source: Source) -> dict[str, int]:
    """Return how many files and entries in the data paths are no samples of the source, by reason."""
    counts: dict[str, int] = {}
    for reason, count in source.left_out:
        short = "folders that cannot be read" if unreadable_folders({reason: count}) else reason
        counts[short] = counts.get(short, 0) + count
    return counts


def more_to_say(max_length: int, data: Source, valid: Source | None) -> list[str]:
    """Return sentences on what is wrong with the data and has no line in the summary: folders that cannot be read, by
    name, and answers of validation data that are cut.
    """
    notes = []
    for source, option in ((data, "--train-data"), (valid, "--valid-data")):
        if source is not None:
            notes += unreadable_notes(dict(source.left_out), option)
    lengths = None if valid is None else valid.answer_lengths()
    cut = None if lengths is None else lengths.sentence(max_length)
    if cut:
        notes.append(f"validation: {cut}")
    return notes


def check_vocabulary(texts: Texts, tokenizer: str | None, vocabulary: int) -> None:
    """Raise ConfigError where the tokenizer gives token ids that the base has no embedding for."""
    if texts.unknown_id is not None:
        raise ConfigError(
            f"--local_tokenizer: {tokenizer} makes token {texts.unknown_id} of the training data, the "
            f"base has a vocabulary of {vocabulary}, from 0 to {vocabulary - 1}; give the base's own tokenizer"
        )


def run_summary(
    config: TrainConfig,
    world: World,
    sizes: dict,
    texts: Texts,
    *,
    data: Source,
    valid: Source | None,
    steps: int,
    start_step: int,
    fingerprint: str,
    demo: Demo | None = None,
) -> str:
    """Return the lines; each has at most COLUMNS columns, but for the run's folder where that is longer.

    sizes: the base's model_config.json. fingerprint: the base's.
    """
    lines = {
        "base": _base(config.model, config.quantization, sizes, fingerprint, demo),
        "device": _device(config.precision, config.parallel, world),
        "data": _data(config.data, data, demo),
        "left out": _counts(left_out(data)),
        "valid": _valid(config, valid),
        "best": _best(config.saving, valid),
        "prompt": _prompt(config, texts, demo),
        "steps": _steps(config.schedule, config.optimizer, world, data, steps),
        "run": _run(config.run_folder, steps, start_step),
        "sample": _sample(texts, data.dataset.tokenizer),
        "length": _length(config.model.max_length, texts, data.samples),
    }
    return "\n".join(
        f"{label:<{LABEL}}{text if label == 'run' else fit(text, COLUMNS - LABEL)}"
        for label, text in lines.items()
        if text
    )


def _base(model: Model, quantizing: Quantizing, sizes: dict, fingerprint: str, demo: Demo | None) -> str:
    """Return the line on the base: its folder, family, layers and fingerprint, and the scheme of one in few bits."""
    family = sizes.get("model_class", "CogVLM")
    family = str(family).removesuffix("Model")
    ending = f": {fit(family, 20)}, {sizes.get('num_layers')} layers, fingerprint {fingerprint[:8]}"
    scheme = quantizing.quantize
    if scheme == NONE and KEY in sizes:
        scheme = sizes[KEY]["scheme"]
    if scheme != NONE:
        ending += f", in {scheme}"
    name = "the embedded tiny base" if _is_embedded(model.base, demo) else model.base
    return fit(name, COLUMNS - LABEL - len(ending)) + ending


def _device(precision: Precision, parallel: Parallel, world: World) -> str:
    """Return the line on device, precision and ranks."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    dtype = "bf16" if precision.bf16 else "fp16" if precision.fp16 else "fp32"
    layout = f"{world.size} rank{'s' if world.size > 1 else ''}"
    if world.size > 1:
        layout += f" ({world.data_parallel_size} data-parallel x {parallel.model_parallel_size} model-parallel)"
    return f"{device}, {dtype}, {layout}, ZeRO {parallel.zero_stage}, {parallel.distributed_backend}"


def _data(settings: Data, data: Source, demo: Demo | None) -> str:
    """Return the line on the training data: how many samples, and where their answers come from."""
    paths = [Path(split_weight(path)[0]) for path in settings.train_data or ()]
    if data.packing is not None:
        how = f"of {data.packing}"
    elif demo is not None and demo.has(settings.train_data or ()):
        how = "of the embedded demo: file names are the answers"
    else:
        kinds = [*data.layouts]
        place = f"of {paths[0]}" if len(paths) == 1 else f"of {len(paths)} paths"
        how = ": ".join(filter(None, [place, ", ".join(kinds)]))
        if columns(how) > COLUMNS - LABEL - 16:
            how = f"({', '.join(kinds)})"
    return f"{data.samples:,} samples {how}"


def _counts(counts: dict[str, int]) -> str:
    """Return as many reasons as a line has room for, the commonest first."""
    shown = ""
    commonest_first = sorted(counts.items(), key=lambda entry: -entry[1])
    parts = [f"{count:,} {reason}" for reason, count in commonest_first]
    for number, part in enumerate(parts, 1):
        rest = len(parts) - number
        longer = f"{shown}, {part}" if shown else part
        if columns(longer) + (len(f", and {rest} reasons more") if rest else 0) > COLUMNS - LABEL and shown:
            return f"{shown}, and {rest + 1} reasons more"
        shown = longer
    return shown


def _valid(config: TrainConfig, valid: Source | None) -> str:
    """Return the line on the validation data, or on why there are none."""
    split = ",".join(f"{share:g}" for share in config.data.split)
    if valid is None and sum(config.data.split[1:2]) > 0:
        return f"none: too few samples for --split {split}; give --valid-data"
    if valid is None:
        return f"none: no --valid-data, and --split {split} leaves none (0.95,0.05 would)"
    source = "of --valid-data" if config.data.valid_data else f"of --train-data, by --split {split}"
    if config.data.valid_data and "split" in config.given and len(config.data.split) > 1:
        source += "; --split is not used"
    often = f"every {config.saving.eval_interval} steps" if config.saving.eval_interval else "at the end"
    return f"{valid.samples:,} samples {source}, {often}"


def _best(saving: Saving, valid: Source | None) -> str:
    """Return the line on what is done at a validation beside the loss; empty without anything."""
    if valid is None or (saving.metric, saving.early_stopping, saving.eval_samples) == (LOSS, 0, None):
        return ""
    clauses = [f"by {printable(saving.metric)}"]
    if saving.early_stopping:
        clauses.append(f"ends after {saving.early_stopping} that are not better")
    if saving.eval_samples is not None:
        clauses.append(f"{saving.eval_samples:,} answered at each")
    return ", ".join(clauses)


def _prompt(config: TrainConfig, texts: Texts, demo: Demo | None) -> str:
    """Return the line on the prompts and the version of the template, and where each comes from."""
    named = version_of(config.model.base)
    if "version" in config.given:
        source = "given" if named in (None, config.model.version) else f"given; its config says {fit(named, 12)}"
    elif named == config.model.version:
        source = "from its config"
    else:
        source = "the demo's" if _is_embedded(config.model.base, demo) else "the default"
    version = f"version {config.model.version} ({source})"
    if texts.items and texts.own_prompts == texts.items:
        return f"each sample's own; {version}"
    share = f"{texts.items - texts.own_prompts} of {texts.items} have none: " if texts.own_prompts else ""
    kind = "--prompt" if "prompt" in config.given else "default of --prompt"
    room = COLUMNS - LABEL - columns(f'{share}"" ({kind}); {version}')
    if room < columns(config.data.prompt) and kind != "--prompt":
        kind = "by default"
        room = COLUMNS - LABEL - columns(f'{share}"" ({kind}); {version}')
    return f'{share}"{fit(config.data.prompt, max(12, room))}" ({kind}); {version}'


def _is_embedded(base: str, demo: Demo | None) -> bool:
    """Return whether the base is the demo's."""
    return demo is not None and demo.is_base(base)


def _steps(schedule: Schedule, optimizer: Optimizer, world: World, data: Source, steps: int) -> str:
    """Return the line on steps, epochs and the batch: samples x accumulation x data-parallel ranks."""
    accumulation = schedule.gradient_accumulation_steps
    batch = schedule.batch_size * accumulation * world.data_parallel_size
    factors = [str(schedule.batch_size)]
    factors += [str(accumulation)] if accumulation > 1 else []
    factors += [f"{world.data_parallel_size} ranks"] if world.data_parallel_size > 1 else []
    made_of = f" = {' x '.join(factors)}" if len(factors) > 1 else ""
    epochs = f"{steps * batch / max(1, data.epoch_samples):.3g}"
    warmup = warmup_steps(schedule.warmup, steps)
    return f"{steps:,} ({epochs} epochs), batch {batch}{made_of}, lr {optimizer.lr:g}, warm-up {warmup:,}"


def _run(run_folder: str, steps: int, start_step: int) -> str:
    """Return the line on the run's folder, and on the step that it goes on from."""
    folder = printable(run_folder)
    if start_step == 0:
        return folder
    if start_step >= steps:
        return f"{folder}, at step {start_step} of {steps}: nothing is left (--train-iters goes further)"
    return f"{folder}, resumed from step {start_step}"


def _sample(texts: Texts, tokenizer) -> str:
    """Return the line that shows a sample: what the model is asked, and the answer to learn."""
    if texts.first is None:
        return "none that can be shown"
    sample = texts.first
    learned = sample.labels != IGNORED
    asked = sample.input_ids[~learned & (sample.image_embed_mask == 0)]
    prompt = _decoded(tokenizer, asked)
    ends = [
        *(learned[:-1] & ~learned[1:]).nonzero()[:, 0].tolist(),
        len(learned) - 1,
    ]  # of the answers of several turns
    starts = [0, *(end + 1 for end in ends)]
    answers = [sample.labels[start : end + 1][learned[start : end + 1]] for start, end in zip(starts, ends)]
    answer = " | ".join(_decoded(tokenizer, ids) for ids in answers if len(ids))
    image = "<image>" if bool(sample.image_embed_mask.any()) else ""
    count = f", {len(sample.input_ids)} tokens"
    room = COLUMNS - LABEL - len(image) - len('"" -> ""') - len(count)
    answer = fit(answer, max(room // 2, room - columns(printable(prompt))))
    return f'"{image}{fit(prompt, room - columns(answer))}" -> "{answer}"{count}'


def _decoded(tokenizer, ids: torch.Tensor) -> str:
    """Return the text of token ids (tokens,), without special tokens."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip(" ")


def _length(max_length: int, texts: Texts, samples: int) -> str:
    """Return the line on how long samples are, and how many answers are cut."""
    cut = None if texts.lengths is None else texts.lengths.sentence(max_length)
    if cut is not None:
        return cut
    looked_at = f"first {texts.items:,}" if samples > texts.items else f"{texts.items:,}"
    if texts.lengths is None and texts.cut:
        return f"{texts.cut} of the first {texts.items} answers are cut; {texts.longest} tokens would hold them"
    ending = f"; {texts.unusable} unusable" if texts.unusable else ""
    what = "of shards: the first answer that is cut will be said" if texts.lengths is None else "no answer is cut"
    return f"{what}; longest of the {looked_at} samples {texts.longest} of {max_length} tokens{ending}"


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def fit(text: object, room: int) -> str:
    """Return `text` as `printable` gives it, with its middle left out where it takes more than `room` columns."""
    text = str(text)
    if len(text) > 8 * room:  # the rest is not looked at
        text = text[: 4 * room] + text[-4 * room :]
    text = printable(text)
    if columns(text) <= room:
        return text
    head = _prefix(text, (room - 3 + 1) // 2)
    return head + "..." + _prefix(text[::-1], room - 3 - columns(head))[::-1]


def _prefix(text: str, room: int) -> str:
    """Return the longest beginning of a text that takes at most `room` columns."""
    taken: Sequence[str] = list(itertools.accumulate(text))
    return next((part for part in reversed(taken) if columns(part) <= room), "")
