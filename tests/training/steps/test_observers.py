"""Who watches a run is told of everything in a fixed order, and can end or change nothing."""

import pytest

from sat_lora.training.steps.observers import EVENTS, NOBODY, Observer, Observers, StepReport, ValidationReport

CONTENT = {
    "on_start": (9, 0),
    "on_phase": ("data",),
    "on_broken": ([("x.png", "torn", "0")], 1),
    "on_step": (StepReport(step=1, loss=2.0, lr=1e-3),),
    "on_validation": (ValidationReport(step=1, loss=2.0),),
    "on_save": (1, "adapter/1", "checkpoints/1"),
    "on_end": (None,),
}


def recorder(label, record, fails=None):
    """An observer that notes (label, event, content) of all, and then raises what `fails` gives."""

    def method(event):
        def told(self, *content, **place):
            record.append((label, event, content))
            if fails is not None:
                raise fails(event)

        return told

    return type("Recorder", (Observer,), {"name": label, **{event: method(event) for event in EVENTS}})()


def tell_all(observers):
    for event, content in CONTENT.items():
        getattr(observers, event)(*content)


def test_every_event_comes_to_all_in_their_order():
    assert CONTENT.keys() == set(EVENTS)
    record = []
    tell_all(Observers([recorder("a", record), recorder("b", record)]))
    assert record == [(label, event, content) for event, content in CONTENT.items() for label in "ab"]


def test_nobody_may_be_told_of_everything():
    tell_all(NOBODY)
    tell_all(Observer())


@pytest.mark.parametrize("error", [OSError(28, "full"), RuntimeError("a service\nis gone"), MemoryError()])
def test_one_that_fails_is_named_once_and_the_others_are_told(error):
    record, said = [], []
    members = [recorder("first", record), recorder("wandb", record, lambda event: error), recorder("last", record)]
    for _ in range(2):
        observers = Observers(members, said.append)
        for _ in range(3):
            tell_all(observers)
        assert len(said) == 1 and said[0].startswith("warning: wandb cannot be written: ") and "\n" not in said[0]
        assert record == [
            (label, event, content)
            for _ in range(3)
            for event, content in CONTENT.items()
            for label in ("first", "wandb", "last")
        ]
        record.clear()
        said.clear()


def test_one_without_a_name_is_called_by_its_class():
    class Curves(Observer):
        def on_step(self, report):
            raise ConnectionError("refused")

    said = []
    Observers([Curves()], said.append).on_step(CONTENT["on_step"][0])
    assert said == ["warning: Curves cannot be written: refused; the run goes on without it"]


def test_a_screen_that_fails_too_ends_nothing():
    def gone(line):
        raise OSError(5, "gone")

    tell_all(Observers([recorder("a", [], lambda event: OSError(28, "full"))], gone))


@pytest.mark.parametrize("error", [None, ValueError("the real one")])
def test_the_end_of_the_block_is_told_with_its_error_which_comes_out_as_it_is(error):
    record = []
    observers = Observers([recorder("a", record, lambda event: RuntimeError("another"))])
    try:
        with observers:
            if error is not None:
                raise error
    except ValueError as raised:
        assert raised is error
    assert record == [("a", "on_end", (error,))]


def test_ctrl_c_in_an_observer_is_not_swallowed():
    observers = Observers([recorder("a", [], lambda event: KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        observers.on_step(CONTENT["on_step"][0])


def test_who_has_no_method_for_an_event_is_not_called():
    class Ends(Observer):
        def on_end(self, error):
            pass

    observers = Observers([Ends(), Ends()])
    assert {event: len(members) for event, members in observers._members.items() if members} == {"on_end": 2}
