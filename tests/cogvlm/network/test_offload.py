"""Inputs of recomputed layers that wait in host memory: the same numbers bit for bit, and less on the device."""

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.network import recompute
from sat_lora.cogvlm.network.model import VIT
from sat_lora.memory.estimate import fake_step
from sat_lora.training.steps.loss import answer_loss_sum
from tests.support.ranks import run_ranks
from tests.support.tiny import CONFIG, fill_adapters, tiny_batch, tiny_model

CASES = {
    "both towers": {},
    "dropout": dict(lora_dropout=0.5),
    "DoRA": dict(use_dora=True),
    "upper layers": dict(target_modules=["language-mlp", "vit-mlp"], layers_to_transform="language:1,vit:1"),
    "no adapted ViT": dict(target_modules=["language-attention"]),
    "whole parameters": dict(modules_to_save=["linear_proj", "boi"]),
}


def results(dtype, fields, *, batch, **settings) -> dict[str, torch.Tensor]:
    model = tiny_model(dtype, **settings).train()
    add_lora(model, LoraConfig(r=4, **fields))
    fill_adapters(model, std=0.1)
    torch.manual_seed(3)
    loss = answer_loss_sum(model, {**batch, "images": batch["images"].to(dtype)})
    loss.backward()
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


class Copied:
    """A HostCopy that copies on a CPU as well, and notes it."""

    def __init__(self, tensor: torch.Tensor):
        self._content = tensor.clone()
        made.append(self)

    def on_device(self) -> torch.Tensor:
        fetched.append(self)
        return self._content.clone()


made, fetched = [], []


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_same_bit_for_bit(case, single_process_group, monkeypatch):
    dtype = torch.bfloat16 if case == "dropout" else torch.float32
    with_image = (False, False) if case == "whole parameters" else (True, False)
    monkeypatch.setattr(recompute, "HostCopy", Copied)
    made.clear()
    fetched.clear()
    batch = tiny_batch(with_image)
    both = dict(checkpoint_activations=True, vit_checkpoint_activations=True)
    plain = results(dtype, CASES[case], batch=batch, **both)
    assert not made
    offloaded = results(dtype, CASES[case], batch=batch, **both, checkpoint_offload=True)
    assert [name for name in plain if not torch.equal(plain[name], offloaded[name])] == []
    assert len(made) == {"upper layers": 3, "no adapted ViT": 2}.get(case, 4)
    assert fetched == made[::-1]  # each once, in the order of backward


@pytest.mark.parametrize("with_offload", [False, True])
def test_the_inputs_are_gone_from_the_device_after_forward(with_offload, single_process_group, monkeypatch):
    monkeypatch.setattr(recompute, "HostCopy", Copied)
    inputs = []
    model = tiny_model(checkpoint_activations=True, checkpoint_offload=with_offload).train()
    add_lora(model, LoraConfig(r=4, target_modules=["language-mlp"]))
    for layer in model.transformer.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].untyped_storage()._weak_ref()))
    loss = answer_loss_sum(model, tiny_batch())
    # That of the first layer is the sum of embeddings that others hold as well.
    assert torch.UntypedStorage._expired(inputs[1]) is with_offload
    loss.backward()


def test_without_recomputation_and_without_gradients_nothing_is_moved(single_process_group, monkeypatch):
    monkeypatch.setattr(recompute, "HostCopy", lambda tensor: pytest.fail("a copy was made"))
    model = tiny_model(checkpoint_offload=True)
    add_lora(model, LoraConfig(r=4))
    answer_loss_sum(model, tiny_batch()).backward()
    recomputing = tiny_model(checkpoint_activations=True, vit_checkpoint_activations=True, checkpoint_offload=True)
    assert recomputing.get_submodule(VIT).checkpointing.from_host
    with torch.no_grad():
        answer_loss_sum(recomputing, tiny_batch())


def test_on_a_cpu_the_host_copy_is_the_tensor_itself():
    tensor = torch.ones(3)
    assert recompute.HostCopy(tensor).on_device() is tensor


def test_the_estimate_of_a_device_knows_them():
    """Those of all layers are kept at once without it, and of the layer that is recomputed with it."""
    ((without, with_it),) = run_ranks(estimated, 1)
    vit = CONFIG["eva_args"]
    patches = CONFIG["image_length"] + 1
    rows, length, itemsize = 8, 40, 2
    inputs = (
        itemsize
        * rows
        * (
            CONFIG["num_layers"] * 4 * length * CONFIG["hidden_size"]
            + vit["num_layers"] * 4 * patches * vit["hidden_size"]
        )
    )
    assert without - with_it == pytest.approx(inputs, rel=0.35)


def estimated() -> tuple[int, int]:
    config = {**CONFIG, "num_layers": 8, "eva_args": {**CONFIG["eva_args"], "num_layers": 8}}
    settings = dict(checkpoint_activations=True, vit_checkpoint_activations=True, dtype=torch.bfloat16)
    settings |= dict(batch_size=8, length=40, labelled=4)
    return tuple(fake_step(config, LoraConfig(r=2), **settings, checkpoint_offload=side)[1] for side in (False, True))
