"""Adapters that LoftQ began answer on the base that they were trained beside, whoever asks: chat, server, evaluation.

What is right is what the model said that trained the adapter, in this process; the programs have its files alone.
"""

import base64
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch

from sat_lora import ConfigError, add_lora, load_adapter, save_adapter
from sat_lora.chat import Chat
from sat_lora.cli import build_parser, main
from sat_lora.cogvlm import load_cogvlm
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.commands.chat import load_chat
from sat_lora.data.samples import collate
from sat_lora.lora.apply import adapters_of
from sat_lora.quantization.config import Quantization
from sat_lora.serve.app import RequestLimits
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.serving import served
from tests.support.tiny import logits_of

pytestmark = pytest.mark.usefixtures("single_process_group")

QUERY = "CAPTCHA:"
LORA = dict(r=4, target_modules=["language-attention", "language-mlp", "linear_proj"])
LENGTH = 16
SAID = ["--max-new-tokens", str(LENGTH)]


def logits_in(chat, picture):
    """Of the question, by whoever answers."""
    chat.show(picture)
    return logits_of(chat.model, collate([chat.prepare(QUERY).sample], image_size=(42, 42)))


def said_by(model, config, picture):
    """Logits and answers of a model as it stands, its adapter on and off."""
    chat = Chat((model, config), version="base", max_new_tokens=LENGTH)
    logits, answers = {}, {}
    for side, who in (("adapter", "lora"), ("base", "base")):
        chat.use(who)
        logits[side] = logits_in(chat, picture)
        answers[side] = chat.ask(QUERY, picture).strip()
    return SimpleNamespace(logits=logits, answers=answers)


def learn(model, seed, std=0.02):
    """Let the adapters be as if they had learnt something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.B.add_(torch.randn(adapter.B.shape, generator=draw), alpha=std)


def write_run(folder, base, picture, **settings):
    """The run.json of a run, whose test data are one question that is answered at length."""
    sample = {"image": str(picture), "prompt": QUERY, "answer": "never said, and much longer than that"}
    (folder / "items.jsonl").write_text(json.dumps(sample))
    data = {"test_data": [str(folder / "items.jsonl")], "max_length": 128}
    settings = {"from_pretrained": str(base), "version": "base", "given": ["version"], **data, **settings}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.matrix)])
def run(request, base, picture, tmp_path_factory):
    """A run of LoftQ in nf4, with what its own model says after it has learnt, and what the codes alone would say."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    model, config = load_cogvlm(base, quantize=Quantization())
    add_lora(model, init_lora_weights="loftq", loftq_iter=request.param, **LORA)
    for step in (1, 2):
        learn(model, step)
        save_adapter(model, folder / f"adapter/{step}")
    (folder / "adapter" / "latest").write_text("2")
    write_run(folder, base, picture, quantize="nf4")
    rough, _ = load_cogvlm(base, quantize=Quantization())
    load_adapter(rough, folder / "adapter")
    return SimpleNamespace(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        picture=picture,
        own=said_by(model, config, picture),
        rough=said_by(rough, config, picture),
    )


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """The adapter of another run, that trained beside the codes of the same base."""
    model, _ = load_cogvlm(run.base, quantize=Quantization())
    add_lora(model, **LORA)
    learn(model, 5)
    save_adapter(model, folder := tmp_path_factory.mktemp("runs") / "plain" / "adapter")
    return folder


@pytest.fixture
def sat_lora(capsys):
    def command(*arguments):
        status = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture
def nothing_loads(monkeypatch):
    for place in ("sat_lora.cogvlm.load_cogvlm", "sat_lora.training.prepare.load_cogvlm"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("the base is loaded"))


def chat_of(*options):
    return load_chat(build_parser().parse_args(["serve", *map(str, options), *SAID]))


def evaluated(out, *options):
    """What an evaluation's file of predictions says, by side. In a process of its own, whose groups it leaves."""
    assert run_ranks(main, 1, ["evaluate", *map(str, options), "--out", str(out)]) == [0]
    return json.loads(out.with_suffix(".predictions.jsonl").read_text())["predictions"]


def asked(address, run, model):
    """The server's answer."""
    url = "data:image/png;base64," + base64.b64encode(run.picture.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUERY}]
    request = {"model": model, "messages": [{"role": "user", "content": parts}]}
    answer = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=100)
    return answer.json()["choices"][0]["message"]["content"].strip()


def test_chat_server_and_evaluation_answer_as_the_model_that_trained(run, sat_lora, tmp_path):
    answers = run.own.answers
    assert answers != run.rough.answers and answers["base"] != answers["adapter"]
    predictions = evaluated(tmp_path / "of.json", "--run", run.folder)
    assert all(predictions[side].startswith(said) and said for side, said in answers.items())
    line = ["--run", run.folder, "--image", run.picture, "--prompt", QUERY, *SAID]
    status, out, error = sat_lora("chat", *line)
    assert (status, out.strip()) == (0, answers["adapter"]), error
    chat = chat_of("--run", run.folder)
    with served(chat, limits=RequestLimits()) as address:
        for who, side in (("mine", "adapter"), ("base", "base"), ("mine", "adapter")):
            assert asked(address, run, who) == answers[side]
    for who in ("mine", "base"):
        chat.use(who)
        wanted, rough = (said.logits["base" if who == "base" else "adapter"] for said in (run.own, run.rough))
        torch.testing.assert_close(logits_in(chat, run.picture), wanted, rtol=1e-3, atol=1e-3)
        assert (rough - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("held", ["none", pytest.param("int8", marks=pytest.mark.matrix)])
def test_on_any_other_base_it_is_a_plain_adapter(held, run, tmp_path):
    """W + B A - B_0 A_0, or the same beside other codes: what was learnt."""
    model, config = load_cogvlm(run.base, quantize=None if held == "none" else Quantization(scheme=held))
    load_adapter(model, run.adapter)
    wanted = said_by(model, config, run.picture)
    chat = chat_of("--run", run.folder, "--quantize", held)
    assert torch.equal(logits_in(chat, run.picture), wanted.logits["adapter"])
    assert chat.ask(QUERY, run.picture).strip() == wanted.answers["adapter"]
    predictions = evaluated(tmp_path / "of.json", "--run", run.folder, "--quantize", held)
    assert all(predictions[side].startswith(said) and said for side, said in wanted.answers.items())


def said_by_steps(run, steps):
    """(what each step says alone, all of them loaded beside each other)."""
    options = ["--base", run.base, "--version", "base", "--quantize", "nf4", "--adapter"]
    alone = [chat_of(*options, step).ask(QUERY, run.picture).strip() for step in steps]
    assert alone[1] == run.own.answers["adapter"] and alone[0] != alone[1]
    return alone, chat_of(*options, *steps)


def test_steps_of_one_run_share_its_base(run):
    """They may answer beside each other, each as it does alone."""
    alone, chat = said_by_steps(run, [run.adapter / "1", run.adapter / "2"])
    for name, said in zip([*chat.adapters, "base", *chat.adapters], [*alone, run.own.answers["base"], *alone]):
        chat.use(name)
        assert chat.ask(QUERY, run.picture).strip() == said


@pytest.mark.matrix
def test_steps_of_one_run_are_served_and_evaluated_together(run, tmp_path):
    steps = [run.adapter / "2", run.adapter / "1", run.adapter / "2"]
    alone, chat = said_by_steps(run, [*reversed(steps[:2])])
    with served(chat, limits=RequestLimits()) as address:
        said = [asked(address, run, name) for name in (*chat.adapters, "base", *chat.adapters)]
    assert said == [*alone, run.own.answers["base"], *alone]
    predictions = evaluated(tmp_path / "of.json", "--run", run.folder, "--adapter", *steps)
    assert predictions.pop("base").startswith(run.own.answers["base"])
    wanted = [alone[1], alone[0], alone[1]]
    assert [text[: len(said)] for text, said in zip(predictions.values(), wanted)] == wanted


@pytest.mark.matrix
@pytest.mark.timeout(400)
def test_two_ranks_of_a_model_answer_as_the_evaluation_on_two(run, tmp_path):
    """Its slices have blocks of their own, so that the answers may be others than those of one rank."""

    def done(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        command += ["sat_lora.cli", "--", *arguments, "--run", run.folder, "--model-parallel-size", "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=180, env=environment)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    said = done("chat", "--image", run.picture, "--prompt", QUERY, *SAID).strip()
    done("evaluate", "--out", tmp_path / "of.json")
    predictions = json.loads((tmp_path / "of.predictions.jsonl").read_text())["predictions"]
    assert said and predictions["adapter"].startswith(said) and not predictions["base"].startswith(said)


@pytest.mark.parametrize("command", ["chat", "serve", "evaluate"])
@pytest.mark.parametrize("comes_first", [True, False])
def test_adapters_of_different_bases_are_one_error_before_anything_loads(
    command, comes_first, run, plain, sat_lora, nothing_loads
):
    folders = [run.adapter, plain] if comes_first else [plain, run.adapter]
    status, _, error = sat_lora(command, "--run", run.folder, "--adapter", *folders, *port_of(command))
    assert status == 2 and f"--adapter: {run.adapter} was begun by loftq, beside a base of its own" in error
    assert "that of " + str(plain) in error and "--quantize none" in error and "Traceback" not in error


def test_adapters_of_different_bases_answer_together_where_neither_needs_its_own(run, plain):
    chat = chat_of("--run", run.folder, "--adapter", run.adapter, plain, "--quantize", "int8")
    alone = chat_of("--run", run.folder, "--quantize", "int8")
    assert torch.equal(logits_in(chat, run.picture), logits_in(alone, run.picture))


@pytest.mark.parametrize("changed", ["rounds", "values"])
def test_another_run_of_loftq_has_another_base(changed, run, sat_lora, nothing_loads, tmp_path):
    other = tmp_path / "other" / "adapter"
    if changed == "rounds":
        other.parent.mkdir()
        other.mkdir()
        for file in (run.adapter / "2").iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        content = json.loads((other / "adapter_config.json").read_text())
        content["sat_lora"]["base_quantization"]["loftq_iter"] += 1
        (other / "adapter_config.json").write_text(json.dumps(content))
    else:
        model, _ = load_cogvlm(run.base, quantize=Quantization())
        add_lora(model, init_lora_weights="loftq", **{**LORA, "r": 5})
        save_adapter(model, other)
    status, _, error = sat_lora("chat", "--run", run.folder, "--adapter", run.adapter / "2", other)
    assert status == 2 and "beside a base of its own, which is not that of " + str(other) in error


def port_of(command):
    return ["--port", "0", "--no-page"] if command == "serve" else []


@pytest.mark.parametrize("command", ["chat", "serve", "evaluate"])
def test_a_folder_of_codes_alone_is_refused_before_anything_loads(command, run, sat_lora, nothing_loads, tmp_path):
    quantize_base(run.base, tmp_path / "codes", Quantization())
    line = ["--run", run.folder, "--from_pretrained", tmp_path / "codes", *port_of(command)]
    status, _, error = sat_lora(command, *line)
    assert status == 2 and f"--from_pretrained: {tmp_path / 'codes'} holds codes alone" in error
    assert "--quantize nf4" in error and "keep_originals" not in error and "Traceback" not in error


@pytest.mark.matrix
def test_a_folder_of_other_codes_takes_it_as_any_base_does(run, tmp_path):
    quantize_base(run.base, tmp_path / "codes", Quantization(scheme="int8"))
    own = chat_of("--run", run.folder, "--from_pretrained", tmp_path / "codes")
    other = chat_of("--run", run.folder, "--quantize", "int8")
    assert torch.equal(logits_in(own, run.picture), logits_in(other, run.picture))


def test_a_model_in_memory_keeps_the_base_of_the_adapters_that_it_has(run, plain):
    def model_with(name, folder):
        model, config = load_cogvlm(run.base, quantize=Quantization())
        load_adapter(model, folder, name=name)
        return model, config

    with pytest.raises(ConfigError, match="was begun by loftq, beside a base of its own, and .* has another adapter"):
        Chat(model_with("plain", plain), adapters={"mine": run.adapter}, version="base")
    with pytest.raises(ConfigError, match="was begun by loftq, beside a base of its own, which is not that of "):
        Chat(load_cogvlm(run.base, quantize=Quantization()), adapters={"mine": run.adapter, "plain": plain})
    trained, config = load_cogvlm(run.base, quantize=Quantization())
    assert Chat((trained, config), adapters={"mine": run.adapter}, version="base").speaker == "mine"
    again = Chat((trained, config), adapters={"first": run.adapter / "1"}, version="base", max_new_tokens=LENGTH)
    again.use("mine")  # of the same run
    assert again.ask(QUERY, run.picture).strip() == run.own.answers["adapter"]
