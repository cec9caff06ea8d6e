"""What a fine-tuned model reads: generated answers against the right ones, base against base + adapter."""

import errno
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from sat_lora.adapters.read import trained_whole
from sat_lora.adapters.save_load import load_adapter
from sat_lora.cogvlm.decoding.generate import generate
from sat_lora.cogvlm.inputs.text import Sample, end_tokens
from sat_lora.cogvlm.inputs.tokens import first_tokens
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.cogvlm.sizes import image_length_problem
from sat_lora.data.folders import unreadable_notes
from sat_lora.data.samples import (
    BrokenSample,
    DataCounts,
    ImageTextDataset,
    Item,
    collate,
    read_items,
    reading_options,
)
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.errors import CheckpointError, ConfigError, DataError
from sat_lora.files.foreign import read_json
from sat_lora.files.paths import is_shard
from sat_lora.files.step_folders import follow
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import World, gather_lists, run_on_all_ranks
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn
from sat_lora.terminal.progress import shown
from sat_lora.training.prepare import dataset_maker, load_base
from sat_lora.training.runs.results import EVALUATION, RUN
from sat_lora.training.runs.run_folder import write_json
from sat_lora.training.settings.config import NONE, TrainConfig
from sat_lora.training.settings.run_settings import settings_of_run
from sat_lora.training.source_settings import source_settings
from sat_lora.training.steps.loss import sum_over_data_parallel
from sat_lora.training.steps.observers import NOBODY, Observers
from sat_lora.training.steps.step import to_device


def evaluate_adapter(
    config: TrainConfig,
    adapter: str | Path | None,
    world: World,
    trained: tuple[CogVLMModel, dict] | None = None,
    *,
    observers: Observers = NOBODY,
    any_base: bool = False,
    run_folder: str | None = None,
) -> dict:
    """Answer every item of --test-data by greedy decoding, with and without the adapter, and return the shares of right
    answers. The ranks share the items; every rank has to call it.

    config: with --test-data, and settled, see `settle`. adapter: its folder; None answers with the base alone, and
    leaves "adapter" out of the result. trained: a model that has trained this adapter on that base, and its
    model_config.json, to be used instead of loading another: disabled it is the base bit for bit, and the adapter on
    disk is read into it. observers: are told of every batch. any_base: takes an adapter of another base, too.
    run_folder: of the run that asks, if one does.
    Returns {"images": n, "base": {"exact_match": x, "exact_match_ignoring_case": y}, "adapter": {...}} with shares in
    [0, 1]; unreadable items are left out of n, their paths are listed under "broken" and they are counted as
    "broken_samples". Base and adapter come from what lies on disk. Raises DataError where no item can be read,
    CheckpointError or AdapterError where base or adapter cannot be used: on every rank what any of them has met.
    """
    observers.on_phase("load")
    items = run_on_all_ranks(_test_items, config, run_folder)
    brought = () if adapter is None or config.quantization.quantize == NONE else trained_whole(adapter)
    model, sizes = trained or load_base(config, world, trained=brought)
    problem = image_length_problem(sizes)
    if problem:
        raise CheckpointError(f"--from_pretrained: {config.model.base}: {problem}; copy its config again")
    if adapter is not None:
        run_on_all_ranks(load_adapter, model, adapter, any_base=any_base)
    dataset = dataset_maker(config.model, config.data, sizes, with_answer=False)(items)
    ends = end_tokens(dataset.tokenizer, sizes)
    share = range(world.data_parallel_rank, len(dataset), world.data_parallel_size)
    right = {side: [0, 0] for side in ("base", "adapter")[: 1 if adapter is None else 2]}
    images = 0
    broken: list[tuple[str, str, str | None]] = []
    lengths = [length_of_answer(dataset, item) for item in dataset.items]
    longest = max((length for length in lengths if isinstance(length, int)), default=0) + 1
    if cut := _cut_answers(dataset, lengths):
        warn(
            f"--test-data: {cut:,} of {len(lengths):,} answers have more tokens than --max_length "
            f"{config.model.max_length}: what is generated is never like them"
        )
    batch_size = config.saving.eval_batch_size or config.schedule.batch_size
    starts = range(0, len(share), batch_size)
    for start in shown(starts, "answering", "batches, each without and with the adapter") if world.is_main else starts:
        observers.on_phase("test")
        indices = list(share[start : start + batch_size])
        own_lengths = [(i, lengths[i]) for i in indices]
        questions = [dataset[i] if isinstance(length, int) else length for i, length in own_lengths]
        samples = [(question, dataset.items[i].answer.strip()) for question, i in zip(questions, indices)]
        broken += [(s.path, s.reason, s.sample) for s, _ in samples if not isinstance(s, Sample)]
        usable = [(s, answer) for s, answer in samples if isinstance(s, Sample)]
        images += len(usable)
        if not usable:
            continue
        batch = to_device(collate([sample for sample, _ in usable], image_size=dataset.image_size), world.device)
        for side, counts in right.items():
            for mixin in lora_mixins(model).values():
                mixin.enabled = side == "adapter"
            tokens = generate(model, batch, max_new_tokens=longest, eos_token_id=ends)
            for ids, (_, answer) in zip(tokens, usable):
                said = dataset.tokenizer.decode(ids, skip_special_tokens=True).strip()
                counts[0] += said == answer
                counts[1] += said.lower() == answer.lower()
    counts = [count for side in right.values() for count in side]
    answered, *sums = sum_over_data_parallel(images, *counts, device=world.device)
    broken = sorted(set(gather_lists(broken)))
    if not answered:
        paths = list(config.data.test_data or ())
        raise DataError(f"--test-data: none of {paths} can be read; the first: {broken[0][1]}")
    shares = iter(value / answered for value in sums)
    names = ("exact_match", "exact_match_ignoring_case")
    result = {"images": int(answered), **{side: {name: next(shares) for name in names} for side in right}}
    if not broken:
        return result
    return {**result, "broken": sorted({path for path, _, _ in broken}), "broken_samples": len(broken)}


def _test_items(config: TrainConfig, run_folder: str | None) -> list[Item]:
    """Return the items of --test-data. Raises DataError where there are none, or they cannot be read."""
    paths = list(config.data.test_data or ())
    if any(map(is_shard, paths)):
        raise DataError(f"--test-data: {next(problems_with_shards(paths, '--test-data'))}")
    data_counts = DataCounts()
    reading = {**reading_options(source_settings(config)), "run_folder": run_folder}
    try:
        items = read_items(paths, **reading, counts=data_counts)
    except DataError as error:
        raise DataError(f"--test-data: {error}") from error
    if not items:
        raise DataError(f"--test-data: {', '.join(paths)}: no images there; give folders of images LABEL.png")
    for note in unreadable_notes(data_counts.unused, "--test-data"):
        warn(note)
    return items


def _cut_answers(dataset: ImageTextDataset, lengths: list[int | BrokenSample]) -> int:
    """Return how many answers have more tokens than --max_length."""
    full = (item for item, length in zip(dataset.items, lengths, strict=True) if length == dataset.max_length)
    answers = (item.answer for item in full)
    settings = (dataset.max_length, dataset.special_tokens, "answer")
    return sum(first_tokens(dataset.tokenizer, answer, *settings)[1] > 0 for answer in answers)


def length_of_answer(dataset: ImageTextDataset, item: Item) -> int | BrokenSample:
    """Return how many tokens an answer has, at most --max_length; what is wrong with one that cannot be encoded."""
    try:
        tokens, _ = first_tokens(dataset.tokenizer, item.answer, dataset.max_length, dataset.special_tokens, "answer")
    except DataError as error:
        name = printable(item.place or item.image)
        return BrokenSample(name, f"{name}: {error}")
    return len(tokens)


def evaluation_table(result: dict) -> str:
    """Return the result of `evaluate_adapter` as a table of text."""
    lines = [f"{result['images']} images{'':<18}exact match   ignoring case"]
    titles = {"base": "base", "adapter": "base + adapter"}
    for side, title in ((side, title) for side, title in titles.items() if side in result):
        exact, loose = result[side].values()
        lines.append(f"  {title:<25}{100 * exact:>9.1f} %{100 * loose:>14.1f} %")
    if result.get("broken"):
        count = result.get("broken_samples", len(result["broken"]))  # earlier versions counted paths alone
        lines.append(f"  {count} samples could not be read and do not count")
    return "\n".join(lines)


def evaluated(config: TrainConfig, adapter: str | Path | None) -> dict:
    """Return what an evaluation is of, as its file has it: absolute paths of the base, the adapter if there is one, and
    the test data, and the settings of the questions.
    """
    paths: dict[str, str | Path] = {"base": config.model.base, **({"adapter": follow(adapter)} if adapter else {})}
    questions: dict[str, Any] = {name: config.value(name) for name in ("version", "prompt", "max_length")}
    test_data = [os.path.abspath(path) for path in config.data.test_data or ()]
    if config.quantization.quantize != NONE:
        questions |= {"quantize": config.quantization.flat()}
    return {name: os.path.realpath(path) for name, path in paths.items()} | {"test_data": test_data, **questions}


def try_to_write(file: Path) -> None:
    """Raise ConfigError, before anything is evaluated, where the file cannot be made, or one is there that holds no
    evaluation.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(file))
        if file.exists() and file.name != EVALUATION and not _is_evaluation(file):
            raise FileExistsError(errno.EEXIST, "something else than an evaluation lies there", str(file))
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise _not_written(file, error) from error


def write_evaluation(file: Path, result: dict, config: TrainConfig, adapter: str | Path | None) -> None:
    """Write the result of `evaluate_adapter`, and under `of` what it is of. Raises ConfigError where that fails."""
    try:
        write_json(file, {**result, "of": evaluated(config, adapter)})
    except OSError as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> ConfigError:
    """Return the error to raise where the file of an evaluation cannot be written."""
    return ConfigError(f"--out: {printable(file)}: cannot be written: {error.strerror}; give another file")


def evaluation_file(
    config: TrainConfig, *, adapter: str | None, run: str | None, out: str | None
) -> tuple[Path, Path | None]:
    """Return (the file of an evaluation, the run folder whose own adapter and base it is of, or None).

    adapter, run, out: the values of these options of `evaluate_cogvlm.py`. The file is --out; or, in the folder of the
    run, of the adapter, or of this process where a base is evaluated alone, the first of evaluation.json,
    evaluation-2.json, ... that is free or is of the same: an evaluation of something else stays. evaluation.json of a
    run is for its own adapter and base.
    """
    if out:
        file = Path(out)
        own = file.name == EVALUATION and (file.parent / RUN).is_file()
        return file, file.parent if own else None
    of = evaluated(config, adapter)
    base = config.model.base
    if not adapter:  # in the working directory, as nothing is written into a base
        return _place_for(of, Path(f"evaluation-{Path(os.path.abspath(base)).name}.json")), None
    own_run = _run_of(Path(adapter))
    is_named = run is None or (own_run is not None and os.path.realpath(run) == os.path.realpath(own_run))
    if own_run is not None and is_named and _has_base(own_run, base):
        file = own_run / EVALUATION
        is_old = os.path.lexists(file) and _content_of(file) is None  # of a version that did not say what it is of
        return file if is_old else _place_for(of, file), own_run
    folder = Path(run) if run else own_run or Path(adapter).parent
    return _place_for(of, folder / EVALUATION, first=2 if (folder / RUN).is_file() else 1), None


def _place_for(of: dict, file: Path, first: int = 1) -> Path:
    """Return the first of NAME.json, NAME-2.json, ... from number `first` on that is free or is of the same."""
    places = (
        file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        for number in itertools.count(first)
    )
    return next(place for place in places if not os.path.lexists(place) or _content_of(place) == of)


def _run_of(adapter: Path) -> Path | None:
    """Return the run folder of an adapter that is its `adapter/`, or a pointer or step in that; None for another."""
    path = Path(os.path.realpath(adapter))
    folder = next((place for place in (path, path.parent) if place.name == "adapter"), None)
    return folder.parent if folder is not None and (folder.parent / RUN).is_file() else None


def _has_base(run: Path, base: str) -> bool:
    """Return whether `base` is the base of the run, by its run.json."""
    try:
        own = settings_of_run(run).get("from_pretrained")
    except ConfigError:
        return False
    return own is not None and os.path.realpath(own) == os.path.realpath(base)


def _is_evaluation(file: Path) -> bool:
    """Return whether a file holds what `evaluate_adapter` gave, or nothing."""
    try:
        return file.stat().st_size == 0 or "images" in read_json(file)
    except (OSError, ValueError, TypeError):
        return False


def _content_of(file: Path) -> dict | None:
    """Return what the evaluation in a file is of; None where the file does not say so, or cannot be read."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return None
    return content.get("of") if isinstance(content, dict) else None
