"""The metrics of generated answers, by the names that --metrics and --metric have for them, or by MODULE:FUNCTION.

Nothing slow is imported before a metric is loaded: names are checked when options are parsed.
"""

import difflib
import importlib
import importlib.util
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lora.errors import ConfigError
from sat_lora.printable import printable

if TYPE_CHECKING:
    from sat_lora.training.metrics.scores import Measure

_HERE = "sat_lora.training.metrics"


@dataclass(frozen=True, kw_only=True)
class AnswerMetric:
    """A metric of generated answers that can be asked for."""

    measure: "str | Measure"
    """The function that measures, or MODULE:NAME of it."""
    lower_is_better: bool = False
    is_share: bool = True
    """Whether it is in [0, 1] and shown in percent."""
    package: str | None = None
    """What has to be installed for it, by the name that it is imported by."""
    needs_answer_losses: bool = False


GENERATED: dict[str, AnswerMetric] = {
    "exact-match": AnswerMetric(measure=f"{_HERE}.texts:exact_match"),
    "exact-match-ignoring-case": AnswerMetric(measure=f"{_HERE}.texts:exact_match_ignoring_case"),
    "normalised-match": AnswerMetric(measure=f"{_HERE}.texts:normalised_match"),
    "token-f1": AnswerMetric(measure=f"{_HERE}.texts:answers_f1"),
    "anls": AnswerMetric(measure=f"{_HERE}.texts:answers_anls", package="rapidfuzz"),
    "vqa-accuracy": AnswerMetric(measure=f"{_HERE}.vqa:accuracy"),
    "bleu": AnswerMetric(measure=f"{_HERE}.captions:bleu", is_share=False, package="sacrebleu"),
    "chrf": AnswerMetric(measure=f"{_HERE}.captions:chrf", is_share=False, package="sacrebleu"),
    "rouge-l": AnswerMetric(measure=f"{_HERE}.captions:rouge_l", package="rouge_score"),
    "cider": AnswerMetric(measure=f"{_HERE}.captions:cider", is_share=False),
    "box-iou": AnswerMetric(measure=f"{_HERE}.boxes:mean_iou"),
    "box-accuracy": AnswerMetric(measure=f"{_HERE}.boxes:accuracy"),
    "perplexity": AnswerMetric(
        measure=f"{_HERE}.captions:perplexity", lower_is_better=True, is_share=False, needs_answer_losses=True
    ),
}
"""Metrics by name."""
DEFAULT_METRICS = ("exact-match", "exact-match-ignoring-case")
SPELLINGS = {"normalized-match": "normalised-match", "rougel": "rouge-l", "rouge": "rouge-l", "f1": "token-f1"}
"""What others call some of them."""


def settled_name(name: str) -> str:
    """Return a metric's own name for any of its spellings: EXACT_MATCH is exact-match; MODULE:FUNCTION stays."""
    if ":" in name:
        return name
    plain = name.strip().lower().replace("_", "-").replace(" ", "-")
    return SPELLINGS.get(plain, plain)


def is_code(name: str) -> bool:
    """Return whether a name is MODULE:FUNCTION, code of the user's."""
    return ":" in name


def names_code(field: str, value: Any) -> bool:
    """Return whether a setting of that name, a metric or a list of them, names code of the user's."""
    if field not in ("metric", "metrics"):
        return False
    return any(is_code(name) for name in ([value] if isinstance(value, str) else value or ()))


def shown_metrics(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return each metric of an evaluation's result, as its json has it, as a text for each who has answered: in percent
    where it is a share, with its interval in brackets. A result of an earlier version has the default ones alone.
    """
    metrics = result.get("metrics")
    if not metrics:
        sides = {side: result[side] for side in ("base", "adapter") if side in result}
        keys = {name: name.replace("-", "_") for name in DEFAULT_METRICS}
        metrics = {
            name: {side: {"value": own[key]} for side, own in sides.items() if key in own} for name, key in keys.items()
        }
    return {
        name: {side: _shown(figures, not is_code(name) and GENERATED[name].is_share) for side, figures in own.items()}
        for name, own in metrics.items()
    }


def _shown(figures: Mapping[str, float], is_share: bool) -> str:
    """Return a metric with its interval, in percent where it is a share."""
    factor, digits, unit = (100, 1, " %") if is_share else (1, 3, "")
    value = f"{factor * figures['value']:.{digits}f}{unit}"
    if "low" not in figures:
        return value
    return f"{value} [{factor * figures['low']:.{digits}f}, {factor * figures['high']:.{digits}f}]"


def name_problem(name: str, others: Sequence[str] = ()) -> str | None:
    """Return what is wrong with the name of a metric; None where it is one, or has the form of code.

    others: further names that are taken.
    """
    if name in others or settled_name(name) in GENERATED:
        return None
    shown = printable(repr(name))
    if is_code(name):
        module, _, function = name.rpartition(":")
        if module and function.isidentifier():
            return None
        return f"got {shown}, wanted MODULE:FUNCTION or FILE.py:FUNCTION"
    known = [*others, *GENERATED]
    plain = settled_name(name)
    spelled = {settled_name(other): other for other in known}
    near = [text for text in spelled if len(plain) > 1 and plain in text]
    near = [spelled[text] for text in (near or difflib.get_close_matches(plain, spelled, 3, 0.5))[:3]]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"got {shown}, wanted one of {', '.join(known)}, or MODULE:FUNCTION{hint}"


def metric_problem(name: str) -> str | None:
    """Return why a metric whose name is right cannot be used: its package is missing, or its code is none; else None.

    Code of the user's is imported and tried on an answer.
    """
    if not is_code(name):
        package = GENERATED[settled_name(name)].package
        if package is None or importlib.util.find_spec(package) is not None:
            return None
        return str(without_package(name, package))
    try:
        load_metric(name)
    except ConfigError as error:
        return str(error)
    return None


def without_package(metric: str, package: str) -> ConfigError:
    """Return the error to raise where the package of a metric is not installed."""
    return ConfigError(f"{metric} needs the package {package.replace('_', '-')}: pip install 'sat_lora[metrics]'")


def load_metric(name: str) -> AnswerMetric:
    """Return the metric of that name with its function. Raises ConfigError where it cannot be had."""
    if is_code(name):
        return _own_metric(name)
    metric = GENERATED[settled_name(name)]
    if not isinstance(metric.measure, str):
        return metric
    return AnswerMetric(**{**vars(metric), "measure": pkgutil.resolve_name(metric.measure)})


def _own_metric(name: str) -> AnswerMetric:
    """Return a metric of the user's: a function of (prediction, right answers) that returns a number, the larger the
    better unless it has an attribute lower_is_better.
    """
    from sat_lora.training.metrics.scores import mean_of

    module, _, attribute = name.rpartition(":")
    shown = printable(name)
    try:
        with _working_directory_importable():
            home = _module_of_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        function = getattr(home, attribute)
    except (Exception, SystemExit) as error:  # whatever the code of others raises when it is imported
        reason = printable(f"{type(error).__name__}: {error}")
        raise ConfigError(f"{shown} cannot be imported: {reason}; mend it, or give another metric") from error
    if not callable(function):
        raise ConfigError(f"{shown} is {type(function).__name__} and no function; give FUNCTION(prediction, answers)")
    checked = _checked(function, shown)
    checked("an answer", ["an answer", "another"])
    return AnswerMetric(
        measure=mean_of(checked), is_share=False, lower_is_better=bool(getattr(function, "lower_is_better", False))
    )


def _checked(function: Callable[..., Any], shown: str) -> Callable[[str, Sequence[str]], float]:
    """Return the function, with a ConfigError where it raises or returns no finite number."""

    def score(prediction: str, references: Sequence[str]) -> float:
        pair = f"({printable(repr(prediction)[:60])}, {printable(repr([*references])[:60])})"
        try:
            value = function(prediction, [*references])
            number = float(value)
        except (Exception, SystemExit) as error:
            reason = printable(f"{type(error).__name__}: {error}")
            raise ConfigError(f"{shown}{pair}: {reason}; wanted a number") from error
        if isinstance(value, str | bytes) or not math.isfinite(number):
            raise ConfigError(f"{shown}{pair} gave {printable(repr(value)[:60])}; wanted a finite number")
        return number

    return score


def _module_of_file(path: Path) -> Any:
    """Return the module that a file of Python holds. Raises what importing it raises."""
    name = f"_metrics_in_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for the module that they are of
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Let modules of the working directory be found inside, after all others."""
    before = [*sys.path]
    sys.path.append(str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
