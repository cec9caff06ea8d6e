"""Samples answered by greedy decoding, by a base and adapters on it: shared by ranks, in batches that do not depend
on how many ranks there are.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy

from sat_lora.cogvlm.decoding.generate import generate, inference
from sat_lora.cogvlm.inputs.text import Sample
from sat_lora.cogvlm.inputs.tokens import first_tokens
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.data.samples import BrokenSample, ImageTextDataset, Item, collate
from sat_lora.errors import DataError
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import World, gather_lists
from sat_lora.printable import printable
from sat_lora.training.answers.prediction import Prediction, prediction_of
from sat_lora.training.metrics.answers import AnswersOf
from sat_lora.training.steps.loss import answer_loss_sum
from sat_lora.training.steps.observers import NOBODY, Observers
from sat_lora.training.steps.step import to_device

BASE = "base"
Broken = tuple[str, str, str | None]
"""The path, the reason and the sample of one that cannot be used."""


def answer_samples(
    model: CogVLMModel,
    dataset: ImageTextDataset,
    world: World,
    *,
    batch_size: int,
    answerers: Mapping[str, str | None] | None,
    lengths: Sequence[int | BrokenSample] | None = None,
    with_answer_losses: bool = False,
    is_partitioned: bool = False,
    progress: Callable[[Sequence], Iterable] = iter,
    observers: Observers = NOBODY,
) -> tuple[list[Prediction], list[Broken]]:
    """Return (the predictions in the order of the samples, those that cannot be used), the same on every rank. Every
    rank has to call it.

    dataset: of questions alone, see `with_answer`. answerers: who answers, with the name of the mixins that are on
    then, None for none; None: the model as it is, as `adapter`. lengths: those of the right answers, as
    `length_of_answer` gives them; the longest is the most that is generated. with_answer_losses: whether the loss of
    the right answers is measured too. is_partitioned: under ZeRO-3 all ranks answer everything, since none of them
    has whole weights. progress: goes through the batches.
    """
    share = (0, 1) if is_partitioned else (world.data_parallel_rank, world.data_parallel_size)
    if lengths is None:
        lengths = [length_of_answer(dataset, item) for item in dataset.items]
    longest = max((length for length in lengths if isinstance(length, int)), default=0) + 1
    with_answers = copy.copy(dataset)
    with_answers.with_answer = True
    with_answers.learns_all = False
    predictions: list[Prediction] = []
    broken: list[Broken] = []
    starts = range(0, len(dataset), batch_size)[share[0] :: share[1]]
    for start in progress(starts):
        observers.on_phase("test")
        indices = range(start, min(start + batch_size, len(dataset)))
        questions = {i: dataset[i] if isinstance(lengths[i], int) else lengths[i] for i in indices}
        broken += [(s.path, s.reason, s.sample) for s in questions.values() if isinstance(s, BrokenSample)]
        usable = {i: question for i, question in questions.items() if isinstance(question, Sample)}
        if not usable:
            continue
        batch = to_device(collate([*usable.values()], image_size=dataset.image_size), world.device)
        right = [with_answers[i] for i in usable] if with_answer_losses else None
        answers: dict[str, list[str]] = {}
        answer_losses: dict[str, list[tuple[float, int]]] = {}
        for side, name in ({"adapter": None} if answerers is None else answerers).items():
            if answerers is not None:
                _let_answer(model, name)
            tokens = generate(model, batch, max_new_tokens=longest, eos_token_id=dataset.ends)
            answers[side] = [dataset.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
            if right is not None:
                answer_losses[side] = _answer_losses(model, right, dataset.image_size, world)
        for row, i in enumerate(usable):
            own = {side: texts[row] for side, texts in answers.items()}
            sums = {side: pairs[row] for side, pairs in answer_losses.items()}
            predictions.append(prediction_of(dataset.items[i], i, dataset.prompt, own, sums))
    by_index = {prediction.index: prediction for prediction in gather_lists(predictions)}
    return [by_index[index] for index in sorted(by_index)], sorted(set(gather_lists(broken)))


def _let_answer(model: CogVLMModel, name: str | None) -> None:
    """Enable the mixins of that name alone."""
    mixins = lora_mixins(model)
    for key, mixin in mixins.items():  # first off, then on: two of them may hold the same weight whole
        if mixin.enabled and key.rpartition("mixins.")[2] != name:
            mixin.enabled = False
    for key, mixin in mixins.items():
        if not mixin.enabled and key.rpartition("mixins.")[2] == name:
            mixin.enabled = True


@torch.no_grad()
def _answer_losses(
    model: CogVLMModel, samples: Sequence[Sample | BrokenSample], image_size: tuple[int, int], world: World
) -> list[tuple[float, int]]:
    """Return, for each sample, the cross-entropy summed over the tokens of its answer, and how many these are: none
    where the answer has no room behind its question.
    """
    batch = collate(samples, image_size=image_size)
    on_logits = AnswersOf()
    with inference(model):
        answer_loss_sum(model, to_device(batch, world.device), on_logits)
    answers = on_logits.answers(batch["labels"])
    losses = cross_entropy(answers.logits.float(), answers.labels, reduction="none").double()
    sums = torch.zeros(2, answers.batch_size, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, answers.samples, losses)
    sums[1].index_add_(0, answers.samples, torch.ones_like(losses))
    rows = iter([(total, int(count)) for total, count in zip(*sums.tolist())])
    return [next(rows) if isinstance(sample, Sample) else (0.0, 0) for sample in samples]


def length_of_answer(dataset: ImageTextDataset, item: Item) -> int | BrokenSample:
    """Return how many tokens an answer has, at most --max_length; what is wrong with one that cannot be encoded."""
    try:
        tokens, _ = first_tokens(dataset.tokenizer, item.answer, dataset.max_length, dataset.special_tokens, "answer")
    except DataError as error:
        name = printable(item.place or item.image)
        return BrokenSample(name, f"{name}: {error}")
    return len(tokens)


def cut_answers(dataset: ImageTextDataset, lengths: Sequence[int | BrokenSample]) -> int:
    """Return how many answers have more tokens than --max_length. lengths: as `length_of_answer` gives them."""
    full = (item for item, length in zip(dataset.items, lengths, strict=True) if length == dataset.max_length)
    settings = (dataset.max_length, dataset.special_tokens, "answer")
    return sum(first_tokens(dataset.tokenizer, item.answer, *settings)[1] > 0 for item in full)
