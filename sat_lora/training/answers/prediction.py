"""What was answered to a sample, and the file of lines that keeps it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat_lora.data.records.record import IMAGE, IMAGE_MARK
from sat_lora.data.samples import Item
from sat_lora.training.metrics.generated import AnswerMetric
from sat_lora.training.metrics.scores import Answered, Scores

DIGITS = 6
"""Decimals of the numbers in the file."""


@dataclass(frozen=True)
class Prediction:
    """The answers to one sample, by who gives them: `base`, `adapter`, or the name of one of several adapters."""

    index: int
    """The place of the sample in the data."""
    sample: str
    """The line where it stands, or its file."""
    prompt: str
    references: tuple[str, ...]
    """The right answers."""
    answers: Mapping[str, str]
    image: str | None = None
    """The file of its (first) picture; None where that lies in something else."""
    answer_losses: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """The cross-entropy summed over the tokens of the right answer, and how many these are."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation, with the answers that it is of."""

    result: dict[str, Any]
    """What evaluation.json has.

    {"images": n, "base": {"exact_match": x, "exact_match_ignoring_case": y}, "adapter": {...}} with shares in [0, 1],
    of several adapters "adapters": {NAME: {...}}; "metrics": {NAME: {SIDE: {"value": x, "low": y, "high": z}}};
    "bootstrap": how low and high were drawn. Items that cannot be read are not among n: their paths are under "broken",
    and their number is "broken_samples".
    """
    predictions: Sequence[Prediction]
    scores: Mapping[str, Mapping[str, Scores]]
    samples: Sequence[Item]
    """All samples of the data, by the index of a prediction."""
    takes_frames: bool = False
    """Whether the images of samples are films."""
    problems: tuple[str, ...] = ()
    """Why metrics of --metrics could not be measured; they are not among the scores."""


def prediction_of(
    item: Item, index: int, prompt: str, answers: Mapping[str, str], answer_losses: Mapping[str, tuple[float, int]]
) -> Prediction:
    """Return the prediction of an item. prompt: what is asked where it has none."""
    image = str(item.image) if isinstance(item.image, Path) else None
    answer = item.answer.strip()
    references = [text.strip() for text in item.references] or [answer]
    references.sort(key=lambda text: text != answer)  # the one to learn stands first
    return Prediction(
        index=index,
        sample=item.place or item.name or image or f"sample {index}",
        prompt=(prompt if item.prompt is None else item.prompt).replace(IMAGE, IMAGE_MARK),
        references=tuple(references),
        answers=dict(answers),
        image=image,
        answer_losses=dict(answer_losses),
    )


def scores_of(predictions: Sequence[Prediction], metrics: Mapping[str, AnswerMetric]) -> dict[str, dict[str, Scores]]:
    """Return the scores of each metric by its name, by who answers. metrics: loaded, see `load_metric`."""
    sides = list(predictions[0].answers) if predictions else []
    return {side: {name: _measured(metric, predictions, side) for name, metric in metrics.items()} for side in sides}


def _measured(metric: AnswerMetric, predictions: Sequence[Prediction], side: str) -> Scores:
    answer_losses = [p.answer_losses[side] for p in predictions] if metric.needs_answer_losses else []
    answers = [prediction.answers[side] for prediction in predictions]
    answered = Answered(answers, [prediction.references for prediction in predictions], answer_losses)
    measure: Any = metric.measure
    return measure(answered)


def lines_of(predictions: Sequence[Prediction], scores: Mapping[str, Mapping[str, Scores]]) -> Iterator[str]:
    """Yield a line of JSON for each prediction, with the scores that `scores_of` gave: text that any terminal shows."""
    for number, prediction in enumerate(predictions):
        own = {
            side: {name: _rounded(measured.samples[number]) for name, measured in by_name.items()}
            for side, by_name in scores.items()
        }
        content = {
            "sample": prediction.sample,
            **({} if prediction.image in (None, prediction.sample) else {"image": prediction.image}),
            "prompt": prediction.prompt,
            "answer": prediction.references[0],
            **({"answers": list(prediction.references)} if len(prediction.references) > 1 else {}),
            "predictions": dict(prediction.answers),
            "scores": own,
        }
        yield shown_json(content) + "\n"


def shown_json(content: Any) -> str:
    """Return JSON on one line in which letters of any script stand as they are, and what a terminal would obey does
    not: control and format characters and halves of characters are escaped, as JSON can.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _rounded(score: float) -> float | None:
    return round(score, DIGITS) if math.isfinite(score) else None
