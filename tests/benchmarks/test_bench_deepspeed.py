from benchmarks import bench_deepspeed
from tests.support.ranks import run_ranks


def measure():
    return bench_deepspeed.main(["--size", "demo", "--repeats", "2", "--profiled", "1"])


def test_the_parts_of_every_stage_are_found():
    (parts,) = run_ranks(measure, 1)
    assert {"allreduce_gradients", "clip_grad_norm_", "nonfinite_gradients"} <= parts[0].keys()
    for stage in (1, 2):
        assert {"grad_handling_hook", "average_tensor", "get_grad_norm_direct", "nonfinite_gradients"} <= parts[
            stage
        ].keys()
        calls, milliseconds = parts[stage]["grad_handling_hook"]
        assert calls > 50 and milliseconds > 0
