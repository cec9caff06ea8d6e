"""What conversation and server say on a device is what the whole sequence anew says for each token, on a CPU."""

import base64

import numpy
import pytest
import torch
from PIL import Image

from sat_lora import LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from sat_lora.cogvlm.inputs.image import load_image
from sat_lora.cogvlm.inputs.prompts import prompt_text
from sat_lora.cogvlm.inputs.text import build_sample, load_tokenizer
from sat_lora.data.samples import collate
from tests.support.decoding import without_cache
from tests.support.paths import TINY_BASE
from tests.support.tiny import fill_adapters, logits_of

TOKENS = 6
QUESTIONS = ("CAPTCHA:", "and again?")


@pytest.fixture
def adapter(single_process_group, tmp_path):
    folder = tmp_path / "mine" / "adapter"
    model, _ = load_cogvlm(TINY_BASE)
    add_lora(model, LoraConfig(r=4))
    fill_adapters(model, std=0.2)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    noise = numpy.random.default_rng(3).integers(0, 256, (42, 42, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@torch.no_grad()
def likeliest(adapter, turns: tuple, query: str, picture) -> str:
    """The answer without conversation or cache. AssertionError: two tokens are so close that rounding could choose."""
    model, config = load_cogvlm(TINY_BASE)
    if adapter is not None:
        load_adapter(model, adapter)
    model.eval()
    size = tuple(config["eva_args"]["image_size"])
    tokenizer = load_tokenizer(TINY_BASE)
    parts = ("", prompt_text("chat", query, turns))
    sample = build_sample(tokenizer, parts, None, config["image_length"], 2048, load_image(picture, size))
    batch = collate([sample], image_size=size)
    tokens = without_cache(model, batch, TOKENS)[0]
    answer = tokens[: (*tokens, tokenizer.eos_token_id).index(tokenizer.eos_token_id)]
    for count in range(min(len(answer) + 1, TOKENS)):
        said = torch.tensor([answer[:count]], dtype=torch.int64)
        after = {"input_ids": said, "position_ids": batch["position_ids"][:, -1:] + 1 + torch.arange(count)[None]}
        after |= {key: torch.zeros_like(said) for key in ("image_embed_mask", "vision_expert_mask")}
        grown = {**batch, **{key: torch.cat([batch[key], value], 1) for key, value in after.items()}}
        best, second = logits_of(model, grown)[0, -1].topk(2).values
        assert best - second > 1e-3
    return tokenizer.decode(answer, skip_special_tokens=True)


def chat_on(device: torch.device, adapter) -> Chat:
    loaded = load_cogvlm(TINY_BASE, device=device)
    chat = Chat(loaded, adapters={"mine": adapter}, version="chat", max_new_tokens=TOKENS)
    assert {parameter.device.type for parameter in chat.model.parameters()} == {device.type}
    return chat


def test_every_turn_of_a_conversation_is_the_likeliest_tokens(device, adapter, picture):
    chat = chat_on(device, adapter)
    turns: tuple[tuple[str, str], ...] = ()
    for number, query in enumerate(QUESTIONS):
        expected = likeliest(adapter, turns, query, picture)
        assert "".join(chat.stream(query, picture if number == 0 else None)) == expected
        turns = (*turns, (query, expected.strip()))
    of_base = likeliest(None, (), QUESTIONS[0], picture)
    chat.use("base")
    assert chat.ask(QUESTIONS[0], picture) == of_base and of_base.strip() != turns[0][1] != ""


def test_a_server_says_the_likeliest_tokens(device, adapter, picture):
    for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
        pytest.importorskip(package, reason="the server's packages are not installed: pip install 'sat_lora[serve]'")
    import httpx

    from tests.support.serving import served

    first = likeliest(adapter, (), QUESTIONS[0], picture).strip()
    second = likeliest(adapter, ((QUESTIONS[0], first),), QUESTIONS[1], picture).strip()
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[0]}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    with served(chat_on(device, adapter)) as address:
        for asked, expected in ((messages[:1], first), (messages, second)):
            request = {"model": "mine", "messages": asked}
            answer = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=100).json()
            assert answer["choices"][0]["message"]["content"] == expected
