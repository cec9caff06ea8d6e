"""finetune_demo/with_sat_trainer.py as it is started: on a GPU SAT's trainer runs without the layer for the CPU."""

import re
import subprocess
import sys

import pytest

from benchmarks.bench_run import alone
from sat_lora.adapters.read import read_adapter
from tests.support.paths import DEMO
from tests.support.patience import patient

LIMIT = 200


@pytest.mark.timeout(LIMIT + 30)
def test_the_example_trains_by_sats_own_loop(device_of_long_test, captchas, tmp_path):
    environment = alone() | {"OMP_NUM_THREADS": "1"}
    if device_of_long_test.type == "cpu":
        environment |= dict(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    few = (
        "--train-iters 20 --save-interval 10 --eval-interval 20 --eval-iters 1 --log-interval 5 --num-workers 0".split()
    )
    data = ["--train-data", f"{captchas}/train", "--valid-data", f"{captchas}/valid", "--save", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(DEMO / "with_sat_trainer.py"), *data, *few],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patient(LIMIT),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    losses = [float(text) for text in re.findall(r"total loss (\S+) \|", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    (run,) = tmp_path.iterdir()
    steps = [read_adapter(run / step).tensors for step in ("10", "20")]
    assert all(tensor.isfinite().all() for tensor in steps[1].values())
    assert any(not tensor.equal(steps[0][name]) for name, tensor in steps[1].items())
