"""The demo on a base in few bits, its adapter on the whole base, and the other way round: what they read."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.support.demo_runs import environment
from tests.support.paths import DEMO
from tests.support.patience import patient


def shares_of_both(folder, held, other, *more):
    """(the share of exact answers on the base held as in training, the same with it held otherwise) of a run of the
    demo; more: further options of the run.
    """
    shutil.copytree(DEMO, folder / "finetune_demo", ignore=shutil.ignore_patterns("__pycache__", "captchas"))

    def done(script, *arguments):
        command = [sys.executable, f"finetune_demo/{script}", *arguments]
        ended = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=patient(700)
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run = folder / "runs" / "demo"
    trained = done("finetune_cogvlm.py", "--quantize", held, "--experiment-name", "demo", *more)
    assert (f", in {held}" in trained) == (held != "none")
    done("evaluate_cogvlm.py", "--run", str(run), "--quantize", other, "--no-base", "--out", str(folder / "other.json"))
    results = [json.loads(file.read_text()) for file in (run / "evaluation.json", folder / "other.json")]
    assert [result["images"] for result in results] == [results[0]["images"]] * 2
    return [exact_share(result) for result in results]


def exact_share(result):
    """The share of test images that the adapter reads right."""
    return result["metrics"]["exact-match"]["adapter"]["value"]


@pytest.mark.matrix
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("held", "other", "bounds"), [("nf4", "none", (0.95, 0.93)), ("none", "nf4", (0.95, 0.93))], ids=str
)
def test_the_demo_reads_on_few_bits_and_its_adapter_on_the_others(held, other, bounds, tmp_path):
    """500 captchas of held-out strings; docs/measured.md has the figures."""
    shares = shares_of_both(tmp_path, held, other)
    assert all(share >= bound for share, bound in zip(shares, bounds)), shares
