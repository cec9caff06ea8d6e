"""The watchdog's trace as an observer of the loop."""

from sat_lora.training.steps.observers import Observer
from sat_lora.watchdog.trace import Trace


class Traced(Observer):
    """An observer that writes each phase down where a watchdog, and whoever looks at a killed run, finds it."""

    name = "the watchdog's trace"

    def __init__(self, trace: Trace):
        self._trace = trace

    def on_phase(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        self._trace.at(phase, step=step, micro_batch=micro_batch)


def traced(trace: Trace | None) -> tuple[Observer, ...]:
    """Return the observer of a trace, as a tuple that is empty where nothing is traced."""
    return () if trace is None else (Traced(trace),)
