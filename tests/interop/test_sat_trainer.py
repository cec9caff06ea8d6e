"""SAT's own `training_main` with our mixin in it: what trains, what is saved, and the same adapter as plain SGD."""

import json
import logging
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sat_lora import ConfigError, LoraConfig, adapter_checkpoints, add_lora, save_adapter
from sat_lora._sat_on_cpu import sat_on_cpu
from sat_lora.adapters.read import read_adapter
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.lora.base_parameters import TrainedSet, keep_trained_set
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens
from tests.support.paths import DEMO
from tests.support.ranks import run_ranks
from tests.support.scripts import load_script
from tests.support.tiny import fill_adapters, tiny_batch, tiny_model
from tests.support.training_runs import engine_config

STEPS, RATE = 5, 0.05
LORA = LoraConfig(r=4, lora_alpha=8)
WARM_UP_SHARE = 0.05  # of the rate, which SAT holds for the first hundred steps of a fine-tuning


class Numbers(torch.utils.data.Dataset):
    """Samples that are seeds: `forward_step` makes the batch."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return index


def loss_of(model, seed):
    batch = tiny_batch((True, False), seed=seed)
    return answer_loss_sum(model, batch) / count_answer_tokens(batch["labels"])


def trainer(folder, stage, mp_size, *, load=None, unfreezes=False):
    """What a run of `training_main` leaves on this rank: seeds of its batches, warnings, and what its base became."""
    from sat import get_args
    from sat.training.deepspeed_training import training_main

    folder, seeds, warnings = Path(folder), [], []
    zero = {"stage": stage, "reduce_bucket_size": 100_000}
    engine = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0}  # DeepSpeed clips to 1 by itself
    engine["optimizer"] = {"type": "SGD", "params": {"lr": RATE}}
    config = folder / "engine.json"
    config.parent.mkdir(exist_ok=True, parents=True)
    config.write_text(json.dumps(engine))

    def forward_step(batches, model, args, timers):
        seeds.append(int(next(batches)))
        return loss_of(model, seeds[-1]), {}

    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("sat_lora").addHandler(handler)
    options = f"--mode finetune --experiment-name run --train-iters {STEPS} --batch-size 1 --lr {RATE} --num-workers 0"
    options += f" --lr-decay-style constant --save-interval {STEPS} --split 1 --log-interval 1 --train-data numbers"
    words = [*options.split(), "--model-parallel-size", str(mp_size), "--save", str(folder), *(load or [])]
    with sat_on_cpu():
        args = get_args([*words, "--deepspeed_config", str(config)])
        model = tiny_model(model_parallel_size=mp_size)
        add_lora(model, LORA)
        fill_adapters(model)
        if unfreezes:
            model.disable_untrainable_params = lambda: model.mixins["eva"].boi.requires_grad_(True)
            keep_trained_set(model)
        base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        with adapter_checkpoints():
            training_main(args, model, forward_step, lambda path, args: Numbers())
    names = dict(model.named_parameters())
    changed = [name for name, before in base.items() if not torch.equal(names[name], before)]
    return Path(args.save), seeds, warnings, changed


def by_plain_sgd(seeds):
    """The adapter's tensors, as a file has them, after the same batches in this process, without any engine."""
    init_model_parallel(init_distributed())
    model = tiny_model()
    add_lora(model, LORA)
    fill_adapters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for seed in seeds:
        gradients = torch.autograd.grad(loss_of(model, seed), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients):
                parameter -= RATE * WARM_UP_SHARE * gradient
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, f"{folder}/adapter")
        return {name: tensor.numpy() for name, tensor in read_adapter(f"{folder}/adapter").tensors.items()}


@pytest.mark.parametrize(
    "stage, mp_size", [(0, 1), (2, 2), *(pytest.param(*case, marks=pytest.mark.matrix) for case in [(2, 1), (0, 2)])]
)
def test_five_steps_of_sats_trainer_are_those_of_plain_sgd_and_its_saves_are_adapters(tmp_path, stage, mp_size):
    outcomes = run_ranks(trainer, mp_size, str(tmp_path), stage, mp_size)
    saves = {outcome[0] for outcome in outcomes}
    (save,) = saves
    assert [seeds for _, seeds, _, _ in outcomes] == [outcomes[0][1]] * mp_size  # model-parallel ranks share batches
    assert all(changed == [] for _, _, _, changed in outcomes)
    assert sorted(path.name for path in save.iterdir()) == [str(STEPS), "latest", "model_config.json"]
    assert (save / "latest").read_text().strip() == str(STEPS)
    adapter = save / str(STEPS)
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved = read_adapter(save).tensors  # by its pointer
    tensor_bytes = sum(tensor.nbytes for tensor in saved.values())
    assert sum(path.stat().st_size for path in save.rglob("*") if path.is_file()) < tensor_bytes + 2**16
    (expected,) = run_ranks(by_plain_sgd, 1, outcomes[0][1])
    assert saved.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(saved[name], torch.from_numpy(values), rtol=1e-5, atol=1e-6)


def loaded(save):
    """The adapter that SAT's `load_checkpoint` puts into a new model, and the iteration that it gives."""
    init_model_parallel(init_distributed())
    model = tiny_model()
    add_lora(model, LORA)
    with adapter_checkpoints():
        from sat.training.model_io import load_checkpoint

        iteration = load_checkpoint(model, Namespace(mode="finetune", load=save, force_train=False))
        step = load_checkpoint(model, Namespace(mode="pretrain", load=save))
    save_adapter(model, f"{save}/again")
    return iteration, step


def test_what_is_saved_is_loaded_again_bit_for_bit(tmp_path):
    ((save, *_),) = run_ranks(trainer, 1, str(tmp_path), 0, 1)
    ((iteration, step),) = run_ranks(loaded, 1, str(save))
    assert (iteration, step) == (0, STEPS)  # a fine-tuning begins at 0, as SAT has it
    again = read_adapter(save / "again").tensors
    for name, tensor in read_adapter(save).tensors.items():
        assert torch.equal(again[name], tensor), name


def test_a_script_that_unfreezes_more_is_told_and_trains_the_adapter_alone(tmp_path):
    ((_, _, warnings, changed),) = run_ranks(trainer, 1, str(tmp_path), 0, 1, unfreezes=True)
    assert changed == []
    (warning,) = [warning for warning in warnings if "disable_untrainable_params" in warning]
    assert "leaves 1 parameters trainable" in warning and "mixins.eva.boi" in warning


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


def test_a_model_in_an_engine_takes_no_more_adapters():
    ((of_engine, of_module),) = run_ranks(refusals, 1)
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


def run_example(captchas, folder):
    """finetune_demo/with_sat_trainer.py on a few captchas, two steps."""
    data = ["--train-data", f"{captchas}/train", "--valid-data", f"{captchas}/valid"]
    few = "--train-iters 2 --save-interval 2 --eval-interval 2 --eval-iters 1 --num-workers 0".split()
    sys.argv = ["with_sat_trainer.py", *data, *few, "--save", folder]
    load_script("with_sat_trainer").main()


def test_the_example_trains_validates_and_saves_an_adapter(captchas, tmp_path):
    run_ranks(run_example, 1, str(captchas), str(tmp_path))
    (run,) = tmp_path.iterdir()
    assert len(read_adapter(run).tensors) > 0 and (run / "2" / "adapter_model.safetensors").is_file()
    assert len((DEMO / "with_sat_trainer.py").read_text().splitlines()) < 80
