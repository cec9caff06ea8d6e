"""Kind 8: a pattern of a stranger's adapter, or of one's own, that would be matched for ever is an error soon."""

import signal
import threading
import time

import pytest

from sat_lora.errors import ConfigError
from sat_lora.files import patterns
from sat_lora.files.patterns import LONGEST, matches, pattern_problem
from sat_lora.interop.peft_import import _by_pattern, _regex_problems
from sat_lora.lora.config import LoraConfig

NAME = "model_layers_0_" + "vision_expert_query_key_value_" * 4
ENDLESS = [
    r"(\w+)+#",
    r"(.*)*#",
    r"((a|e|_)*|\w)*\d{3}",
    r"(\w|\w\w)*#",
    r"(\w*)*(\w*)*#",
    r"(?:[a-z0-9_]+[a-z_]*)+$#",
    r"(.+.+.+.+.+.+.+.+)+#",
    r"(?=(\w+)+#).*",
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT", 0.05)
    monkeypatch.setattr(patterns, "_spent", {})


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_would_never_end_is_an_error_that_names_it(pattern):
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ConfigError, match="takes more than 0.05 s to match.*or name the layers") as error:
        matches(pattern, f"x{NAME}")
    assert repr(pattern)[:20] in str(error.value)
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    began = time.process_time()
    with pytest.raises(ConfigError):  # for all names together
        matches(pattern, f"y{NAME}")
    assert time.process_time() - began < 0.04


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        (r"(\w+\.)+q_proj", "model.layers.0.q_proj", True),
        (r"(\w+\.)*(q|k|v)_proj", "model.layers.0.o_proj", False),
        (r".*?(vision|language).*?(attn|mlp).*?(q|k)_proj.*?", "language.layers.3.attn.q_proj", True),
        (r"^(language_model|lm)(?=\.).*\.(q_proj|k_proj)$", "lm.layers.0.q_proj", True),
        (r"model\.layers\.(0|1[0-9]?)\..*", "model.layers.17.mlp.up", True),
    ],
)
def test_what_people_write_is_matched_as_ever(pattern, name, expected):
    assert matches(pattern, name) is expected
    assert patterns._spent == {}


def test_the_patterns_of_a_strangers_peft_adapter_are_bounded():
    assert _regex_problems("(" * 5000 + ")" * 5000) and _regex_problems("a" * (LONGEST + 1))
    with pytest.raises(ConfigError, match="takes more than"):
        _by_pattern({r"(\w+)+#": 4}, NAME, 8)
    assert "has 100001 characters" in pattern_problem("a" * (LONGEST + 1))


def test_our_own_configs_are_bounded_too(tmp_path):
    from sat_lora.lora.targets import select

    config = LoraConfig(target_modules=r"(\w+)+#", rank_pattern={r"(\w+)+#": 4})
    with pytest.raises(ConfigError, match=r"target_modules: the pattern '\(\\\\w\+\)\+#' takes more than"):
        select({NAME: None}, {}, config)
    with pytest.raises(ConfigError, match="takes more than"):
        config.rank_for(NAME)
    with pytest.raises(ConfigError, match="rank_pattern: 'aaaa.* ... has 100001 characters") as error:
        LoraConfig(alpha_pattern={}, rank_pattern={"a" * (LONGEST + 1): 4})
    assert len(str(error.value)) < 400


def test_another_thread_matches_without_the_bound():
    results = []
    thread = threading.Thread(target=lambda: results.append(matches(r"(\w+\.)+q", "a.b.q")))
    thread.start()
    thread.join()
    assert results == [True]
