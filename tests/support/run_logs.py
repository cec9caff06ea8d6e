"""What is logged of a step, and what TensorBoard reads of it."""

from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.observers import Figures, Observers, StepReport, ValidationReport

FIGURES = dict(lr=1e-3, grad_norm=0.5, samples_per_second=10.0, peak_memory_mib=100.0)


def logs_of(run: RunFolder) -> Observers:
    """The logs of a run folder, as a run tells them; as a context, they are closed at its end."""
    return Observers(run.observers, run.say)


def logged(step, *, loss, **changes) -> StepReport:
    """The report of a step that is logged with FIGURES, but for the changes."""
    figures = {**FIGURES, **changes}
    return StepReport(step=step, loss=loss, lr=figures.pop("lr"), figures=Figures(**figures))


def validated(step, loss, **metrics) -> ValidationReport:
    return ValidationReport(step=step, loss=loss, metrics=metrics)


def scalars(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in tags}
