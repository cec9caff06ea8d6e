"""What cannot train inside SAT's `training_main` is one clear error, before a step is made."""

import warnings

import pytest
import torch

from sat_lora import ConfigError, LoraMixin, add_lora
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.ranks import run_ranks
from tests.support.sat_trainer import refusal, tiny_cogvlm, train_by_sat
from tests.support.tiny import tiny_model


def sats_lora2():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that bitsandbytes is not there
        from sat.model.finetune.lora2 import LoraMixin as SatsMixin
    return SatsMixin(2, r=4)


def added_twice(args):
    model = tiny_model()
    for _ in range(2):
        model.add_mixin("lora", LoraMixin(model, r=4))
    return model


def one_under_two_names(args):
    model = tiny_model()
    mixin = LoraMixin(model, r=4)
    for name in ("lora", "other"):
        model.add_mixin(name, mixin)
    return model


def both_ways(args):
    model = tiny_model()
    model.add_mixin("lora", LoraMixin(model, r=4))
    add_lora(model, r=4)
    return model


def wrapped(args):
    add_lora(torch.nn.DataParallel(tiny_model()), r=4)


def compiled(args):
    LoraMixin(torch.compile(tiny_model()), r=4)


def compiled_in_place(args):
    model = tiny_model()
    model.transformer.layers[1].compile()
    add_lora(model, r=4)


def of_another_model(args):
    model = tiny_model()
    model.add_mixin("lora", LoraMixin(tiny_model(), r=4))
    return model


def of_the_inner_model(args):
    model = tiny_model()
    model.add_mixin("lora", LoraMixin(model.mixins["eva"].vit_model, r=4))
    return model


def beside_lora2(args):
    model = tiny_model()
    model.add_mixin("sats", sats_lora2(), reinit=True)
    add_lora(model, r=4)
    return model


def before_lora2(args):
    model = tiny_model()
    add_lora(model, r=4)
    model.add_mixin("sats", sats_lora2(), reinit=True)
    return model


def branching(args):
    return tiny_cogvlm(args, fixed_order=True)


def of_rank_8(args):
    model = tiny_model()
    add_lora(model, r=8)
    return model


def of_another_name(args):
    model = tiny_model()
    add_lora(model, r=4, name="mine")
    return model


def two_adapters(args):
    model = tiny_model()
    add_lora(model, r=4)
    model.mixins["eva"].vit_model.add_mixin("second", LoraMixin(model.mixins["eva"].vit_model, r=2))
    return model


def no_step(model, seed):
    """A loss that nobody should come to."""
    raise AssertionError("training began")


MISTAKES = {
    "added twice": (added_twice, {}, "ConfigError: the model has a mixin 'lora' already; delete it or choose another"),
    "one under two names": (one_under_two_names, {}, "ConfigError: the model has a mixin 'lora' already; delete it"),
    "both ways": (both_ways, {}, "ConfigError: the model has a mixin mixins.lora already; delete it or choose another"),
    "wrapped": (wrapped, {}, "ConfigError: the model is wrapped in DataParallel already, which would not know new"),
    "compiled": (compiled, {}, "ConfigError: the model is wrapped in OptimizedModule already, which would not know"),
    "compiled in place": (compiled_in_place, {}, "ConfigError: transformer.layers.1 is compiled already, and what is"),
    "of another model": (of_another_model, {}, "ConfigError: a LoRA mixin on the CogVLMModel was made for another"),
    "of the inner model": (of_the_inner_model, {}, "was made for another model, transformer."),
    "beside lora2": (
        beside_lora2,
        {},
        "ConfigError: 4 layers have SAT's own lora2 on them already, transformer.",
    ),
    "before lora2": (before_lora2, {}, "ConfigError: 4 layers that LoRA adapts were replaced after it was added, "),
    "adapter of another rank": (
        of_rank_8,
        {"load": "adapter"},
        "saved/1 does not fit (its rank is 4, the model's 8: add LoRA with r=4, lora_alpha=8), 32 problems:\n",
    ),
    "whole model of another rank": (
        of_rank_8,
        {"load": "whole"},
        "AdapterError: the checkpoint's adapters do not fit those of the model, 16 tensors, ",
    ),
    "another name": (
        of_another_name,
        {},
        "ConfigError: adapter_checkpoints: saves hold the adapter called 'lora' alone, and "
        "mixins.eva.vit_model.mixins.mine, mixins.mine would be lost; give adapter_checkpoints('mine'), or leave",
    ),
    "two names": (
        two_adapters,
        {},
        "alone, and mixins.eva.vit_model.mixins.second would be lost; give all of them one name, or leave",
    ),
    "branches at ZeRO 3": (branching, {"stage": 3}, "lora was added with fixed_order, so the model may skip layers"),
}


def refusals(folder):
    for name, alone in (("adapter", True), ("whole", False)):
        options = ["--no-save-rng"]  # torch 2.6 and later do not load what SAT 0.4.12 saves of numpy
        run = train_by_sat(f"{folder}/{name}", stage=2, steps=1, options=options, adapters_alone=alone)
        run.save.rename(f"{folder}/{name}/saved")
    texts = {}
    for name, (build, settings, _) in MISTAKES.items():
        load = settings.get("load")
        options = ["--load", f"{folder}/{load}/saved"] if load else []
        stage = settings.get("stage", 2)
        texts[name] = refusal(
            train_by_sat, f"{folder}/{name}", build, stage=stage, steps=1, options=options, loss=no_step
        )
    return texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    (texts,) = run_ranks(refusals, 1, str(tmp_path_factory.mktemp("mistakes")))
    return texts


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_before_training(mistake, texts):
    assert MISTAKES[mistake][2] in texts[mistake]
    assert len(texts[mistake].split("problems:")[0]) < 500  # what follows are the layers


@pytest.mark.usefixtures("single_process_group")
def test_beside_lora2_on_other_layers_and_beside_a_second_adapter_it_is_no_mistake():
    model = tiny_model()
    model.add_mixin("sats", sats_lora2(), reinit=True)
    add_lora(model, r=4, exclude_modules=r".*attention\..*")
    add_lora(model, r=2, name="second", exclude_modules=r".*attention\..*")
    model.disable_untrainable_params()


@pytest.mark.usefixtures("single_process_group")
def test_a_copy_of_a_model_says_its_own_names_and_a_deleted_mixin_frees_its_name():
    import copy

    model = tiny_model()
    add_lora(model, r=4)
    copied = copy.deepcopy(model)
    copied.del_mixin("lora")
    copied.add_mixin("lora", LoraMixin(copied, r=4))
    with pytest.raises(ConfigError, match="a mixin 'lora' already"):
        copied.add_mixin("lora", LoraMixin(copied, r=4))
    assert model.mixins["lora"] is not copied.mixins["lora"]
    with pytest.raises(AssertionError):  # SAT's, for what is none of ours
        copied.add_mixin("mlp", copied.mixins["mlp"])


@pytest.mark.usefixtures("single_process_group")
def test_adapters_that_are_deleted_and_added_again_train_alone():
    model = tiny_model()
    for r in (4, 2):
        add_lora(model, r=r)
        deltas = [p for mixin in lora_mixins(model).values() for p in mixin.trainable()]
        model.disable_untrainable_params()
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in deltas}
        assert {min(p.shape) for p in deltas} <= {r, 3 * r}
        if r == 4:
            for owner in (model, model.mixins["eva"].vit_model):
                owner.del_mixin("lora")


def shared_step():
    """One forward pass of a branching model whose parameters ZeRO-3 has partitioned, by plain DeepSpeed."""
    import deepspeed

    from sat_lora._deepspeed import skip_shared_memory_build
    from tests.support.tiny import logits_of, tiny_batch
    from tests.support.training_runs import engine_config, sgd

    skip_shared_memory_build()  # or it waits for ever for the lock of a build that was killed once
    init_model_parallel(init_distributed())
    model = branching(None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model, 0.1), config=engine_config(3, 1))
    return refusal(logits_of, engine, tiny_batch())


@pytest.mark.matrix
def test_a_plain_deepspeed_loop_at_stage_3_is_told_on_every_rank():
    for text in run_ranks(shared_step, 2):
        assert text.startswith("ConfigError: ZeRO stage 3: LoRA was added with fixed_order")
