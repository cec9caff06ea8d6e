"""The settings, data and base that a resumed run has to share with the run that it goes on from, by its checkpoint.

Under `run` of a checkpoint's state.json:

settings           the options that values are drawn from which are in no tensor of the checkpoint: --seed gives the
                   frozen A of --freeze_a, what PiSSA takes from the base, the order of the data and its split
data, valid_data   {"samples": how many, "digest": of them in their order}: a place in the data is the number of a step
files              a digest of the sizes of some files of the training data
versions           of the libraries that the numbers depend on
base               {"fingerprint": ..., and name, family, parameters, values}, as adapters have them
"""

import json
from collections.abc import Iterator
from pathlib import Path

from sat_lora.errors import CheckpointError, DataError
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.printable import printable
from sat_lora.training.metrics.registry import LOSS, METRICS
from sat_lora.training.runs.run_folder import versions
from sat_lora.training.settings.config import DEFAULTS, NOT_RESUMED, Start, TrainConfig
from sat_lora.training.settings.lora_options import LORA_FIELDS
from sat_lora.training.settings.run_settings import settings_of_run
from sat_lora.training.steps.checkpoint import newest_checkpoint, read_state

SETTLED = (*LORA_FIELDS, "seed", "quantize", "quantize_modules", "keep_modules")
"""Options that a run keeps for good."""
# Settings of which `notes` says nothing.
TOLD_ELSEWHERE = {"train_iters", "epochs", "run_folder", "given", "local_tokenizer"}


def facts_of_run(config: TrainConfig, data: dict, valid_data: dict | None) -> dict:
    """Return what goes under `run` of every checkpoint. data, valid_data: the `description` of their sources."""
    settings = {name: config.value(name) for name in SETTLED}
    if valid_data is not None and config.saving.eval_iters:  # a part of it alone
        valid_data = {
            **valid_data,
            "eval_iters": config.saving.eval_iters,
            "eval_batch_size": config.saving.eval_batch_size,
        }
    if valid_data is not None and config.saving.metric != LOSS:  # what `best` was compared by
        answered = {} if config.saving.metric in METRICS else {"eval_samples": config.saving.eval_samples}
        valid_data = {**valid_data, "metric": config.saving.metric, **answered}
    return {"settings": settings, "data": data, "valid_data": valid_data, "versions": versions()}


def state_to_resume(folder: str | Path) -> dict:
    """Return the state.json of a run folder's newest checkpoint. Raises CheckpointError where there is none that can be
    used.
    """
    return read_state(newest_checkpoint(Path(folder) / "checkpoints"))


def base_of_state(state: dict) -> BaseIdentity | None:
    """Return the base that the checkpoint's run was on; None where it does not say, as in older versions.

    Raises CheckpointError where it says what cannot be.
    """
    content = state["run"].get("base")
    if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), str):
        return None
    try:
        return BaseIdentity.from_dict(content["fingerprint"], content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"--resume: its newest checkpoint: base: {printable(error)}") from error


def settled_problems(config: TrainConfig, state: dict) -> Iterator[str]:
    """Yield a sentence for each option of SETTLED that is not what the checkpoint says that the run had.

    A checkpoint of an older version does not say it: run.json does.
    """
    stored = settings_of_run(config.run_folder)
    own = state["run"].get("settings")
    in_checkpoint = own if isinstance(own, dict) else {}
    for name in SETTLED if not config.problems else ("seed",):  # nobody knows LoRA's values then
        now = config.value(name)
        in_file = stored.get(name, DEFAULTS[name])
        before = in_checkpoint.get(name, in_file)
        if _text(now) == _text(before):
            continue
        is_from_file = _text(now) == _text(in_file)
        got = f"{printable(_text(now))}{' in run.json' * is_from_file}"
        where = "its checkpoint was made with" if is_from_file else "the run to resume has"
        way = "put it back" if is_from_file else "leave it out"
        yield f"--{name}: got {got}, but {where} {printable(_text(before))}; {way}, or start a new run"


def check_data(start: Start, state: dict, data: dict) -> None:
    """Raise DataError where the training data is not what it was, and --any-data was not given."""
    before = state["run"].get("data")
    if not isinstance(before, dict) or start.any_data or before.get("digest") == data["digest"]:
        return
    count = f"{before.get('samples')} samples then, {data['samples']} now"
    if before.get("samples") == data["samples"]:
        count = f"{data['samples']} samples, other ones or in another order"
    raise DataError(
        f"--resume: what --train-data and --split give has changed since step {state['step']}: {printable(count)}. The "
        "run would not go on at the next sample: the order is drawn over all of them, so of this epoch some would come "
        "twice and others never. Put the data back as it was, start a new run, or give --any-data to go on all the same"
    )


def notes(config: TrainConfig, state: dict, valid_data: dict | None, files: str | None = None) -> Iterator[str]:
    """Yield sentences on what differs from before, and may differ, when a run goes on.

    valid_data, files: those of this start, as `facts_of_run` and a source of training data give them.
    """
    stored = settings_of_run(config.run_folder)
    run = state["run"]
    changed = [
        f"--{name.replace('_', '-')} {printable(_text(config.value(name)))} (was {printable(_text(stored[name]))})"
        for name in stored.keys() - {*SETTLED, *TOLD_ELSEWHERE, *NOT_RESUMED}
        if name != "given" and _text(config.value(name)) != _text(stored[name])
    ]
    if changed:
        yield f"resumed with other settings: {', '.join(sorted(changed))}"
    if not run:
        yield (
            "the checkpoint is of an older version of sat_lora: whether seed, data, base and libraries are those of "
            "the run cannot be checked"
        )
        return
    before = run.get("versions") if isinstance(run.get("versions"), dict) else {}
    differing = [(name, now) for name, now in versions().items() if before.get(name, now) != now]
    other = [f"{name} {now} (was {printable(before[name])})" for name, now in differing]
    if other:
        yield f"warning: resumed with other libraries, so not bit for bit: {', '.join(other)}"
    if files is not None and run.get("files") not in (None, files):
        yield (
            f"warning: files of the training data have other sizes than they had up to step {state['step']}, under the "
            "same names: the run goes on with what they hold now, so not bit for bit"
        )
    has_best = state["best_loss"] is not None or state.get("best_value") is not None
    if has_best and run.get("valid_data") != valid_data:
        yield (
            "the validation data or --metric is not what it was: `best` begins anew, adapter/best names the old one "
            "until then"
        )


def _text(value) -> str:
    """Return a value as JSON, in which lists and tuples are alike, but patterns in another order are not."""
    return json.dumps(value)
