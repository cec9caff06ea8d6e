"""What chat, server and evaluation say greedily are the same tokens, whatever is in a batch with what."""

import base64
import json
import threading

import httpx
import numpy
import pytest
import torch
from PIL import Image

from sat_lora import LoraConfig, add_lora, save_adapter
from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from sat_lora.cogvlm.inputs.text import load_tokenizer
from sat_lora.lora.mixin import lora_mixins
from sat_lora.serve.app import RequestLimits
from sat_lora.training.answers import answering
from sat_lora.training.evaluation import evaluate_adapter
from tests.support.configs import config_of
from tests.support.paths import TINY_BASE
from tests.support.serving import served
from tests.support.tiny import fill_adapters

QUERIES = ("CAPTCHA:", "A", "CAPTCHA: what is it?")  # prompts of one batch have several lengths


@pytest.fixture(scope="module")
def adapter(single_process_group, tmp_path_factory):
    """The folder of an adapter of the demo's base that changes what it reads."""
    folder = tmp_path_factory.mktemp("same") / "mine" / "adapter"
    model, _ = load_cogvlm(TINY_BASE)
    add_lora(model, LoraConfig(r=4))
    fill_adapters(model, std=0.05)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = numpy.random.default_rng(5)
    for number in range(5):
        size = (42, 42 + number, 3)
        Image.fromarray(draw.integers(0, 256, size, dtype=numpy.uint8)).save(folder / f"{number}.png")
    return [*sorted(folder.iterdir()), None]  # and a question without one


def chat_of(adapter, version, base=TINY_BASE, dtype=torch.float32) -> Chat:
    return Chat(load_cogvlm(base, dtype=dtype), adapters={"mine": adapter}, version=version, max_new_tokens=16)


def said_in_a_conversation(adapter, version, pictures) -> dict[tuple[str, int], tuple[str, int]]:
    """(text, tokens) by speaker and number of the picture: each question asked alone."""
    chat = chat_of(adapter, version)
    said = {}
    for speaker in ("base", "mine"):
        chat.use(speaker)
        for number, picture in enumerate(pictures):
            chat.reset()
            text = chat.ask(QUERIES[number % len(QUERIES)], picture)
            said[speaker, number] = text.strip(), chat.usage.completion_tokens
    return said


def said_by_the_server(adapter, version, pictures, batch) -> dict[tuple[str, int], tuple[str, int]]:
    """The same of a server that is asked everything at once."""
    said = {}

    def ask(address, speaker, number):
        parts = [{"type": "text", "text": QUERIES[number % len(QUERIES)]}]
        if pictures[number] is not None:
            url = "data:image/png;base64," + base64.b64encode(pictures[number].read_bytes()).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        request = {"model": speaker, "messages": [{"role": "user", "content": parts}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=100, verify=False).json()
        text = answer["choices"][0]["message"]["content"]
        said[speaker, number] = text, answer["usage"]["completion_tokens"]

    with served(chat_of(adapter, version), limits=RequestLimits(together=batch)) as address:
        asked = [
            threading.Thread(target=ask, args=(address, speaker, number))
            for number in range(len(pictures))
            for speaker in ("base", "mine")
        ]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join()
    return said


def tokens_generated(monkeypatch) -> dict[str, list]:
    """The tokens that evaluations generate from now on, by who generates them."""
    generated: dict[str, list] = {"base": [], "adapter": []}
    generate = answering.generate

    def recorded(model, batch, **settings):
        tokens = generate(model, batch, **settings)
        is_on = any(mixin.enabled for mixin in lora_mixins(model).values())
        generated["adapter" if is_on else "base"] += tokens
        return tokens

    monkeypatch.setattr(answering, "generate", recorded)
    return generated


@pytest.mark.parametrize("version", ["base", "chat"])
def test_chat_server_and_evaluation_say_the_same_tokens(
    version, adapter, pictures, single_process_group, tmp_path, monkeypatch
):
    said = said_in_a_conversation(adapter, version, pictures)
    assert said_by_the_server(adapter, version, pictures, batch=4) == said
    assert any(said["base", number] != said["mine", number] for number in range(len(pictures)))
    tokenizer = load_tokenizer(TINY_BASE)
    ends = [number for number in range(len(pictures)) if all(said[who, number][1] < 16 for who in ("base", "mine"))]
    assert len(ends) > 2  # an evaluation stops where the longest right answer ends
    generated = tokens_generated(monkeypatch)
    for who, side in (("base", "base"), ("mine", "adapter")):
        lines = [
            {
                **({} if pictures[number] is None else {"image": str(pictures[number])}),
                "prompt": QUERIES[number % len(QUERIES)],
                "answer": said[who, number][0] or "-",
            }
            for number in ends
        ]
        # The longest decides how many tokens there may be: one more item has an answer that nobody gives.
        lines.append({"image": str(pictures[0]), "prompt": QUERIES[0], "answer": "never said, and long"})
        (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
        config = config_of(
            from_pretrained=str(TINY_BASE), test_data=[str(tmp_path / "items.jsonl")], version=version,
            max_length=128, eval_batch_size=3,
        )  # fmt: skip
        for tokens in generated.values():
            tokens.clear()
        evaluate_adapter(config, adapter, single_process_group)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in generated[side][: len(ends)]]
        assert texts == [said[who, number][0] for number in ends]
        assert [len(ids) + 1 for ids in generated[side][: len(ends)]] == [said[who, number][1] for number in ends]


def parts_of(picture, query) -> list[dict]:
    """A question about a picture, as OpenAI has it."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": query}]


@pytest.mark.parametrize("dtype, batch", [(torch.float32, 4), (torch.bfloat16, 1)])
def test_the_second_turn_of_a_conversation_is_the_same_tokens_too(
    dtype, batch, base, adapters, pictures, single_process_group, tmp_path, monkeypatch
):
    """In bfloat16 each is alone: there rounding in a batch of another size may choose between two tokens. The base is
    one that has much to say.
    """
    adapter = adapters["mine"]
    asked = [(speaker, picture) for speaker in ("base", "mine") for picture in pictures[:2]]
    chat = chat_of(adapter, "chat", base, dtype)
    tokenizer = load_tokenizer(base)
    said, requests, lines = [], [], {"base": [], "mine": []}
    for speaker, picture in asked:
        chat.use(speaker)
        first = chat.ask(QUERIES[0], picture).strip()
        second = chat.ask(QUERIES[1])
        said.append((second.strip(), chat.usage.completion_tokens))
        assert len(chat.turns) == 2 and chat.left_out == 0
        messages = [
            {"role": "user", "content": parts_of(picture, QUERIES[0])},
            {"role": "assistant", "content": first},
            {"role": "user", "content": QUERIES[1]},
        ]
        requests.append({"model": speaker, "messages": messages})
        lines[speaker].append({"messages": [*messages, {"role": "assistant", "content": "never said, and long"}]})
    assert len(set(said)) > 2

    answers: dict[int, tuple[str, int]] = {}

    def ask(address, number):
        answer = httpx.post(f"{address}/v1/chat/completions", json=requests[number], timeout=100, verify=False).json()
        answers[number] = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    with served(chat_of(adapter, "chat", base, dtype), limits=RequestLimits(together=batch)) as address:
        threads = [threading.Thread(target=ask, args=(address, number)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answers[number] for number in range(len(asked))] == said

    generated = tokens_generated(monkeypatch)
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(line) for who in lines.values() for line in who))
    config = config_of(
        from_pretrained=str(base), test_data=[str(tmp_path / "items.jsonl")], version="chat", max_length=160,
        eval_batch_size=min(batch, 3), bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    evaluate_adapter(config, adapter, single_process_group)
    for number, (speaker, (text, tokens)) in enumerate(zip((speaker for speaker, _ in asked), said)):
        ids = generated["base" if speaker == "base" else "adapter"][number]
        if tokens == 16 > len(ids):  # the evaluation stops where the longest right answer does
            continue
        ids = ids[:16]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert len(ids) + (tokens < 16) == tokens
