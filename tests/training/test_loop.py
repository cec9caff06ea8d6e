"""What the loop tells its observers, and that nothing they do changes a run."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training import loop as loop_module
from sat_lora.training.loop import train
from sat_lora.training.metrics.registry import metrics_named
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.checkpoint import RunState
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.observers import EVENTS, Observer, Observers
from sat_lora.training.steps.optimizer_state import create_moments
from tests.support.configs import config_of
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, mixed_batch

STEPS = 4


def options():
    settings = dict(train_iters=STEPS, gradient_accumulation_steps=2, batch_size=2, warmup=0, lr=1e-2, min_lr_ratio=0)
    settings |= dict(lr_decay_style="constant", log_interval=2, eval_interval=3, save_interval=2, keep=0)
    return config_of(**settings, max_broken_share=1, skip_nonfinite=0)


class Witness(Observer):
    """Notes what happens, in words."""

    def __init__(self):
        self.events, self.saves, self.reports = [], {}, []

    def on_start(self, total_steps, start_step):
        self.events.append(f"start at {start_step} of {total_steps}")

    def on_phase(self, phase, *, step=None, micro_batch=None):
        place = [str(number) for number in (step, micro_batch) if number is not None]
        self.events.append(" ".join([phase, *place]))

    def on_step(self, report):
        self.events.append(f"step {report.step}{' with figures' if report.figures else ''}")
        self.reports.append(report)

    def on_validation(self, report):
        self.events.append(f"validation {report.step}{', the best' if report.is_best else ''}: {[*report.metrics]}")

    def on_save(self, step, adapter, checkpoint):  # by another thread
        self.saves[step] = sorted(path.name for folder in (adapter, checkpoint) for path in Path(folder).iterdir())

    def on_end(self, error):
        self.events.append("end")


def fails(self, *content, **place):
    raise RuntimeError("of no use")


Broken = type("Broken", (Observer,), {"name": "broken", **dict.fromkeys(EVENTS, fails)})


def trained(folder, members, said):
    world = init_model_parallel(init_distributed())
    model = tiny_model().train()
    add_lora(model, LoraConfig(r=4))
    engine = start_engine(model, adapter_optimizer(model, lr=1e-2), engine_config(2, 2, 2))
    create_moments(engine)
    run = RunFolder(folder, is_writer=True)
    batches, valid = (mixed_batch(0, step) for step in count()), [mixed_batch(0, 100)]
    torch.manual_seed(0)
    with Observers(members, said.append) as observers:
        train(
            engine,
            batches,
            valid,
            options(),
            run,
            world,
            RunState(),
            dataset_size=100,
            metrics=metrics_named(["token_accuracy"]),
            observers=observers,
        )
    return {path.name: path.read_bytes() for path in Path(folder, "adapter", str(STEPS)).iterdir()}


def watched_runs(folder):
    """What is told of a run, and the adapters of it and of one whose observers fail, beside that which they say."""
    witness, said = Witness(), []
    files = trained(f"{folder}/watched", [witness], said)
    of_broken = trained(f"{folder}/broken", [Broken(), Broken()], said)
    return witness.events, witness.saves, [report.loss for report in witness.reports], files == of_broken, said


def test_the_loop_tells_what_happens_and_who_fails_changes_nothing(tmp_path):
    ((events, saves, losses, is_same, said),) = run_ranks(watched_runs, 1, str(tmp_path))
    passes = "forward 0, backward, forward 1, backward, reduce, optimizer, save".split(", ")
    validation = ["write", "evaluate", "evaluate"]
    best = "validation {}, the best: ['token_accuracy']".format
    expected = [
        "start at 0 of 4",
        *("data 1", "reduce", *passes, "step 1"),
        *("data 2", "reduce", *passes, "step 2 with figures", "write"),
        *("data 3", "reduce", *passes, "step 3", *validation, best(3), "write"),
        *("data 4", "reduce", *passes, "step 4 with figures", *validation),
    ]
    assert events[: len(expected)] == expected
    assert events[len(expected)].startswith("validation 4") and events[len(expected) + 1 :] == ["write", "write", "end"]
    content = ["README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]
    assert saves == {step: content for step in (2, 3, 4)}
    assert len(losses) == STEPS and all(loss > 0 for loss in losses)
    assert is_same
    assert said == ["warning: broken cannot be written: RuntimeError: of no use; the run goes on without it"]


class Questions:
    """Answers of a scripted quality, in place of those that a model gives."""

    def __init__(self, values):
        self.values = iter(values)

    def ask(self, model, observers):
        return SimpleNamespace(measured={"exact-match": next(self.values)})


def ended_early(engine, world, folder, losses, *, state=None, answers=None, steps=8, **settings):
    """Train with scripted validations, one after each step; return the state at the end and the saves."""
    scripted = iter(losses)
    state = RunState() if state is None else RunState(**state)
    options = dict(train_iters=steps, gradient_accumulation_steps=1, batch_size=1, eval_interval=1, save_interval=0)
    with patch.object(loop_module, "validation_loss", lambda *args: (next(scripted), [])):
        train(
            engine,
            (mixed_batch(0, step) for step in count()),
            [None],
            config_of(**options, **settings, keep=0, max_broken_share=1),
            RunFolder(folder, is_writer=world.is_main),
            world,
            state,
            dataset_size=100,
            questions=None if answers is None else Questions(answers),
            lower_is_better=answers is None,
        )
    return vars(state), sorted(int(path.name) for path in Path(folder, "checkpoints").glob("[0-9]*"))


def early_ends(folder):
    world = init_model_parallel(init_distributed())
    model = tiny_model().train()
    add_lora(model, LoraConfig(r=4))
    engine = start_engine(model, adapter_optimizer(model, lr=1e-4), engine_config(2, 1, 1))
    create_moments(engine)

    def run(name, losses, **settings):
        return ended_early(engine, world, f"{folder}/{name}", losses, **settings)

    cut = dict(step=3, best_loss=2.0, best_step=2, not_better=1)
    worse = run("a", [3.0, 2.0, 2.5, 2.0, 2.1, 1.0], early_stopping=3)
    resumed = run("b", [2.0, 2.1, 1.0], state=cut, early_stopping=3)
    over = run("c", [], state={**cut, "not_better": 3}, early_stopping=3)
    owing = run("d", [2.2], state={**cut, "not_better": 2, "owes_validation": True}, early_stopping=3)
    answers = dict(answers=[0.1, 0.5, 0.5, 0.4, 0.9], metric="exact-match", eval_samples=1)
    by_answers = run("e", [9.0, 8.0, 7.0, 6.0], early_stopping=2, **answers)
    never = run("f", [float("inf"), None, float("nan"), 1.0], steps=4, early_stopping=0)
    nothing = run("g", [float("inf"), None, 1.0], early_stopping=2)
    return worse, resumed, over, owing, by_answers, never, nothing


def test_early_stopping_ends_a_run_that_goes_on_as_it_was(tmp_path):
    (results,) = run_ranks(early_ends, 1, str(tmp_path))
    worse, resumed, over, owing, by_answers, never, nothing = results
    assert worse[0]["step"] == 5 and worse[0]["not_better"] == 3
    assert (worse[0]["best_loss"], worse[0]["best_step"]) == (2.0, 2)  # an equal one is no better
    saved_last = {"good_step": resumed[0]["good_step"]}  # the first save of a start has none before it
    assert resumed[0] == {**worse[0], **saved_last}
    assert over[0]["step"] == 3 and over[0]["not_better"] == 3
    assert worse[1][-1] == resumed[1][-1] == 5 and over[1] == []
    assert owing[0]["step"] == 3 and owing[0]["not_better"] == 3 and owing[1] == [3]
    assert by_answers[0]["step"] == 4 and by_answers[0]["best_step"] == 2
    assert by_answers[0]["best_value"] == 0.5 and by_answers[0]["best_loss"] is None
    assert never[0]["step"] == 4 and never[0]["best_step"] == 4 and never[0]["not_better"] == 0
    assert nothing[0]["step"] == 2 and nothing[0]["best_step"] is None and nothing[1] == [2]
