"""Every variant cut over two model-parallel ranks, and under ZeRO, is the variant in one process."""

import pytest
import torch

from sat_lora import add_lora, load_adapter, save_adapter
from sat_lora.adapters.format import WEIGHTS
from sat_lora.adapters.read import read_adapter
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import over_model_parallel, sharding_of
from sat_lora.training.steps.engine import start_engine
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, mixed_batch, sgd, step_together, worst_error

EVERYTHING = ["all-linear", "lm-head", "patch-embedding"]
VARIANTS = {
    "embeddings too": dict(target_modules=[*EVERYTHING, "word_embeddings", "position_embeddings"]),
    "dora": dict(use_dora=True),
    "dora, q and v": dict(use_dora=True, qkv_slots="qv", use_rslora=True),
    "pissa": dict(init_lora_weights="pissa"),
    "randomised pissa": dict(init_lora_weights="pissa_niter_4"),
    "dora with olora": dict(init_lora_weights="olora", use_dora=True),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "gaussian, A frozen": dict(init_lora_weights="gaussian", freeze_a=True),
    "parameters whole": dict(modules_to_save=["linear_proj", "boi", "lm_head", "gate_proj.1"], bias="all"),
    "biases of the adapted": dict(target_modules=["vit-mlp", "vit-attention"], bias="lora_only"),
}


def adapted(fields, dtype=torch.float64, **settings):
    model = tiny_model(dtype, **settings)
    add_lora(model, **{"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING, **fields})
    return model


def whole_gradients(model):
    """By name, as numpy arrays, of every adapter parameter and every base parameter that trains."""
    found = {}
    for name, adapter in adapters_of(model).items():
        for leaf, p in adapter.named_parameters():
            if p.requires_grad:
                found[f"{name}.{leaf}"] = over_model_parallel(p.grad, adapter.shardings[leaf]).numpy()
    for mixin in lora_mixins(model).values():
        for name, p in mixin.trained.tensors.items():
            found[name] = over_model_parallel(p.grad, mixin.trained.shardings[name]).numpy()
    return found


def in_one_layout(variant, model_parallel, folder):
    """(logits, gradients, merged logits, merged weights), whole, in float64; FOLDER gets the beginning in float32."""
    init_model_parallel(init_distributed(), model_parallel)
    save_adapter(adapted(VARIANTS[variant], torch.float32, model_parallel_size=model_parallel), folder)
    model = adapted(VARIANTS[variant], model_parallel_size=model_parallel)
    fill_adapters(model)
    batch = tiny_batch()
    batch["images"] = batch["images"].double()
    logits = logits_of(model.train(), batch)
    (logits.pow(2).mean()).backward()
    mixins = lora_mixins(model).values()
    for mixin in mixins:
        mixin.merge()
    with torch.no_grad():
        merged_logits = logits_of(model.eval(), batch).numpy()
        merged = {}
        for name, adapter in adapters_of(model).items():
            layer = adapter.target.site.module
            merged[name] = over_model_parallel(layer.weight, sharding_of(layer, "weight")).clone().numpy()
    return logits.detach().numpy(), whole_gradients(model), merged_logits, merged


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_model_parallel_ranks_equal_one_process(variant, tmp_path):
    (alone,) = run_ranks(in_one_layout, 1, variant, 1, str(tmp_path / "one"))
    for rank in run_ranks(in_one_layout, 2, variant, 2, str(tmp_path / "two")):
        for got, expected in zip(rank, alone):
            got, expected = (x if isinstance(x, dict) else {"": x} for x in (got, expected))
            # SAT's RMSNorm computes its variance in float32
            assert worst_error(got, expected) < 1e-6
    one, two = (read_adapter(tmp_path / name) for name in ("one", "two"))
    assert one.config == two.config and one.layers == two.layers and one.trained == two.trained
    assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def stored(parameter):
    """What this rank holds of it, partitioned by ZeRO-3 or not."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def three_steps(variant, stage, model_parallel, folder):
    """Plain SGD, then the adapter file and, merged in place under the engine, the logits."""
    world = init_model_parallel(init_distributed(), model_parallel)
    model = adapted(VARIANTS[variant], torch.float32, model_parallel_size=model_parallel)
    fill_adapters(model, std=0.1)
    engine = start_engine(model.train(), sgd(model, 0.05), engine_config(stage, 2))
    for step in range(3):
        step_together(engine, [mixed_batch(world.data_parallel_rank, step)], world)
    save_adapter(engine.module, folder)
    before = [stored(p).clone() for p in engine.module.parameters()]
    with torch.no_grad():
        logits = logits_of(engine.module.eval(), tiny_batch())
        for mixin in lora_mixins(engine.module).values():
            mixin.merge()
        merged = logits_of(engine.module, tiny_batch())
        for mixin in lora_mixins(engine.module).values():
            mixin.unmerge()
    assert (merged - logits).abs().max() < 1e-4 * logits.abs().max()
    assert all(torch.equal(stored(p), q) for p, q in zip(engine.module.parameters(), before)), "unmerging left a trace"
    return logits.numpy()


@pytest.mark.parametrize(
    "variant",
    [
        "dora",
        *(pytest.param(one, marks=pytest.mark.matrix) for one in ("parameters whole", "embeddings too", "pissa")),
    ],
)
def test_zero_3_trains_saves_and_merges_as_zero_0(variant, tmp_path):
    plain = run_ranks(three_steps, 2, variant, 0, 1, str(tmp_path / "0"))[0]
    partitioned = run_ranks(three_steps, 2, variant, 3, 1, str(tmp_path / "3"))[0]
    assert abs(partitioned - plain).max() < 1e-4 * abs(plain).max()
    saved = [{k: t.numpy() for k, t in read_adapter(tmp_path / stage).tensors.items()} for stage in ("0", "3")]
    assert worst_error(saved[1], saved[0]) < 1e-4
    assert loaded_logits(tmp_path / "3") == pytest.approx(partitioned, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("variant", ["parameters whole", pytest.param("dora", marks=pytest.mark.matrix)])
def test_zero_3_with_model_parallelism_trains_saves_and_merges(variant, tmp_path):
    one = run_ranks(three_steps, 1, variant, 0, 1, str(tmp_path / "one"))[0]
    for two in run_ranks(three_steps, 2, variant, 3, 2, str(tmp_path / "two")):
        assert abs(two - one).max() < 1e-4 * abs(one).max()


def loaded_logits(folder):
    return run_ranks(load_and_run, 1, str(folder))[0]


def load_and_run(folder):
    init_model_parallel(init_distributed())
    model = tiny_model().eval()
    load_adapter(model, folder)
    with torch.no_grad():
        return logits_of(model, tiny_batch()).numpy()
