"""The demo on a base in few bits, its adapter on the whole base, and the other way round: what they read."""

import json

import pytest

from tests.support.demo_runs import copied_demo


def shares_of_both(folder, held, other, *more):
    """(the share of exact answers on the base held as in training, the same with it held otherwise) of a run of the
    demo; more: further options of the run.
    """
    output_of = copied_demo(folder)
    run = folder / "runs" / "demo"
    trained = output_of("finetune_cogvlm.py", "--quantize", held, "--experiment-name", "demo", *more)
    assert (f", in {held}" in trained) == (held != "none")
    other_json = folder / "other.json"
    output_of("evaluate_cogvlm.py", "--run", run, "--quantize", other, "--no-base", "--out", other_json)
    results = [json.loads(file.read_text()) for file in (run / "evaluation.json", other_json)]
    assert [result["images"] for result in results] == [results[0]["images"]] * 2
    return [exact_share(result) for result in results]


def exact_share(result):
    """The share of test images that the adapter reads right."""
    return result["metrics"]["exact-match"]["adapter"]["value"]


@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_the_demo_reads_on_few_bits_and_its_adapter_on_the_whole_base(tmp_path):
    """500 captchas of held-out strings; docs/measured.md has the figures. The other way round is in
    tests/docs/test_commands.py, after the demo itself.
    """
    in_few_bits, whole = shares_of_both(tmp_path, "nf4", "none")
    assert in_few_bits >= 0.95 and whole >= 0.93
