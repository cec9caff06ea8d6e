"""What is logged of a step, and what TensorBoard reads of it."""

FIGURES = dict(lr=1e-3, grad_norm=0.5, samples_per_second=10.0, peak_memory_mib=100.0)


def scalars(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in tags}
