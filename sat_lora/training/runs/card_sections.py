"""What a run tells in the model card of its adapter: data, settings and how far it was."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat_lora.adapters.card import Section, add_section
from sat_lora.files.step_folders import follow
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn
from sat_lora.training.metrics.generated import shown_metrics

EVALUATION = "Evaluation"
_SETTINGS = {
    "lr": "Learning rate",
    "lr_decay_style": "Schedule",
    "warmup": "Warm-up",
    "weight_decay": "Weight decay",
    "clip_grad": "Clipping of gradients",
    "seed": "Seed",
    "quantize": "Base held in",
}
_TEXTS = {
    "version": "Prompt format",
    "prompt": "Prompt",
    "max_length": "Tokens of a sample, at most",
    "loss_on": "Loss on",
}


def sections_of_run(settings: Mapping[str, Any], state: Mapping[str, Any]) -> list[Section]:
    """Return the sections for an adapter of a run. settings: those of run.json, none of them needed. state: the content
    of the checkpoint that is saved with the adapter.

    Data go by their names, without the folders above them, which are nobody else's business.
    """
    return [Section("Data", tuple(_data(settings, state))), Section("Training", tuple(_training(settings, state)))]


def evaluation_section(result: Mapping[str, Any]) -> Section:
    """Return the section of an evaluation's result, of one adapter. A metric of the user's goes by its function: where
    that lies is nobody else's business.
    """
    titles = {"base": "Base", "adapter": "Base and adapter"}
    metrics = shown_metrics(result)
    rows: list[tuple[str, object]] = [("Images", result["images"])]
    rows += [
        (f"{title}: {name.rpartition(':')[2]}", by_side[side])
        for side, title in titles.items()
        for name, by_side in metrics.items()
        if side in by_side
    ]
    return Section(EVALUATION, tuple(rows))


def add_evaluation(adapter: str | Path, result: Mapping[str, Any]) -> None:
    """Put an evaluation's result into the model card of an adapter; where that cannot be written, a warning says so."""
    try:
        add_section(follow(Path(adapter)), evaluation_section(result))
    except OSError as error:  # the result itself is written
        warn(f"{printable(adapter)}: the result is not in its model card: {error}")


def _data(settings: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    run = state.get("run") or {}
    for option, facts, title in (("train_data", "data", "Training"), ("valid_data", "valid_data", "Validation")):
        names = settings.get(option)
        samples = (run.get(facts) or {}).get("samples")
        if names:
            yield f"{title} data", [Path(str(name)).name for name in ([names] if isinstance(names, str) else names)]
        if samples is not None:
            yield f"{title} samples", samples
    for option, title in _TEXTS.items():
        if settings.get(option) is not None:
            yield title, settings[option]


def _training(settings: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "Steps", state["step"]
    yield "Samples of a step", state["samples_per_step"]
    for option, title in _SETTINGS.items():
        value = settings.get(option)
        if value is not None and value != "none":
            yield title, value
    precision = [name for name in ("bf16", "fp16") if settings.get(name)]
    yield "Arithmetic", precision[0] if precision else "float32"
    if state.get("best_loss") is not None:
        yield "Lowest validation loss", state["best_loss"]
        yield "Step of the lowest validation loss", state["best_step"]
    if state.get("best_value") is not None:
        name = str(settings.get("metric", "value")).rpartition(":")[2]
        yield f"Best {name} of a validation", state["best_value"]
        yield f"Step of the best {name}", state["best_step"]
