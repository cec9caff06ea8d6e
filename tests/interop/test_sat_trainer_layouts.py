"""SAT's `training_main` at each ZeRO stage, model-parallel size and precision: plain SGD's adapter, and no more."""

from functools import partial

import pytest
import torch

from sat_lora import LoraConfig
from sat_lora.adapters.read import read_adapter
from tests.support.ranks import run_ranks
from tests.support.sat_trainer import (
    STEPS,
    difference,
    loss_of,
    tiny_cogvlm,
    train_by_plain_sgd,
    train_by_sat,
    trained_by_plain_sgd,
)

HALF = {"bf16": (torch.bfloat16, 0.05), "fp16": (torch.float16, 0.01)}
"""(dtype, how far a loss may be off, relative)"""
EARLY = 2  # steps: by the fifth, what is rounded off has grown with the loss's curvature to as much as the way itself
SAVED_EARLY = ["--save-interval", str(EARLY)]
BOTH = ["--checkpoint-activations"]  # of the language model, and of the ViT by `tiny_cogvlm` unless ONE says otherwise
ONE = {"ZeRO 2, checkpointing the language model": False, "ZeRO 2, checkpointing the ViT": True}  # the ViT's
EVALUATION = "--valid-data v --eval-interval 2 --eval-iters 2 --eval-batch-size 1 --test-data t --log-interval 1"
CASES = {
    "ZeRO 1": dict(stage=1),
    "ZeRO 2, checkpointing": dict(stage=2, options=BOTH),
    "ZeRO 2, checkpointing the language model": dict(stage=2, options=BOTH),
    "ZeRO 2, checkpointing the ViT": dict(stage=2),
    "evaluation": dict(stage=2, options=EVALUATION.split()),
    "bf16": dict(stage=2, engine={"bf16": {"enabled": True}}, options=SAVED_EARLY),
    "ZeRO 0": dict(stage=0),
    "fp16": dict(stage=2, engine={"fp16": {"enabled": True, "initial_scale_power": 8}}, options=SAVED_EARLY),
    "ZeRO 3": dict(stage=3),
    "ZeRO 3, checkpointing": dict(stage=3, options=BOTH),
    "bf16, ZeRO 3": dict(stage=3, engine={"bf16": {"enabled": True}}, options=SAVED_EARLY),
    "fp16, ZeRO 3": dict(stage=3, engine={"fp16": {"enabled": True, "initial_scale_power": 8}}, options=SAVED_EARLY),
}
MOST = ["ZeRO 1", "ZeRO 2, checkpointing", "evaluation", "bf16", "fp16", "ZeRO 3"]


def in_half(args, name):
    return tiny_cogvlm(args, HALF[name][0])


def half_of(name):
    return next((half for half in HALF if half in name), None)


def builder(name):
    half = half_of(name)
    if name in ONE:
        return partial(tiny_cogvlm, vit_checkpoint=ONE[name])
    return tiny_cogvlm if half is None else lambda args: in_half(args, half)


def runs_of(folder, mp_size, names):
    return {
        name: train_by_sat(f"{folder}/{number}", builder(name), mp_size=mp_size, **CASES[name])
        for number, name in enumerate(names)
    }


def in_a_row(values):
    """All of an adapter in one row of float64."""
    return torch.cat([torch.as_tensor(values[name]).double().flatten() for name in sorted(values)])


def distance_by_rounding(adapter, start, plain, dtype):
    """How far `adapter` is from where plain SGD leads from `start`, in times of what rounding that alone takes away."""
    first, last = (in_a_row(values) for values in (start, plain))
    exact = first.to(dtype).double() + (last - first)
    return float((in_a_row(adapter) - exact).norm() / (exact.to(dtype).double() - exact).norm())


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize(
    "ranks, mp_size, names",
    [
        (1, 1, MOST),
        pytest.param(2, 2, [*CASES], marks=[pytest.mark.matrix, pytest.mark.timeout(300)]),
        pytest.param(2, 1, [*CASES], marks=[pytest.mark.matrix, pytest.mark.timeout(300)]),
        pytest.param(4, 2, [*CASES], marks=[pytest.mark.matrix, pytest.mark.timeout(600)]),
    ],
)
def test_in_every_layout_the_adapter_is_that_of_plain_sgd_and_the_base_stays(ranks, mp_size, names, tmp_path):
    outcomes = run_ranks(runs_of, ranks, str(tmp_path), mp_size, names, timeout=125 * ranks)
    # The ranks of one model share a batch, those of several have each its own.
    seeds = list(zip(*(outcome["ZeRO 1"].seeds for outcome in outcomes[::mp_size])))
    start, early, plain = (train_by_plain_sgd(tiny_cogvlm, seeds[:steps]) for steps in (0, EARLY, STEPS))
    expected = outcomes[0]["ZeRO 1"]
    for name in names:
        runs = [outcome[name] for outcome in outcomes]
        run = runs[0]
        assert all(r.changed == [] and r.warnings == [] for r in runs), name
        assert [(r.seeds, len(r.trained)) for r in runs] == [(o["ZeRO 1"].seeds, 64) for o in outcomes], name
        saved = read_adapter(run.save).tensors
        assert saved.keys() == plain.keys()
        tensor_bytes = sum(tensor.nbytes for tensor in saved.values())
        size = sum(path.stat().st_size for path in run.save.rglob("*") if path.is_file())
        assert size < (tensor_bytes + 2**16) * sum(path.is_dir() for path in run.save.iterdir())
        half = half_of(name)
        if half is None:
            assert difference(run.adapter, plain) < 1e-5, name
        else:
            dtype, tolerance = HALF[half]
            assert {tensor.dtype for tensor in saved.values()} == {dtype}
            assert run.losses == pytest.approx(expected.losses, rel=tolerance)
            saved_early = read_adapter(run.save / str(EARLY)).tensors
            assert distance_by_rounding(saved_early, start, early, dtype) < 1.5, name  # untrained it is 1.9 and more
    if "evaluation" in names:
        evaluated = outcomes[0]["evaluation"].evaluated  # twice two of validation, and two of the test at the end
        assert [step for step, _, _ in evaluated] == [2, 2, 4, 4, 5, 5]
        for step, seed, loss in evaluated:
            model = trained_by_plain_sgd(tiny_cogvlm, seeds[:step]).eval()
            assert loss == pytest.approx(float(loss_of(model, seed).detach()), rel=1e-5)


DECAY = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}}}


def of_all_groups(args):
    fields = dict(lr_ratio=4, bias="lora_only", modules_to_save=("boi",), use_dora=True)
    return tiny_cogvlm(args, lora=LoraConfig(r=4, **fields))


def test_rates_and_weight_decay_are_by_sats_groups(tmp_path):
    (run,) = run_ranks(train_by_sat, 1, str(tmp_path), of_all_groups, steps=1, engine=DECAY)
    assert run.changed == []
    groups = {(round(rate / 5e-5), decay): numbers for rate, decay, numbers in run.rates}
    assert groups.keys() == {(1, 0.1), (4, 0.1), (1, 0.0)}
    of_b = sum(values.size for name, values in run.adapter.items() if name.endswith(".lora_B"))
    biases = [name for name in run.trained if name.endswith(".bias")]
    assert groups[4, 0.1] == of_b and len(biases) == 8 and groups[1, 0.0] == 2 * (3 * 48 + 48 + 72 + 48)
