"""LoftQ as people would write it: spellings, rounds and scales that cannot be, each one error that says what can."""

import pytest

from sat_lora import ConfigError, LoraConfig

SPELLINGS = ["LoftQ", "loftq ", "loftq_iter_5", "loftq_niter_4", "loftq-5", "LOFTQ", "loft", "qlora", "loftq\n"]
ROUNDS = [0, -1, 1.0, "5", None, True, False, 1001, 10**30, float("nan"), [1], {"loftq_iter": 1}]
ALPHAS = [0, -16, -0.0]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=repr)
def test_a_spelling_that_is_not_known_is_answered_with_all_that_are(spelling):
    with pytest.raises(ConfigError, match="init_lora_weights has to be one of kaiming, .*, olora, loftq, got "):
        LoraConfig(init_lora_weights=spelling)


@pytest.mark.parametrize("rounds", ROUNDS, ids=repr)
def test_rounds_are_a_whole_number(rounds):
    with pytest.raises(ConfigError, match="loftq_iter has to be a whole number from 1 to 1000, got "):
        LoraConfig(init_lora_weights="loftq", loftq_iter=rounds)


@pytest.mark.parametrize("alpha", ALPHAS, ids=repr)
def test_a_scale_that_has_no_root_is_refused(alpha):
    with pytest.raises(ConfigError, match="lora_alpha has to be above 0 for init_lora_weights='loftq'"):
        LoraConfig(init_lora_weights="loftq", lora_alpha=alpha)
    with pytest.raises(ConfigError, match=r"alpha_pattern\['dense'\] has to be above 0 for init_lora_weights='loftq'"):
        LoraConfig(init_lora_weights="loftq", alpha_pattern={"dense": alpha})


def test_pefts_nested_field_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="there is no field 'loftq_config', did you mean 'loftq_iter'"):
        LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
