"""Checkpoints around SAT's `training_main`: loaded before and after the adapters, of adapters and of whole models."""

import gc
import json
from argparse import Namespace
from functools import partial

import pytest
import torch

from sat_lora import AdapterError, LoraMixin, add_lora, load_adapter, save_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.interop import sat_lora2
from sat_lora.lora.apply import adapters_of
from tests.support.ranks import run_ranks
from tests.support.sat_files import write_step
from tests.support.sat_models import SIZES, BaseModel, run_language
from tests.support.sat_subjects import loss_of as loss_of_output
from tests.support.sat_trainer import LORA, difference, loss_of, tiny_cogvlm, train_by_plain_sgd, train_by_sat
from tests.support.tiny import CONFIG, fill_adapters, tiny_model

WITH_BASE = {
    "PiSSA": dict(init_lora_weights="pissa"),
    "OLoRA": dict(init_lora_weights="olora"),
    "DoRA": dict(use_dora=True),
    "whole modules": dict(modules_to_save=("boi", "linear_proj")),
}


def load_by_sat(model, folder, mode="finetune"):
    from sat.training.model_io import load_checkpoint

    return load_checkpoint(model, Namespace(mode=mode, load=str(folder), force_train=False))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A SAT folder of the plain model, of other weights than `tiny_model()` has."""
    folder = tmp_path_factory.mktemp("sat") / "base"
    write_step(folder, {"module": tiny_model(seed=1).state_dict()})
    return folder


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("case", WITH_BASE)
def test_a_base_that_is_loaded_afterwards_is_what_adapters_begin_over(case, base):
    """Those of the ViT too, whose mixin SAT does not know of."""
    model, expected = tiny_model(), tiny_model(seed=1)
    add_lora(model, r=4, **WITH_BASE[case])
    load_by_sat(model, base)
    add_lora(expected, r=4, **WITH_BASE[case])
    for name, adapter in adapters_of(expected).items():
        for leaf, tensor in adapter.state_dict().items():
            assert torch.equal(adapters_of(model)[name].state_dict()[leaf], tensor), (name, leaf)
    for owner in (model, model.mixins["eva"].vit_model):
        if "lora" in owner.mixins:
            owner.del_mixin("lora")  # brings back the originals of what would have trained whole
    gc.collect()
    values = model.state_dict()
    assert all(torch.equal(values[name], tensor) for name, tensor in tiny_model(seed=1).state_dict().items())


@pytest.mark.usefixtures("single_process_group")
def test_loading_a_base_leaves_trained_adapters_alone(base):
    model = tiny_model()
    add_lora(model, r=4, use_dora=True)
    fill_adapters(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(tiny_model(seed=1).state_dict(), strict=False)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


@pytest.mark.usefixtures("single_process_group")
def test_a_checkpoint_with_adapters_brings_theirs(base):
    model, other = tiny_model(seed=1), tiny_model()
    for m in (model, other):
        add_lora(m, r=4, init_lora_weights="pissa")
    fill_adapters(model)
    other.load_state_dict(model.state_dict())  # strict: what the checkpoint says of a mixin is none of its tensors
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def through_the_trainer(folder, base):
    """Runs in a row: {what: Run}."""
    runs = {}

    def train(name, build=tiny_cogvlm, **settings):
        runs[name] = train_by_sat(f"{folder}/{name}", build, **settings)
        return runs[name]

    first = train("first", steps=2, stage=3)
    options = ["--load", str(first.save), "--mode", "pretrain"]
    runs["gone on with"] = train_by_sat(f"{folder}/first", steps=4, stage=3, options=options)
    train("DoRA over a base", over_another_base, steps=1, options=["--load", base])
    train("lora2", with_lora2, steps=2, options=["--load", base])
    train("a class", class_of_model, steps=2, stage=2, loss=loss_of_language)
    both_at_once = ["--checkpoint-activations", "--checkpoint-num-layers", "2"]
    train("a class, recomputed", class_of_model, steps=2, stage=2, loss=loss_of_language, options=both_at_once)
    return runs


def over_another_base(args):
    model = tiny_model()
    add_lora(model, r=4, use_dora=True)
    return model


def with_lora2(args=None, seed=0):
    model = tiny_model(seed=seed)
    model.add_mixin("lora", sat_lora2.LoraMixin(2, r=4), reinit=True)
    if args is None:
        model.disable_untrainable_params()
    return model


class Tuned(BaseModel):
    """As scripts that give `training_main` their class have it."""

    def __init__(self, args, **kw_args):
        super().__init__(args, **kw_args)
        self.add_mixin("lora", LoraMixin(self, r=4))


def class_of_model(args):
    vars(args).update(SIZES)
    return Tuned


def loss_of_language(model, seed):
    return loss_of_output(run_language(model))


@pytest.mark.usefixtures("single_process_group")
def test_runs_begin_with_what_is_loaded_and_go_on(base, tmp_path):
    (runs,) = run_ranks(through_the_trainer, 1, str(tmp_path), str(base))
    first, more = runs["first"], runs["gone on with"]
    assert first.changed == more.changed == []
    assert more.save == first.save and len(more.seeds) == 2
    assert sorted(path.name for path in first.save.iterdir()) == ["2", "4", "latest", "model_config.json"]
    assert difference(more.adapter, {n: t.numpy() for n, t in read_adapter(first.save / "4").tensors.items()}) == 0
    plain = train_by_plain_sgd(tiny_cogvlm, [[seed] for seed in (*first.seeds, *more.seeds)])
    assert difference(more.adapter, plain) < 1e-5
    expected = float(loss_of(tiny_model(seed=1), runs["DoRA over a base"].seeds[0]))
    assert runs["DoRA over a base"].losses == pytest.approx([expected], rel=1e-6)
    lora2 = runs["lora2"]
    assert len(lora2.trained) == 8
    expected = train_by_plain_sgd(partial(with_lora2, seed=1), [[seed] for seed in lora2.seeds])
    assert difference(lora2.adapter, expected) < 1e-5
    assert "stay frozen" in lora2.warnings[0]  # this class freezes nothing by itself
    assert len(runs["a class"].trained) == 16 and len(read_adapter(runs["a class"].save).layers) == 8
    assert difference(runs["a class"].adapter, runs["a class, recomputed"].adapter) == 0


def engine_after_engine(folder, mp_size):
    """Runs of one process: at ZeRO-3, on from its save at ZeRO-3, and in bf16 at ZeRO-2 after both."""
    first = train_by_sat(f"{folder}/first", stage=3, mp_size=mp_size, steps=2)
    options = ["--load", str(first.save), "--mode", "pretrain"]
    more = train_by_sat(f"{folder}/first", stage=3, mp_size=mp_size, steps=4, options=options)
    half = train_by_sat(
        f"{folder}/half",
        partial(tiny_cogvlm, dtype=torch.bfloat16),
        stage=2,
        mp_size=mp_size,
        steps=2,
        engine={"bf16": {"enabled": True}},
    )
    return first, more, half


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks, mp_size", [(2, 1), (2, 2), (4, 2)])
@pytest.mark.usefixtures("single_process_group")
def test_a_run_goes_on_from_a_save_at_zero_3_and_another_engine_follows(ranks, mp_size, tmp_path):
    outcomes = run_ranks(engine_after_engine, ranks, str(tmp_path), mp_size, timeout=250)
    models = outcomes[::mp_size]  # the ranks of one share their batches
    seeds = [step for number in (0, 1) for step in zip(*(runs[number].seeds for runs in models))]
    first, more, half = outcomes[0]
    assert more.save == first.save and len(seeds) == 4
    assert difference(more.adapter, train_by_plain_sgd(tiny_cogvlm, seeds)) < 1e-5
    assert half.losses == pytest.approx(first.losses, rel=0.05) and half.changed == []

    options = ["--load", str(first.save), "--mode", "pretrain"]  # on one rank, whatever number of them saved
    (alone,) = run_ranks(partial(train_by_sat, steps=5, options=options), 1, str(tmp_path / "first"))
    alone_seeds = [[seed] for seed in alone.seeds]
    assert difference(alone.adapter, train_by_plain_sgd(tiny_cogvlm, [*seeds, *alone_seeds])) < 1e-5


def whole_model_runs(folder):
    """A run without `adapter_checkpoints` on model-parallel ranks, and one that begins with what it saved."""
    options = ["--no-save-rng"]  # torch 2.6 and later do not load what SAT 0.4.12 saves of numpy
    run = train_by_sat(f"{folder}/whole", stage=2, mp_size=2, steps=2, options=options, adapters_alone=False)
    more = train_by_sat(f"{folder}/more", unfilled, mp_size=2, steps=1, options=["--load", str(run.save)])
    return run, more


def unfilled(args):
    model = tiny_model(model_parallel_size=2, seed=3)
    add_lora(model, LORA)
    return model


@pytest.mark.usefixtures("single_process_group")
def test_a_whole_model_that_sat_has_saved_is_read_as_an_adapter_and_loaded_again(tmp_path, capsys):
    (run, more), _ = run_ranks(whole_model_runs, 2, str(tmp_path))
    files = sorted(path.name for path in (run.save / "2").iterdir())
    assert files == ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]  # as SAT does it
    tensors = read_adapter(run.save).tensors
    assert difference({name: tensor.numpy() for name, tensor in tensors.items()}, run.adapter) == 0
    expected = train_by_plain_sgd(tiny_cogvlm, [[seed] for seed in (*run.seeds, *more.seeds)])
    assert difference(more.adapter, expected) < 1e-5
    assert main(["inspect", str(run.save), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["r"] == 4


FIELDS = {
    "plain": dict(rank_pattern={"dense": 2}),
    "PiSSA": dict(init_lora_weights="pissa", use_rslora=True),
    "DoRA": dict(use_dora=True, qkv_slots="qv", modules_to_save=("boi", "linear_proj")),
}


def both_folders(tmp_path, fields):
    """An adapter as its own folder, and in a whole model as SAT saves it."""
    save_weights(tmp_path / "base", CONFIG, tiny_model().state_dict())
    model = tiny_model()
    add_lora(model, r=4, lora_alpha=8, **fields)
    fill_adapters(model, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    write_step(tmp_path / "whole", {"module": model.state_dict()})
    return tmp_path / "adapter", tmp_path / "whole"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.filterwarnings("ignore:LoRA rank")
@pytest.mark.parametrize("case", FIELDS)
def test_merge_export_and_inspect_take_a_whole_model_for_its_adapter(case, tmp_path, capsys):
    folders = both_folders(tmp_path, FIELDS[case])
    alone, inside = (read_adapter(folder) for folder in folders)
    assert (alone.config, alone.layers, sorted(alone.trained)) == (inside.config, inside.layers, sorted(inside.trained))
    assert alone.base_fingerprint == inside.base_fingerprint
    reports = []
    for folder in folders:
        base, out = ["--base", str(tmp_path / "base")], ["--out", f"{folder}-"]
        assert main(["merge", "--adapter", str(folder), *base, *out[:1], f"{folder}-merged"]) == 0
        if case != "DoRA":
            assert main(["export", "--to", "peft", "--adapter", str(folder), *base, *out[:1], f"{folder}-peft"]) == 0
        capsys.readouterr()
        assert main(["inspect", str(folder), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
        for key in ("path", "bytes", "base"):
            del reports[-1][key]
    assert reports[0] == reports[1]
    for made in ("merged", *(["peft"] if case != "DoRA" else [])):
        alone, inside = (content(folder.with_name(f"{folder.name}-{made}")) for folder in folders)
        assert alone.keys() == inside.keys()
        weights = [name for name in alone if name.endswith((".pt", ".safetensors"))]
        assert weights and all(alone[name] == inside[name] for name in weights)


@pytest.mark.usefixtures("single_process_group")
def test_a_whole_model_of_before_says_what_it_lacks_and_comes_in_by_import(tmp_path, capsys):
    adapter, whole = both_folders(tmp_path, {})
    file = whole / "3000" / "mp_rank_00_model_states.pt"
    state = torch.load(file)["module"]
    torch.save({"module": {name: t for name, t in state.items() if not name.endswith("description")}}, file)
    with pytest.raises(AdapterError, match="kept no lora_alpha beside the adapter: `sat-lora import --from sat"):
        read_adapter(whole)
    arguments = ["import", "--from", "sat", str(whole), "--lora-alpha", "8", "--out", str(tmp_path / "made")]
    assert main(arguments) == 0
    expected, made = read_adapter(adapter), read_adapter(tmp_path / "made")
    assert expected.layers == made.layers and expected.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in expected.tensors.items())
    load_adapter(tiny_model(), tmp_path / "made")
    assert main(arguments) == 2 and "exists" in capsys.readouterr().err
    other = ["import", "--from", "sat", str(tmp_path / "base"), "--out", str(tmp_path / "none")]
    assert main(other) == 2 and "no LoRA mixin called 'lora' is in it" in capsys.readouterr().err


@pytest.mark.usefixtures("single_process_group")
def test_a_whole_model_with_adapters_is_no_base(tmp_path, capsys):
    adapter, whole = both_folders(tmp_path, {})
    (whole / "model_config.json").write_text(json.dumps(CONFIG))
    assert main(["merge", "--adapter", str(adapter), "--base", str(whole), "--out", str(tmp_path / "out")]) == 2
    assert "has LoRA of sat_lora in it" in capsys.readouterr().err
