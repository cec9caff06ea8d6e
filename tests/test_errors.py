"""An error carries its problems one by one."""

import pickle

import pytest

from sat_lora import LoraConfig
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.training.settings.lora_options import lora_problems


def test_several_problems_are_one_text_and_stay_several():
    error = ConfigError.of(["a: wrong; b: not meant", "c: wrong"], "LoraConfig: ")
    assert type(error) is ConfigError and str(error) == "LoraConfig: a: wrong; b: not meant; c: wrong"
    assert error.problems == ("a: wrong; b: not meant", "c: wrong")


def test_a_text_alone_is_a_problem():
    assert SatLoraError("nothing there").problems == ("nothing there",)


def test_they_come_through_a_pipe():
    error = pickle.loads(pickle.dumps(ConfigError.of(["a", "b"])))
    assert (str(error), error.problems) == ("a; b", ("a", "b"))


def test_what_a_value_says_parts_no_problem():
    """A value may look like the beginning of the next problem."""
    with pytest.raises(ConfigError) as caught:
        LoraConfig(bias="all; r: 8", r=0)
    bias, rank = sorted(lora_problems(caught.value))
    assert bias.startswith("--bias ") and bias.endswith("got 'all; r: 8'") and rank.startswith("--r ")
