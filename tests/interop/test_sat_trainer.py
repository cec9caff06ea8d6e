"""SAT's own `training_main` with our mixin in it: what trains, what is saved, and the same adapter as plain SGD."""

import json
import re
import sys
import types

import pytest
import torch

from sat_lora import ConfigError, LoraConfig, adapter_checkpoints, add_lora
from sat_lora._sat_on_cpu import sat_on_cpu
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.lora.base_parameters import TrainedSet, keep_trained_set
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from tests.support.demo_runs import copied_demo
from tests.support.paths import DEMO, TINY_BASE
from tests.support.ranks import run_ranks
from tests.support.sat_models import EncoderDecoderModel, encoder_decoder, settings
from tests.support.sat_trainer import (
    LORA,
    STEPS,
    difference,
    tiny_cogvlm,
    train_by_our_loop,
    train_by_plain_sgd,
    train_by_sat,
)
from tests.support.scripts import load_script
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config


def five_steps(folder, mp_size, stages):
    """SAT's run at each stage, and the adapter of our own loop after it."""
    outcomes = {}
    for stage in stages:
        run = train_by_sat(f"{folder}/{stage}", stage=stage, mp_size=mp_size)
        outcomes[stage] = run, train_by_our_loop(run.seeds, stage=stage, mp_size=mp_size)
    return outcomes


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("mp_size", [1, 2])
def test_five_steps_of_sats_trainer_are_those_of_our_loop_and_of_plain_sgd(tmp_path, mp_size):
    outcomes = run_ranks(five_steps, mp_size, str(tmp_path), mp_size, [0, 2])
    (seeds,) = {tuple(run.seeds) for outcome in outcomes for run, _ in outcome.values()}
    assert len(seeds) == STEPS  # one order at every stage, and model-parallel ranks share batches
    plain = train_by_plain_sgd(tiny_cogvlm, [[seed] for seed in seeds])
    for stage in (0, 2):
        runs = [outcome[stage][0] for outcome in outcomes]
        assert all(run.changed == [] and run.warnings == [] for run in runs)
        run, ours = outcomes[0][stage]
        assert difference(run.adapter, ours) < 1e-5
        assert difference(run.adapter, plain) < 1e-5
        (save,) = {run.save for run in runs}
        assert sorted(path.name for path in save.iterdir()) == [str(STEPS), "latest", "model_config.json"]
        assert (save / "latest").read_text().strip() == str(STEPS)
        files = sorted(path.name for path in (save / str(STEPS)).iterdir())
        assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        saved = read_adapter(save).tensors  # by its pointer
        assert difference({name: tensor.numpy() for name, tensor in saved.items()}, run.adapter) == 0
        tensor_bytes = sum(tensor.nbytes for tensor in saved.values())
        assert sum(path.stat().st_size for path in save.rglob("*") if path.is_file()) < tensor_bytes + 2**16


class Unfreezes:
    """What a script sets on the model itself, after it has added LoRA."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        self.model.mixins["eva"].boi.requires_grad_(True)


def unfreezing(args):
    model = tiny_cogvlm(args)
    model.disable_untrainable_params = Unfreezes(model)
    return model


def test_a_script_that_unfreezes_more_is_told_and_trains_the_adapter_alone(runs_of_one_rank):
    run = runs_of_one_rank[0]
    assert run.changed == [] and not any("boi" in name for name in run.trained)
    (warning,) = [warning for warning in run.warnings if "disable_untrainable_params" in warning]
    assert "leaves 1 parameters trainable" in warning and "mixins.eva.boi" in warning


@pytest.mark.usefixtures("single_process_group")
def test_so_it_is_in_a_model_of_two_halves():
    class Script(EncoderDecoderModel):
        def disable_untrainable_params(self):
            super().disable_untrainable_params()
            for name, parameter in self.named_parameters():
                if "final_layernorm" in name:
                    parameter.requires_grad_(True)

    model = encoder_decoder()
    model.__class__ = Script
    add_lora(model, LORA)
    keep_trained_set(model)  # as in adapter_checkpoints
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.disable_untrainable_params()
    assert before == [name for name, parameter in model.named_parameters() if parameter.requires_grad] != []


@pytest.mark.usefixtures("single_process_group")
def test_whatever_a_script_freezes_by_name_the_adapters_train():
    class Published(CogVLMModel):
        """As the published class: what has none of these words in its name is frozen."""

        def disable_untrainable_params(self):
            for name, parameter in self.named_parameters():
                if not any(word in name for word in ("matrix_A", "matrix_B", "vit")):
                    parameter.requires_grad_(False)

    model = tiny_model()
    model.__class__ = Published
    add_lora(model, LORA)
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert isinstance(vars(model)["disable_untrainable_params"], TrainedSet)
    model.disable_untrainable_params()
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == before
    for owner in (model, model.mixins["eva"].vit_model):
        owner.del_mixin("lora")
    model.disable_untrainable_params()  # the script's own again
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.usefixtures("single_process_group")
def test_the_rate_of_b_is_what_sat_multiplies_with():
    from sat.training.deepspeed_training import get_optimizer_param_groups

    model = tiny_model()
    add_lora(model, LoraConfig(r=4, lr_ratio=16))
    groups = get_optimizer_param_groups(model)
    of_b = {id(p) for name, p in model.named_parameters() if p.requires_grad and name.endswith(".B")}
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert {rates[key] for key in of_b} == {16} and {rate for key, rate in rates.items() if key not in of_b} == {1}


def engine_of(model):
    add_lora(model, LORA, name="first")
    return start_engine(model, adapter_optimizer(model, lr=1e-2), engine_config(1, 2, 1))


def refusals():
    init_model_parallel(init_distributed())
    engine = engine_of(tiny_model().train())
    texts = []
    for model in (engine, engine.module):
        try:
            add_lora(model, LORA)
        except ConfigError as error:
            texts.append(str(error))
    return texts


def on_one_rank(folder):
    return train_by_sat(folder, unfreezing, steps=1), refusals()


@pytest.fixture(scope="module")
def runs_of_one_rank(tmp_path_factory):
    """A run whose script unfreezes more, and what a model in an engine answers."""
    (outcome,) = run_ranks(on_one_rank, 1, str(tmp_path_factory.mktemp("one")))
    return outcome


def test_a_model_in_an_engine_takes_no_more_adapters(runs_of_one_rank):
    of_engine, of_module = runs_of_one_rank[1]
    assert of_engine.startswith("the model is DeepSpeed's engine already")
    assert of_module.startswith("the model is in DeepSpeed's engine already") and "before" in of_module


def test_outside_of_the_blocks_sat_and_torch_are_as_they_were():
    import sat.arguments
    import sat.training.deepspeed_training as trainer_module
    from sat.training import model_io

    before = (model_io.save_checkpoint, trainer_module.load_checkpoint, torch.Tensor.cuda, torch.cuda.device_count)
    start = sat.arguments.initialize_distributed
    with adapter_checkpoints(), sat_on_cpu():
        assert trainer_module.save_checkpoint is model_io.save_checkpoint is not before[0]
    after = (model_io.save_checkpoint, trainer_module.load_checkpoint, torch.Tensor.cuda, torch.cuda.device_count)
    assert before == after and sat.arguments.initialize_distributed is start
    assert "sat.training.deepspeed_training" in sys.modules


def test_what_is_imported_inside_a_block_is_sats_own_after_it():
    from sat.training import deepspeed_training, model_io

    theirs = types.ModuleType("theirs")
    sys.modules["theirs"] = theirs
    try:
        with adapter_checkpoints():
            code = "from sat.training.{} import {} as {}"
            for home, function in (("model_io", "save_checkpoint"), ("model_io", "load_checkpoint")):
                exec(code.format(home, function, function), vars(theirs))
            exec(code.format("deepspeed_training", "load_checkpoint", "trainers"), vars(theirs))
            assert theirs.save_checkpoint is model_io.save_checkpoint
            assert theirs.trainers is not theirs.load_checkpoint
        assert theirs.save_checkpoint is model_io.save_checkpoint is deepspeed_training.save_checkpoint
        assert theirs.load_checkpoint is theirs.trainers is model_io.load_checkpoint
    finally:
        del sys.modules["theirs"]


@pytest.mark.usefixtures("single_process_group")
def test_the_averages_of_sats_optimizer_are_saved_beside_the_adapter(tmp_path, monkeypatch):
    """As SAT does for the class that is called so, which needs a GPU; what exchanges the values is SAT's."""
    from sat.training import model_io

    class FusedEmaAdam:
        pass

    model = tiny_model()
    add_lora(model, LORA)
    weights = next(p for name, p in model.named_parameters() if p.requires_grad and name.endswith(".B"))

    def by(factor):
        return lambda optimizer: weights.data.fill_(factor)

    monkeypatch.setattr(model_io, "update_ema_parameters_to_model", by(3.0))
    monkeypatch.setattr(model_io, "restore_ema_parameters_back", by(1.0))
    weights.data.fill_(1.0)
    save = settings(mode="inference", save=str(tmp_path))
    with adapter_checkpoints():
        model_io.save_checkpoint(7, model, types.SimpleNamespace(optimizer=FusedEmaAdam()), None, save)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "7-ema", "latest", "model_config.json"]
    assert (tmp_path / "latest").read_text().strip() == "7" and (weights == 1).all()
    values = {
        folder: [t for key, t in read_adapter(tmp_path / folder).tensors.items() if (t == value).all()]
        for folder, value in (("7", 1.0), ("7-ema", 3.0))
    }
    assert {folder: len(found) for folder, found in values.items()} == {"7": 3, "7-ema": 3}  # q, k, v


def run_example(captchas, folder):
    """finetune_demo/with_sat_trainer.py on a few captchas, two steps."""
    data = ["--train-data", f"{captchas}/train", "--valid-data", f"{captchas}/valid"]
    few = "--train-iters 2 --save-interval 2 --eval-interval 2 --eval-iters 1 --num-workers 0".split()
    sys.argv = ["with_sat_trainer.py", *data, *few, "--save", folder]
    load_script("with_sat_trainer").main()


def test_the_example_trains_validates_and_saves_an_adapter_for_every_command(captchas, tmp_path, capsys):
    run_ranks(run_example, 1, str(captchas), str(tmp_path / "runs"))
    (run,) = (tmp_path / "runs").iterdir()
    merged, exported = tmp_path / "merged", tmp_path / "peft"
    assert main(["inspect", str(run)]) == 0
    assert main(["merge", "--adapter", str(run), "--base", str(TINY_BASE), "--out", str(merged)]) == 0
    assert (
        main(["export", "--to", "peft", "--adapter", str(run), "--base", str(TINY_BASE), "--out", str(exported)]) == 0
    )
    before, after = (torch.load(next(folder.rglob("*model_states.pt")))["module"] for folder in (TINY_BASE, merged))
    changed = {name.removesuffix(".weight") for name, weight in before.items() if not weight.equal(after[name])}
    assert changed and changed <= set(read_adapter(run).layers)
    assert json.loads((exported / "adapter_config.json").read_text())["r"] == 16
    capsys.readouterr()
    assert len(read_adapter(run).tensors) > 0 and (run / "2" / "adapter_model.safetensors").is_file()
    assert len((DEMO / "with_sat_trainer.py").read_text().splitlines()) < 80


@pytest.mark.matrix
@pytest.mark.timeout(2400)
def test_by_sats_trainer_the_demo_reaches_what_the_demo_reaches(tmp_path):
    output_of = copied_demo(tmp_path)
    output_of("with_sat_trainer.py")
    (save,) = (tmp_path / "runs").iterdir()
    output_of("finetune_cogvlm.py", "--train-iters", "1", "--experiment-name", "ours")
    # the line of the script's docstring
    texts = "--from_pretrained finetune_demo/tiny_cogvlm --version base --max_length 64 --prompt CAPTCHA:".split()
    table = output_of(
        "evaluate_cogvlm.py", "--adapter", save, *texts, "--test-data", "finetune_demo/captchas/test"
    )  # fmt: skip
    (shares,) = re.findall(r"^ +exact-match +([\d.]+) % \[.*?\] +([\d.]+) % \[", table, re.MULTILINE)
    assert shares[0] == "3.0" and float(shares[1]) >= 95, table

    ours = tmp_path / "runs" / "ours" / "adapter" / "1"
    shapes = [{name: tensor.shape for name, tensor in read_adapter(path).tensors.items()} for path in (save, ours)]
    assert shapes[0] == shapes[1]
    sizes = [(path / "adapter_model.safetensors").stat().st_size for path in (save / "700", ours)]
    assert abs(sizes[0] - sizes[1]) < 2048  # what the header notes
    assert sorted(path.name for path in save.iterdir() if path.is_dir()) == ["350", "700"]
    assert sum(path.stat().st_size for path in save.rglob("*") if path.is_file()) <= 2 * (sizes[0] + 64 * 1024)
