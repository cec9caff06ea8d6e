"""What a fine-tuned model reads: generated answers against the right ones, base against base + adapter."""

import errno
import itertools
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_lora.adapters.loftq_base import approximate_base, refuse_other_bases
from sat_lora.adapters.read import trained_whole
from sat_lora.adapters.save_load import load_adapter
from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.cogvlm.checkpoints.quantized_files import note_of_folder
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.cogvlm.sizes import contradictions, image_length_problem
from sat_lora.data.answer_lists import is_predictions
from sat_lora.data.folders import unreadable_notes
from sat_lora.data.samples import DataCounts, Item, read_items, reading_options
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.errors import CheckpointError, ConfigError, DataError
from sat_lora.files.atomic import replace_lines
from sat_lora.files.foreign import read_json
from sat_lora.files.paths import is_shard
from sat_lora.files.step_folders import follow
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import World, run_on_all_ranks
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn
from sat_lora.terminal.progress import shown
from sat_lora.training.answers.answering import BASE, answer_samples, cut_answers, length_of_answer
from sat_lora.training.answers.prediction import Evaluated, Prediction, lines_of, scores_of
from sat_lora.training.metrics.generated import (
    DEFAULT_METRICS,
    AnswerMetric,
    load_metric,
    settled_name,
    shown_metrics,
)
from sat_lora.training.metrics.scores import LEVEL, RESAMPLES, SEED, Scores, interval_of
from sat_lora.training.prepare import dataset_maker, load_base
from sat_lora.training.runs.results import EVALUATION, PREDICTIONS, RUN
from sat_lora.training.runs.run_folder import write_json
from sat_lora.training.settings.config import NONE, Quantizing, TrainConfig
from sat_lora.training.settings.run_settings import settings_of_run
from sat_lora.training.source_settings import source_settings
from sat_lora.training.steps.observers import NOBODY, Observers

LORA = "lora"
"""The name of the mixins of a single adapter."""
TITLES = {BASE: "base", "adapter": "base + adapter"}


def evaluate_adapter(*arguments: Any, **more: Any) -> dict[str, Any]:
    """Return the result of `answer_test_data`, which it hands its arguments."""
    return answer_test_data(*arguments, **more).result


def answer_test_data(
    config: TrainConfig,
    adapter: str | Path | Mapping[str, str | Path] | None,
    world: World,
    trained: tuple[CogVLMModel, dict] | None = None,
    *,
    observers: Observers = NOBODY,
    any_base: bool = False,
    run_folder: str | None = None,
    has_base: bool = True,
) -> Evaluated:
    """Answer every item of --test-data by greedy decoding, with and without the adapter, and return what the metrics of
    --metrics say. The ranks share the items; every rank has to call it.

    config: with --test-data, and settled, see `settle`. adapter: its folder, or several by their names; None answers
    with the base alone. trained: a model that has trained this adapter on that base, and its model_config.json, to be
    used instead of loading another: disabled it is the base bit for bit, and the adapter on disk is read into it.
    observers: are told of every batch. any_base: takes an adapter of another base, too. run_folder: of the run that
    asks, if one does. has_base: whether the base answers alone as well.
    Unreadable items are left out. Base and adapter come from what lies on disk. Raises DataError where no item can be
    read, CheckpointError or AdapterError where base or adapter cannot be used, ConfigError where a metric cannot: on
    every rank what any of them has met.
    """
    observers.on_phase("load")
    if trained is None:
        run_on_all_ranks(_refuse_other_sizes, config)
    names = config.saving.metrics or DEFAULT_METRICS
    metrics = run_on_all_ranks(lambda: {settled_name(name): load_metric(name) for name in names})
    items = run_on_all_ranks(_test_items, config, run_folder)
    folders = {} if adapter is None else dict(adapter) if isinstance(adapter, Mapping) else {LORA: adapter}
    brought: list[str] = []
    scheme = None if config.quantization.quantize == NONE else config.quantization.quantize
    if scheme is not None:
        brought = [name for folder in folders.values() for name in trained_whole(folder)]
    if trained is None:
        run_on_all_ranks(refuse_other_bases, folders, config.model.base, scheme, trust=config.start.trust_checkpoint)
    model, sizes = trained or load_base(config, world, trained=brought)
    problem = image_length_problem(sizes)
    if problem:
        raise CheckpointError(f"--from_pretrained: {config.model.base}: {problem}; copy its config again")
    for number, (name, folder) in enumerate(folders.items()):
        run_on_all_ranks(load_adapter, model, folder, name=name, any_base=any_base)
        if trained is None:
            if number == 0:  # all of them were trained beside one base
                run_on_all_ranks(approximate_base, model, folder, name=name)
            for mixin in lora_mixins(model).values():
                mixin.enabled = False
    dataset = dataset_maker(config.model, config.data, sizes, with_answer=False)(items)
    lengths = [length_of_answer(dataset, item) for item in dataset.items]
    if cut := cut_answers(dataset, lengths):
        warn(
            f"--test-data: {cut:,} of {len(lengths):,} answers have more tokens than --max_length "
            f"{config.model.max_length}: what is generated is never like them"
        )
    sides: dict[str, str | None] = {BASE: None} if has_base or not folders else {}
    sides |= {side: name for side, name in zip(_sides_of(adapter), folders)}
    what = "answering", f"batches, each by {' and '.join(sides)}"
    predictions, broken = answer_samples(
        model,
        dataset,
        world,
        batch_size=config.saving.eval_batch_size or config.schedule.batch_size,
        answerers=sides,
        lengths=lengths,
        with_answer_losses=any(metric.needs_answer_losses for metric in metrics.values()),
        progress=(lambda starts: shown(starts, *what)) if world.is_main else iter,
        observers=observers,
    )
    if not predictions:
        paths = list(config.data.test_data or ())
        raise DataError(f"--test-data: none of {paths} can be read; the first: {broken[0][1]}")
    scores, problems = run_on_all_ranks(_measured, predictions, metrics)
    always = scores_of(predictions, {name: load_metric(name) for name in DEFAULT_METRICS})
    result: dict[str, Any] = {"images": len(predictions)}
    for side, by_name in always.items():
        home = result if side in TITLES else result.setdefault("adapters", {})
        home[side] = {name.replace("-", "_"): measured.value for name, measured in by_name.items()}
    measured_names = next(iter(scores.values()))
    result["metrics"] = {name: {side: _figures(by[name]) for side, by in scores.items()} for name in measured_names}
    result["bootstrap"] = {"resamples": RESAMPLES, "level": LEVEL, "seed": SEED}
    if broken:
        result |= {"broken": sorted({path for path, _, _ in broken}), "broken_samples": len(broken)}
    return Evaluated(
        result=result,
        predictions=predictions,
        scores=scores,
        samples=dataset.items,
        takes_frames=dataset.takes_frames,
        problems=tuple(problems),
    )


def _measured(
    predictions: Sequence[Prediction], metrics: Mapping[str, AnswerMetric]
) -> tuple[dict[str, dict[str, Scores]], list[str]]:
    """Return (what `scores_of` gives, without metrics that raise ConfigError; what these raise).

    Somebody's own may meet an answer that it cannot measure, after everything has been answered.
    """
    scores: dict[str, dict[str, Scores]] = {side: {} for side in predictions[0].answers}
    problems = []
    for name, metric in metrics.items():
        try:
            measured = scores_of(predictions, {name: metric})
        except ConfigError as error:
            problems.append(str(error))
            continue
        for side, by_name in measured.items():
            scores[side] |= by_name
    return scores, problems


def _sides_of(adapter: str | Path | Mapping[str, str | Path] | None) -> list[str]:
    """Return what those with adapters are called: a single one `adapter`, several by their names."""
    if adapter is None:
        return []
    return [*adapter] if isinstance(adapter, Mapping) and len(adapter) > 1 else ["adapter"]


def _figures(scores: Scores) -> dict[str, float]:
    low, high = interval_of(scores)
    return {"value": scores.value, "low": low, "high": high}


def _refuse_other_sizes(config: TrainConfig) -> None:
    """Raise ConfigError where sizes that published scripts give are not the base's."""
    said = config.compatibility.sizes
    problems = contradictions(said, read_config(config.model.base)) if said else []
    if problems:
        raise ConfigError.of(problems)


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


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Return the result of `evaluate_adapter`, or of an earlier version, as a table: a row for each metric."""
    metrics = shown_metrics(result)
    sides = list(next(iter(metrics.values())))
    rows = [[f"{result['images']} images", *(TITLES.get(side, printable(side)) for side in sides)]]
    rows += [[f"  {printable(name)}", *(by_side[side] for side in sides)] for name, by_side in metrics.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[0] = max(26, widths[0])
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if result.get("metrics"):
        lines.append(f"  in brackets: {LEVEL:.0%} of {RESAMPLES:,} bootstrap resamples")
    if result.get("broken"):
        count = result.get("broken_samples", len(result["broken"]))  # earlier versions counted paths alone
        lines.append(f"  {count} samples could not be read and do not count")
    return "\n".join(lines)


def evaluated(
    config: TrainConfig, adapter: str | Path | Mapping[str, str | Path] | None, has_base: bool = True
) -> dict:
    """Return what an evaluation is of, as its file has it: absolute paths of the base, the adapter if there is one, and
    the test data, the settings of the questions, and how the base is held where that is in fewer bits. Several adapters
    are there by their names. has_base: whether the base has answered alone as well.
    """
    if not has_base:
        return {**evaluated(config, adapter), "base_alone": False}
    if isinstance(adapter, Mapping) and len(adapter) > 1:
        of_all = evaluated(config, None)
        return {**of_all, "adapters": {name: os.path.realpath(follow(folder)) for name, folder in adapter.items()}}
    if isinstance(adapter, Mapping):
        adapter = next(iter(adapter.values()), None)
    paths: dict[str, str | Path] = {"base": config.model.base, **({"adapter": follow(adapter)} if adapter else {})}
    questions: dict[str, Any] = {name: config.value(name) for name in ("version", "prompt", "max_length")}
    test_data = [os.path.abspath(path) for path in config.data.test_data or ()]
    held = config.quantization.flat() if config.quantization.quantize != NONE else _held_in(config.model.base)
    if held is not None:
        questions |= {"quantize": held}
    return {name: os.path.realpath(path) for name, path in paths.items()} | {"test_data": test_data, **questions}


def _held_in(base: str) -> dict[str, Any] | None:
    """Return how the folder of a base holds its weights, as the options would say it; None where they are whole."""
    note = note_of_folder(base)
    if note is None:
        return None
    asked = note.quantization
    modules, kept = ([side] if isinstance(side, str) else side for side in (asked.modules, asked.keep_modules))
    return Quantizing(quantize=asked.scheme, quantize_modules=tuple(modules), keep_modules=tuple(kept)).flat()


def try_to_write(file: Path) -> None:
    """Raise ConfigError, before anything is evaluated, where the file cannot be made, or one is there that holds no
    evaluation.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(file))
        if file.exists() and file.name != EVALUATION and not _is_evaluation(file):
            raise FileExistsError(errno.EEXIST, "something else than an evaluation lies there", str(file))
        predictions = predictions_file(file)
        if predictions.is_dir() or (predictions.exists() and not is_predictions(predictions)):
            raise FileExistsError(errno.EEXIST, f"{predictions.name} beside it is no file of predictions", str(file))
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise _not_written(file, error) from error


def write_evaluation(
    file: Path,
    measured: Evaluated,
    config: TrainConfig,
    adapter: str | Path | Mapping[str, str | Path] | None,
    has_base: bool = True,
) -> None:
    """Write the predictions of `answer_test_data`, and then its result, with what it is of under `of`.

    Raises ConfigError where that fails; what was there before then stays. Raises it also, with all written, for metrics
    that could not be measured.
    """
    for path, write in (
        (predictions_file(file), lambda place: replace_lines(place, lines_of(measured.predictions, measured.scores))),
        (file, lambda place: write_json(place, {**measured.result, "of": evaluated(config, adapter, has_base)})),
    ):
        try:
            write(path)
        except OSError as error:
            raise _not_written(path, error) from error
    if measured.problems:
        problems = "\n".join(measured.problems)
        raise ConfigError(
            f"--metrics: {problems}; the answers, and all else, are in {printable(predictions_file(file))}"
        )


def predictions_file(file: Path) -> Path:
    """Return where the predictions of an evaluation go: predictions-2.jsonl beside evaluation-2.json, and
    NAME.predictions.jsonl beside NAME.json.
    """
    stem = Path(EVALUATION).stem
    if file.suffix == ".json" and re.fullmatch(rf"{stem}(-\d+)?", file.stem):
        return file.with_name(f"{PREDICTIONS}{file.stem.removeprefix(stem)}.jsonl")
    return file.with_name(f"{file.name.removesuffix('.json')}.{PREDICTIONS}.jsonl")


def _not_written(file: Path, error: OSError) -> ConfigError:
    """Return the error to raise where the file of an evaluation cannot be written."""
    return ConfigError(f"--out: {printable(file)}: cannot be written: {error.strerror}; give another file")


def evaluation_file(
    config: TrainConfig,
    *,
    adapter: str | Mapping[str, str] | None,
    run: str | None,
    out: str | None,
    has_base: bool = True,
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
    of = evaluated(config, adapter, has_base)
    base = config.model.base
    same = [of]
    if config.quantization.quantize == NONE:  # an earlier version did not say what the folder says
        same.append({name: value for name, value in of.items() if name != "quantize"})
    if isinstance(adapter, Mapping) and len(adapter) > 1:  # beside the first, and never in place of the run's own
        folder = Path(run) if run else _run_of(Path(first := next(iter(adapter.values())))) or Path(first).parent
        return _place_for(same, folder / EVALUATION, first=2 if (folder / RUN).is_file() else 1), None
    if isinstance(adapter, Mapping):
        adapter = next(iter(adapter.values()), None)
    if not adapter:  # in the working directory, as nothing is written into a base
        return _place_for(same, Path(f"evaluation-{Path(os.path.abspath(base)).name}.json")), None
    own_run = _run_of(Path(adapter))
    is_named = run is None or (own_run is not None and os.path.realpath(run) == os.path.realpath(own_run))
    if own_run is not None and is_named and _has_base(own_run, base):
        file = own_run / EVALUATION
        is_old = os.path.lexists(file) and _content_of(file) is None  # of a version that did not say what it is of
        return file if is_old else _place_for(same, file), own_run
    folder = Path(run) if run else own_run or Path(adapter).parent
    return _place_for(same, folder / EVALUATION, first=2 if (folder / RUN).is_file() else 1), None


def _place_for(same: Collection[dict], file: Path, first: int = 1) -> Path:
    """Return the first of NAME.json, NAME-2.json, ... from number `first` on that is free or is of one of the same."""
    places = (
        file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        for number in itertools.count(first)
    )
    return next(place for place in places if not os.path.lexists(place) or _content_of(place) in same)


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
