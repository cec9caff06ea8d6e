"""What docs/peft.md says of PEFT on SAT's layers and models is what the trials give, row by row."""

import json

import pytest

pytest.importorskip("peft")

from benchmarks import peft_on_sat
from tests.support import peft_trials
from tests.support.peft_layers import PeftMixin, linears_of

REPORT = json.loads(peft_on_sat.RESULTS.read_text(encoding="utf-8"))


def assert_as_recorded(outcomes: dict[str, dict], recorded: dict[str, dict]) -> None:
    """The same verdicts and words, and the same errors where PEFT is wrong; what is right may round otherwise."""
    for name, outcome in outcomes.items():
        expected = recorded[name]
        assert (outcome["verdict"], outcome.get("text")) == (expected["verdict"], expected.get("text")), name
        if outcome["verdict"] == "wrong":
            assert outcome["error"] == pytest.approx(expected["error"], rel=1e-3), name


@pytest.mark.parametrize("part", ["layers", "megatron", "models", "files", "hooks"])
def test_one_rank_finds_what_the_page_says(part, single_process_group):
    outcomes = peft_on_sat.on_one_rank(part)
    assert len(outcomes) > 5
    assert_as_recorded(outcomes, REPORT[part])


@pytest.mark.matrix
def test_two_model_parallel_ranks_find_what_the_page_says(single_process_group):
    report = peft_on_sat.run(["split"])
    assert_as_recorded(report["split"], REPORT["split"])
    assert_as_recorded(report["hooks"], REPORT["hooks"])


@pytest.mark.matrix
@pytest.mark.parametrize("stage", peft_on_sat.STAGES)
def test_two_ranks_under_zero_find_what_the_page_says(stage):
    outcomes = {f"{stage}, {name}": outcome for name, outcome in peft_on_sat.under_zero(stage, False).items()}
    outcomes[f"{stage}, branching"] = peft_on_sat.under_zero(stage, True)["training"]
    assert_as_recorded(outcomes, REPORT["zero"])


def test_every_outcome_has_its_row_and_every_row_its_outcome():
    assert {part: {*rows} for part, rows in peft_on_sat.ROWS.items()} == {
        part: {*REPORT[part]} for part in peft_on_sat.ROWS
    }
    assert len(REPORT["hooks"]) == 4 * len(peft_trials.VARIANTS)


@pytest.mark.parametrize("language", peft_on_sat.PAGES)
def test_the_page_shows_the_report(language):
    page = peft_on_sat.PAGES[language].read_text(encoding="utf-8")
    assert peft_on_sat.replace_tables(page, REPORT, language) == page, "python -m benchmarks.peft_on_sat --markdown"
    for name in ("torch", "peft", "SwissArmyTransformer", "deepspeed"):
        assert REPORT["environment"][name].split("+")[0] in page
    with pytest.raises(ValueError, match="no table under"):
        peft_on_sat.replace_tables("", REPORT, language)


def test_timings_are_taken_of_every_variant(single_process_group, capsys):
    report = peft_on_sat.main(["--quick", "--parts", "speed"])["speed"]
    for part, names in (("linears", peft_on_sat.LINEARS), ("steps", peft_on_sat.WHOLE)):
        assert len(report[part]) == len(REPORT["speed"][part])
        assert all(tuple(case) == names for case in report[part].values())
    assert "sat_lora" in capsys.readouterr().out


def test_the_mixin_of_a_tuner_adds_its_parameters_to_the_state_and_no_other(single_process_group):
    model = peft_trials.MODELS["LLaMA"].build()
    before = {*model.state_dict()}
    model.add_mixin("peft", PeftMixin(model, peft_trials.VARIANTS["LoHa"](), linears_of(model)))
    after = {*model.state_dict()}
    assert before < after
    assert all(".hada_" in name for name in after - before)


def test_ranks_that_are_gone_and_ranks_that_wait_are_told_apart():
    gone = "rank 1: the process ended without a word; its output:\nReceived data size doesn't match expected size. Is"
    assert peft_trials.aborted(gone).verdict == peft_trials.ABORTS
    assert peft_trials.aborted("rank 0: no answer; its output:\n...").verdict == peft_trials.HANGS
