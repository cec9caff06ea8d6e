"""The benchmarks run, write what they say they write, and count what an adapter keeps for backward."""

import json

import pytest

pytest.importorskip("peft")

from benchmarks import bench_adapter, bench_step, report
from benchmarks.interleaved import measure, quartiles
from benchmarks.report import write_json
from benchmarks.variants import Shape
from sat_lora.quantized.layers import quantized_weights

ENVIRONMENT = {
    "device",
    "kind",
    "clock",
    "threads",
    "cores",
    "python",
    "torch",
    "SwissArmyTransformer",
    "peft",
    "deepspeed",
}
TOKENS, RANK, FP32 = 24, 4, 4


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("text", ["64x192/3", "64x64", "64x128", "128x64"])
def test_adapter_benchmark(tmp_path, capsys, text, dropout):
    out = tmp_path / "results" / "adapter.json"
    sizes = ["--shapes", text, "--ranks", str(RANK), "--tokens", str(TOKENS), "--dropouts", str(dropout)]
    bench_adapter.main([*sizes, "--device", "cpu", "--dtypes", "fp32", "--repeats", "2", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["environment"].keys() == ENVIRONMENT
    (case,) = written["cases"]
    assert case.keys() == {"shape", "dtype", "rank", "dropout", "tokens", "slots", "variants"}
    fused = {"peft_3r"} if text.endswith("/3") else set()
    assert case["variants"].keys() == {"frozen", "sat_lora", "peft", "lora2"} | fused
    for result in case["variants"].values():
        assert result.keys() == {"seconds", "ratio", "saved_bytes", "saved_per_input"}
        assert result["seconds"] == sorted(result["seconds"]) and min(result["seconds"]) > 0
    shape = Shape.parse(text)
    inputs = TOKENS * shape.in_features  # elements of x
    mask = inputs if dropout else 0  # one byte each
    expected = FP32 * (inputs + TOKENS * shape.slots * RANK) + mask
    assert case["variants"]["frozen"]["saved_bytes"] == 0
    assert case["variants"]["sat_lora"]["saved_bytes"] == expected
    assert case["variants"]["sat_lora"]["saved_per_input"] == expected / (FP32 * inputs)
    assert text in capsys.readouterr().out


def test_step_benchmark(tmp_path, capsys):
    out = tmp_path / "step.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--dtypes", "fp32", "--ranks", str(RANK), "--dropouts", "0"]
    bench_step.main([*arguments, "--repeats", "2", "--markdown", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["environment"].keys() == ENVIRONMENT
    (case,) = written["cases"]
    variants = case["variants"]
    assert variants.keys() == {"frozen", "all-linear", "attention", "lora2"}
    assert all(v.keys() == {"seconds", "ratio", "saved_bytes", "trained", "flops"} for v in variants.values())
    assert variants["frozen"]["trained"] == 0
    assert variants["attention"]["trained"] == variants["lora2"]["trained"] > 0  # the same linears and factors
    assert variants["all-linear"]["trained"] > variants["attention"]["trained"]
    assert variants["frozen"]["saved_bytes"] < variants["attention"]["saved_bytes"]
    assert capsys.readouterr().out.startswith("| dtype | r |")


def test_step_benchmark_with_checkpointing_and_a_profile(tmp_path, capsys):
    out = tmp_path / "step.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--dtypes", "bf16", "--words", "6", "--repeats", "1"]
    case = "all-linear batch=2 dropout=0.05 checkpointing profile"
    bench_step.main([*arguments, "--cases", case, "--out", str(out)])
    written = json.loads(out.read_text())
    (case,) = written["cases"]
    assert (case["batch"], case["dropout"], case["words"], case["checkpointing"]) == (2, 0.05, 6, True)
    assert case["variants"].keys() == {"frozen", "all-linear"}
    assert case["variants"]["all-linear"].keys() == {"seconds", "ratio", "trained", "flops", "kernels"}
    kernels = case["variants"]["all-linear"]["kernels"]
    assert {"product", "attention", "optimizer"} <= kernels["kinds"].keys()
    assert sum(count for _, count in kernels["kinds"].values()) == kernels["kernels"]
    assert written["product"]["bf16"]["flops"] > 0


@pytest.mark.parametrize("is_estimated", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_step_benchmark_on_quantised_linears(tmp_path, monkeypatch, is_estimated):
    """The activations are estimated in a process of their own, which imports all anew."""
    out = tmp_path / "step.json"
    if not is_estimated:
        monkeypatch.setattr(bench_step, "estimated_peak", lambda model, *_: len([*quantized_weights(model)]))
    arguments = ["--size", "tiny", "--device", "cpu", "--dtypes", "bf16", "--words", "6", "--repeats", "1"]
    bench_step.main([*arguments, "--quantize", "nf4", "--cases", "all-linear lora2 checkpointing", "--out", str(out)])
    written = json.loads(out.read_text())
    (case,) = written["cases"]
    assert written["quantize"] == "nf4" and case["variants"].keys() == {"frozen", "all-linear"}
    variant = case["variants"]["all-linear"]
    assert variant.keys() == {"seconds", "ratio", "trained", "flops", "estimated_bytes"}
    trained = 2 * variant["trained"]  # in bfloat16
    assert variant["estimated_bytes"] > (4 * trained if is_estimated else 10)


@pytest.mark.parametrize("name", bench_step.NAMES)
def test_a_variant_comes_and_goes_and_switched_off_is_the_base(name, single_process_group):
    """The variants share their weights: what one leaves behind would be measured with the next."""
    import torch

    config = bench_step.config_of("tiny")
    model = bench_step.build(config, torch.float32, torch.device("cpu"))
    batch = bench_step.batch_of(config, 8, torch.device("cpu"), torch.float32)
    names, frozen = list(model.state_dict()), bench_step.answer_loss_sum(model, batch)
    with bench_step.adapted(model, name, rank=4, dropout=0.0) as variant:
        assert not torch.equal(bench_step.answer_loss_sum(model, batch), frozen)
        variant.switch(False)
        assert torch.equal(bench_step.answer_loss_sum(model, batch), frozen)
        variant.switch(True)
        bench_step.answer_loss_sum(model, batch).backward()
        assert all(parameter.grad is not None for parameter in variant.trained)
        others = [p for p in model.parameters() if all(p is not own for own in variant.trained)]
        assert all(parameter.grad is None for parameter in others)
    assert list(model.state_dict()) == names
    assert torch.equal(bench_step.answer_loss_sum(model, batch), frozen)


def test_flops_are_those_that_torch_counts(single_process_group):
    """torch counts causal attention as whole, the head on all positions, and the patch embedding."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.models import answer_of, forward_flops
    from tests.support.tiny import logits_of

    config, words, samples = bench_step.config_of("tiny"), 8, 2
    model = bench_step.build(config, torch.float32, torch.device("cpu")).eval()
    batch = bench_step.batch_of(config, words, torch.device("cpu"), torch.float32, samples)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        logits_of(model, batch)  # torch does not count the CPU's fused attention
    seq, hidden = config["image_length"] + 2 + words, config["hidden_size"]
    more = config["num_layers"] * 2 * seq**2 * hidden
    more += 2 * (seq - answer_of(words)) * hidden * config["vocab_size"]
    more += 2 * config["image_length"] * 3 * 14 * 14 * config["eva_args"]["hidden_size"]
    assert counter.get_total_flops() == pytest.approx(forward_flops(config, samples, words) + samples * more, rel=1e-6)


@pytest.mark.parametrize("text", ["64x96/3", "64x64/2", "64"])
def test_shapes_that_no_linear_has(text):
    with pytest.raises(ValueError):
        Shape.parse(text)


def test_variants_take_turns():
    import torch

    calls = []
    times = measure({name: lambda name=name: calls.append(name) for name in "abc"}, 3, torch.device("cpu"), warmup=0)
    assert calls == [*"abc", *"bca", *"cab"]
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_report_of_a_file(tmp_path, capsys):
    def variant(ratio):
        return {"seconds": [1.0, 1.0, 1.0], "ratio": [ratio] * 3, "saved_bytes": 8, "saved_per_input": 1.0}

    variants = {"frozen": variant(1.0), "sat_lora": variant(1.05), "peft": variant(1.1), "lora2": variant(1.02)}
    case = {"shape": "64x64", "dtype": "fp32", "rank": 4, "dropout": 0.0, "tokens": 8, "slots": 1}
    file = tmp_path / "adapter.json"
    write_json({"cases": [{**case, "variants": variants}, {**case, "rank": 8, "variants": variants}]}, file)
    report.main([str(file), "--ranks", "4"])
    printed = capsys.readouterr().out
    assert "| 64x64 | 4 |" in printed and "| 64x64 | 8 |" not in printed
    assert "| fp32 | no dropout | lora2 | 0 of 1 |" in printed
    assert "| fp32 | no dropout | peft | 1 of 1 |" in printed
