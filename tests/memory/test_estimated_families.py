"""The estimate for the successors of CogVLM: by the names of published models, and against a step with memory."""

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.families import published, published_config
from sat_lora.errors import ConfigError
from sat_lora.memory.estimate import fake_step
from sat_lora.memory.estimate_run import plan_of, sizes_of
from sat_lora.memory.live_memory import LiveBytes
from sat_lora.training.steps.loss import answer_loss_sum
from tests.support.configs import parse_options
from tests.support.ranks import run_ranks
from tests.support.tiny_families import CONFIGS, family_batch, family_model

LENGTH = 24
ANSWER = 3
FRAMES = 3
"""Of a film: as many as a row of that length has room for."""


def estimated(names):
    """The bytes of activations of a step, by family."""
    lora = LoraConfig(r=2)
    settings = dict(dtype=torch.float32, batch_size=2, length=LENGTH, labelled=ANSWER)
    return {name: fake_step(CONFIGS[name], lora, **settings)[1] for name in names}


def measured(name):
    model = family_model(name)
    add_lora(model, r=2)
    model.train()
    images = FRAMES if model.family.takes_frames else 1
    batch = family_batch(name, (images, images), length=LENGTH, answer=ANSWER)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        answer_loss_sum(model, batch).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return live.peak, gradients


def test_a_step_takes_what_is_estimated(single_process_group):
    names = [name for name in CONFIGS if name != "cogvlm"]
    (peaks,) = run_ranks(estimated, 1, names)
    for name in names:
        peak, gradients = measured(name)
        assert abs(peaks[name] - peak) <= 0.1 * peak + gradients, name


def test_a_length_without_room_for_a_film_says_what_one_takes():
    """24 frames of 64 patches and both ends of each; for `chat_old` each with its number."""
    sizes = published_config("cogvlm2-video-llama3-chat")
    for version, needed in (("base", 24 * 66 + 2), ("chat_old", 24 * 67 + 2)):
        options = ["--from_pretrained", "cogvlm2-video-llama3-chat", "--version", version, "--max_length"]
        with pytest.raises(ConfigError, match=f"the 24 frames of a film and two tokens take {needed}"):
            plan_of(parse_options([*options, str(needed - 1)], environ={}), sizes, ranks=1)
        assert plan_of(parse_options([*options, str(needed)], environ={}), sizes, ranks=1).step["length"] == needed


def test_the_name_of_a_published_model_gives_its_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in published():
        assert sizes_of(name) == sizes_of(f"THUDM/{name}") == published_config(name)
