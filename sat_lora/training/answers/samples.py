"""The validation samples that a run answers at each validation, to be read by people and measured."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sat_lora.cogvlm.inputs.boxes import draw_boxes
from sat_lora.data.overview.examine import shown_picture
from sat_lora.data.overview.html_page import SIDE, shortened
from sat_lora.data.samples import ImageTextDataset, Item
from sat_lora.errors import ConfigError, DataError
from sat_lora.parallel.distributed import World, gather_lists
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn
from sat_lora.training.answers.answering import answer_samples
from sat_lora.training.answers.prediction import Prediction, lines_of, scores_of
from sat_lora.training.metrics.generated import AnswerMetric
from sat_lora.training.metrics.scores import Scores
from sat_lora.training.steps.observers import NOBODY, Observers

ADAPTER = "adapter"
PICTURES = 16
"""Pictures of one validation that are drawn."""


@dataclass(frozen=True)
class SampleAnswers:
    """The answers of one validation."""

    predictions: Sequence[Prediction]
    scores: Mapping[str, Mapping[str, Scores]]
    samples: Sequence[Item]
    """All samples that were asked, by the index of a prediction."""
    max_pixels: int
    measured: Mapping[str, float]
    """The metrics by their names, the same on every rank."""
    takes_frames: bool = False
    """Whether the images of samples are films."""

    def lines(self) -> Iterator[str]:
        """Yield a line of JSON for each sample, as in predictions.jsonl."""
        return lines_of(self.predictions, self.scores)

    def pictures(self) -> Iterator[tuple[str, bytes, tuple[int, int]]]:
        """Yield (text, PNG, its width and height) of the first samples whose picture can be read, with boxes drawn."""
        for prediction in self.predictions[:PICTURES]:
            said = prediction.answers[ADAPTER]
            texts = (f"asked {prediction.prompt}", f"right {prediction.references[0]}", f"said  {said}")
            caption = "\n".join(printable(shortened(text, 600)) for text in texts)
            image = self.samples[prediction.index].image
            if image is None:
                continue
            try:
                picture = shown_picture(image, self.max_pixels, prediction.sample, takes_frames=self.takes_frames)
            except (DataError, OSError, ValueError):
                continue
            picture.thumbnail((SIDE, SIDE))
            drawn = draw_boxes(picture, prediction.references[0] + said)
            png = io.BytesIO()
            drawn.save(png, "PNG")
            yield caption, png.getvalue(), drawn.size


class SampleQuestions:
    """Some samples, and what is measured of their answers.

    dataset: of questions alone. metrics: loaded, by their names. is_partitioned: whether no rank has whole weights.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        world: World,
        metrics: Mapping[str, AnswerMetric],
        *,
        batch_size: int,
        is_partitioned: bool,
    ):
        self._dataset = dataset
        self._world = world
        self._metrics = dict(metrics)
        self._batch_size = batch_size
        self._is_partitioned = is_partitioned

    def ask(self, model: Any, observers: Observers = NOBODY) -> SampleAnswers:
        """Return what the model answers, as it is. Every rank has to call it.

        A metric of the user's that fails is named and left out from then on: a run does not end by it.
        """
        predictions, _ = answer_samples(
            model,
            self._dataset,
            self._world,
            batch_size=self._batch_size,
            answerers=None,
            with_answer_losses=any(metric.needs_answer_losses for metric in self._metrics.values()),
            is_partitioned=self._is_partitioned,
            observers=observers,
        )
        scores: dict[str, Scores] = {}
        for name, metric in self._metrics.items() if predictions else ():
            try:
                scores[name] = scores_of(predictions, {name: metric})[ADAPTER][name]
            except ConfigError as error:
                warn(f"{error}; it is not measured at this validation")
        own = {name: measured.value for name, measured in scores.items()}
        measured = gather_lists([own])[0]  # of rank 0: code of the user's may draw, or read a clock
        dataset = self._dataset
        return SampleAnswers(
            predictions, {ADAPTER: scores}, dataset.items, dataset.max_pixels, measured, dataset.takes_frames
        )
