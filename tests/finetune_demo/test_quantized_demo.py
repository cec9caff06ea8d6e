"""The demo on a base in few bits, and its adapter on the whole base: what they read."""

import json

import pytest

from tests.support.demo_runs import copied_demo


def exact_share(file):
    """The share of test images that the adapter reads right, of an evaluation of all of them."""
    result = json.loads(file.read_text())
    assert result["images"] == 500
    return result["metrics"]["exact-match"]["adapter"]["value"]


@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_the_demo_reads_on_few_bits_and_its_adapter_on_the_whole_base(tmp_path):
    """500 captchas of held-out strings; docs/measured.md has the figures. The other way round is in
    tests/docs/test_commands.py, after the demo itself.
    """
    output_of = copied_demo(tmp_path)
    run = tmp_path / "runs" / "demo"
    assert ", in nf4" in output_of("finetune_cogvlm.py", "--quantize", "nf4", "--experiment-name", "demo")
    whole = tmp_path / "whole.json"
    output_of("evaluate_cogvlm.py", "--run", run, "--quantize", "none", "--no-base", "--out", whole)
    assert exact_share(run / "evaluation.json") >= 0.95 and exact_share(whole) >= 0.93
