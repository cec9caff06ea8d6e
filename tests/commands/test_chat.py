"""`sat-lora chat` on the demo's base: one answer, a conversation from a pipe, two ranks, and mistakes."""

import io
import json
import os
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image

from sat_lora import ConfigError, LoraConfig, add_lora, save_adapter
from sat_lora.adapters.merge import merge_adapter
from sat_lora.chat import Chat
from sat_lora.cli import build_parser, main
from sat_lora.cogvlm import load_cogvlm
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.commands.chat import _while_somebody_reads, film_problem, names_of, read_settings
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.layers import quantized_weight_of
from sat_lora.terminal.edge import LastingStream
from tests.support.films import write_film
from tests.support.paths import ROOT, TINY_BASE
from tests.support.tiny import fill_adapters
from tests.support.tiny_families import CONFIGS

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("runs") / "mine" / "adapter"
    model, _ = load_cogvlm(TINY_BASE)
    add_lora(model, LoraConfig(r=2))
    fill_adapters(model, std=0.1)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    noise = numpy.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def chat(capsys):
    def command(*arguments):
        status = main(["chat", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


def expected(adapter, picture) -> str:
    adapters = {} if adapter is None else {"mine": adapter}
    return Chat(load_cogvlm(TINY_BASE), adapters=adapters, version="base").ask("CAPTCHA:", picture)


def test_one_answer_is_all_that_goes_to_stdout(chat, adapter, picture):
    options = ["--base", TINY_BASE, "--version", "base", "--image", picture, "--prompt", "CAPTCHA:"]
    answers = {name: expected(name, picture) for name in (None, adapter)}
    assert len(set(answers.values())) == 2
    for name, answer in answers.items():
        status, out, _ = chat(*options, *(["--adapter", name] if name else []))
        assert (status, out) == (0, f"{answer}\n")


def test_a_film_is_refused_before_a_base_loads_that_takes_pictures(chat, tmp_path):
    film = write_film(tmp_path / "a.mp4", 2)
    base = tmp_path / "base"
    save_weights(base, CONFIGS["cogvlm2-video"], {})
    for image, problem in ((film, "is a film; CogVLM takes pictures"), (tmp_path, "is a folder, no file; CogVLM")):
        status, _, err = chat("--base", TINY_BASE, "--image", image, "--prompt", "q")
        assert status == 2 and f"--image: {image} {problem}" in err
        assert film_problem(str(base), image) is None


def test_a_run_brings_its_base_adapter_and_prompt_format(chat, adapter, picture, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(adapter)
    settings = {"from_pretrained": str(TINY_BASE), "version": "base", "given": ["version"], "model_parallel_size": 2}
    (run / "run.json").write_text(json.dumps({"settings": settings}))
    status, out, err = chat("--run", run, "--image", picture, "--prompt", "CAPTCHA:")
    assert (status, out) == (0, f"{expected(adapter, picture)}\n"), err


def test_a_question_may_be_as_long_as_a_sample_of_the_run(chat, adapter, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(adapter)
    settings = {"from_pretrained": str(TINY_BASE), "version": "base", "given": [], "max_length": 400}
    (run / "run.json").write_text(json.dumps({"settings": settings}))
    question = ["--prompt", "x" * 300, "--max-new-tokens", "2"]
    assert chat("--run", run, *question)[0] == 0
    status, _, err = chat("--base", TINY_BASE, *question)
    assert status == 2 and "question and answer may have 256 together; ask a shorter one, or raise max_length" in err


@pytest.mark.parametrize("scheme, kept", [("int8", ("vit-mlp",)), ("nf4", ())])
def test_a_base_in_few_bits_answers_as_its_decoded_weights_do(scheme, kept, chat, adapter, picture):
    options = ["--base", TINY_BASE, "--version", "base", "--adapter", adapter, "--image", picture]
    options += ["--prompt", "CAPTCHA:"]
    status, out, _ = chat(*options, "--quantize", scheme, *(["--keep_modules", *kept] if kept else []))
    model, config = load_cogvlm(TINY_BASE, quantize=Quantization(scheme=scheme, keep_modules=kept))
    decoded = 0
    for layer in model.modules():  # plain weights of the same values
        if (weight := quantized_weight_of(layer)) is not None:
            del layer._buffers["weight"]
            layer.weight = torch.nn.Parameter(weight.decoded())
            decoded += 1
    assert decoded > 10
    expected = Chat((model, config), adapters={"mine": adapter}, version="base").ask("CAPTCHA:", picture)
    assert (status, out) == (0, f"{expected}\n")


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_which_linears_are_quantised_is_an_option_and_comes_with_a_run(command, tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps(
            {"settings": {"from_pretrained": str(TINY_BASE), "quantize": "nf4", "quantize_modules": ["vit-mlp"]}}
        )
    )

    def settings(*given):
        return read_settings(build_parser().parse_args([command, *map(str, given)]))[0].quantization

    given = settings("--base", TINY_BASE, "--quantize", "int8", "--quantize_modules", "vit-mlp", "projector")
    assert (given.quantize, given.quantize_modules) == ("int8", ("vit-mlp", "projector"))
    assert settings("--run", tmp_path).flat() == {
        "quantize": "nf4",
        "quantize_modules": ["vit-mlp"],
        "keep_modules": [],
    }
    assert settings("--run", tmp_path, "--quantize_modules", "projector").quantize_modules == ("projector",)
    assert settings("--run", tmp_path, "--quantize", "none").quantize == "none"
    for more in (["--quantize_modules", "vit-mlp"], ["--keep_modules", "vit-mlp", "--quantize", "none"]):
        with pytest.raises(ConfigError, match=f"^{more[0]}: it says which linears are quantised, and none is"):
            settings("--base", TINY_BASE, *more)


def test_a_merged_base_answers_as_base_and_adapter_do_and_in_bf16_as_itself(
    chat, adapter, picture, tmp_path, monkeypatch
):
    merge_adapter(TINY_BASE, adapter, tmp_path / "merged")
    dtypes = []
    stream = Chat.stream

    def seen(self, *question):
        dtypes.append({parameter.dtype for parameter in self.model.parameters()})
        return stream(self, *question)

    monkeypatch.setattr(Chat, "stream", seen)
    options = ["--version", "base", "--local_tokenizer", TINY_BASE, "--image", picture, "--prompt", "CAPTCHA:"]
    status, out, err = chat("--base", tmp_path / "merged", *options)
    assert (status, out) == (0, f"{expected(adapter, picture)}\n"), err
    for base, adapters in ((tmp_path / "merged", []), (TINY_BASE, ["--adapter", adapter])):
        dtypes.clear()
        status, out, err = chat("--base", base, *adapters, "--bf16", *options)
        loaded = load_cogvlm(base, dtype=torch.bfloat16)
        folders = {"mine": adapter} if adapters else {}
        in_bf16 = Chat(loaded, adapters=folders, version="base", tokenizer=TINY_BASE).ask("CAPTCHA:", picture)
        assert (status, out) == (0, f"{in_bf16}\n"), err
        assert torch.bfloat16 in dtypes[0] and dtypes[0] == dtypes[1]


def test_lines_of_a_pipe_are_a_conversation(chat, adapter, picture, monkeypatch):
    lines = f"{picture}\nCAPTCHA:\n/nothing\n/base\nCAPTCHA:\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, _ = chat("--base", TINY_BASE, "--version", "base", "--adapter", adapter)
    assert (status, out.splitlines()) == (
        0,
        [
            "mine answers (there are also: base); /help lists the commands",
            "the prompt format is base, which has no place for earlier turns: every question is alone",
            f"about {picture}",
            expected(adapter, picture),
            "error: there is no command /nothing; /help lists them",
            "base answers (there are also: mine)",
            expected(None, picture),
        ],
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--base missing: give the folder of a base, or --run RUN_FOLDER"),
        (["--base", "nowhere"], "nowhere"),
        (["--base", TINY_BASE, "--adapter", "nowhere", "--image", "no.png"], "--image: no.png is no file"),
        (["--base", TINY_BASE, "--adapter", "nowhere"], "--adapter: nowhere"),
        (["--run", "nowhere"], "--run: nowhere is no run folder"),
        (
            ["--base", TINY_BASE, "--model-parallel-size", "2"],
            "got 2 and 1 rank, wanted as many; start them with torch",
        ),
        (["--base", TINY_BASE, "--top_k", "3"], "temperature 0 draws nothing"),
        (["--base", TINY_BASE, "--temperature", "-1"], "--temperature: got '-1', wanted a number, 0 or above"),
        (["--base", TINY_BASE, "--prompt", "x" * 3000], "the question takes 3"),
    ],
)
def test_mistakes_are_told(chat, options, message):
    try:
        status, out, err = chat(*options)
    except SystemExit as end:  # argparse ends by itself
        status, out, err = end.code, "", message
    assert status == 2 and out == "" and message in err and "Traceback" not in err


def test_adapters_are_called_by_their_runs():
    folders = ["runs/a/adapter", "runs/b.1/adapter/800", "c/a/adapter/best", "/x/base", "/adapter"]
    assert dict(zip(folders, names_of(folders))) == {
        "runs/a/adapter": "a",
        "runs/b.1/adapter/800": "b_1",
        "c/a/adapter/best": "a-2",
        "/x/base": "adapter",
        "/adapter": "adapter-2",
    }


@pytest.mark.matrix
@pytest.mark.timeout(300)
def test_two_ranks_of_a_model_answer_as_one(adapter, picture):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["sat_lora.cli", "chat", "--base", TINY_BASE, "--version", "base", "--adapter", adapter]
    lines = f"{picture}\nCAPTCHA:\n/base\nCAPTCHA:\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), "--model-parallel-size", "2"], input=lines, capture_output=True, text=True,
        timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[2:] == [
        f"about {picture}",
        expected(adapter, picture),
        "base answers (there are also: mine)",
        expected(None, picture),
    ]


def test_nobody_is_answered_any_more_once_the_reader_has_gone(monkeypatch):
    """As with `sat-lora chat < questions | head -1`: the stream takes what nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", LastingStream(os.fdopen(writer, "w")))
    taken = []
    for line in _while_somebody_reads(["one", "two", "three"]):
        taken.append(line)
        print("an answer", flush=True)
    assert taken == ["one"]
