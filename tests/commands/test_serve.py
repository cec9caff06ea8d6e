"""`sat-lora serve`: mistakes before the base is loaded, and the whole command under load."""

import importlib
import random
import socket
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks import bench_serve
from sat_lora import ConfigError
from sat_lora.cli import main
from sat_lora.commands.serve import KEY
from sat_lora.files.foreign import parse_json
from sat_lora.serve.questions import RequestError, read_question
from tests.support.paths import TINY_BASE


@pytest.fixture
def serve(capsys, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("sat_lora.commands.chat.load_chat", lambda options: pytest.fail("the base is loaded"))

    def command(*arguments):
        try:
            status = main(["serve", *map(str, arguments)])
        except SystemExit as end:  # argparse ends by itself
            status = end.code
        return status, capsys.readouterr().err

    return command


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", ""])
def test_an_address_that_others_reach_wants_a_key(serve, host):
    status, error = serve("--base", TINY_BASE, "--host", host)
    assert status == 2 and f"others may reach it; give a key in {KEY}, or with --api-key" in error


def test_a_port_in_use_and_addresses_that_are_none(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, error = serve("--base", TINY_BASE, "--port", port)
    assert status == 2 and f"--port {port}: Address already in use at 127.0.0.1" in error
    assert serve("--base", TINY_BASE, "--port", 70_000)[0] == 2
    status, error = serve("--base", TINY_BASE, "--host", "no-such-host.invalid", "--api-key", "x")
    assert status == 2 and "give an address of this machine" in error


def test_missing_packages_are_named(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, error = serve("--base", TINY_BASE)
    assert status == 2 and "pip install 'sat_lora[serve]'" in error


@pytest.mark.parametrize("key", ["schlüssel", "a\nb", " secret", "secret\r", "\x7f", "密钥"])
def test_a_key_that_no_header_can_bring_is_refused_and_not_shown(serve, monkeypatch, key):
    for arguments, variable in ((("--api-key", key), ""), ((), key)):
        monkeypatch.setenv(KEY, variable)
        status, error = serve("--base", TINY_BASE, "--host", "0.0.0.0", *arguments)
        assert status == 2 and "give visible ASCII characters" in error and key.strip() not in error


@pytest.mark.parametrize("option", ["--max-body", "--max-seconds", "--max-waiting", "--max-batch", "--port"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e999", "many", ""])
def test_limits_that_are_no_numbers(serve, option, value):
    status, error = serve("--base", TINY_BASE, f"{option}={value}")
    assert status == 2 and option in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, has_gradio, said",
    [
        ((), True, "page: http://127.0.0.1:"),
        ((), False, "page: none; pip install 'sat_lora[page]' for one"),
        (("--no-page",), True, None),
    ],
)
def test_what_is_said_of_the_page(arguments, has_gradio, said, monkeypatch, capsys):
    import uvicorn

    from sat_lora.commands import serve as module
    from sat_lora.serve import app

    chat = SimpleNamespace(speaker="base", adapters=[])
    pages = []
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("sat_lora.commands.chat.load_chat", lambda options: chat)
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace() if has_gradio else None)
    monkeypatch.setattr(app, "build_app", lambda session, **settings: pages.append(settings["with_page"]))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    assert main(["serve", "--base", str(TINY_BASE), "--port", "0", *arguments]) == 0
    printed = capsys.readouterr().out
    assert pages == [said is not None and has_gradio]
    assert said in printed if said else "page" not in printed


def test_a_page_without_its_packages_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sat_lora.serve.page", raising=False)
    with pytest.raises(ConfigError, match=r"the page needs more packages \(.*\): pip install 'sat_lora\[page\]'"):
        importlib.import_module("sat_lora.serve.page")


def test_one_process_alone(serve, monkeypatch):
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("MASTER_PORT", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    status, error = serve("--base", TINY_BASE)
    assert status == 2 and "sat-lora serve runs as one process; start it without a launcher" in error


def test_what_the_load_sends_malformed_is_refused_but_what_is_a_request_after_all():
    draw = random.Random(0)
    kinds = Counter()
    for _ in range(1000):
        kind, body = bench_serve.malformed(draw)
        try:
            read_question(parse_json(body), speakers=["base", "mine"], keeps_history=True)
            kinds[kind, "request"] += 1
            assert bench_serve.is_request(body)
        except (RequestError, ValueError):
            kinds[kind, "refused"] += 1
            assert not bench_serve.is_request(body)
    assert {kind for kind, _ in kinds} == {*bench_serve.KINDS} and kinds["overwritten", "request"] > 20
    assert [kind for kind, what in kinds if what == "request"] == ["overwritten"]


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "clients, seconds, malformed, waiting, batch", [(32, 60, 1000, 64, 1), (8, 10, 50, 3, 1), (32, 20, 200, 64, 8)]
)
def test_under_load_nothing_is_lost(clients, seconds, malformed, waiting, batch):
    figures = bench_serve.measure(clients, seconds, malformed, waiting, batch)
    assert figures["wrong_answers"] == 0 and figures["statuses"].keys() <= ({200} if waiting > clients else {200, 429})
    assert (429 in figures["statuses"]) == (waiting < clients)
    least, most = figures["least_and_most_of_a_client"]
    assert batch > 1 or figures["most_answers_to_another"] <= 2  # in the order of arrival
    assert waiting < clients or 2 * least >= most  # who is in no batch yet is not passed over again and again
    assert figures["bomb_status"] == 400
    overwritten = figures["malformed"].pop("overwritten")
    answered = sum(overwritten.pop(status, 0) for status in (200, 429))
    assert answered == figures["malformed_that_are_requests"]  # each of them, or told that the queue is full
    assert overwritten.keys() <= {400, 404}
    assert [*map(set, figures["malformed"].values())] == [{400}] * 3
    assert figures["left_by_clients"] > 0, figures
    assert waiting < clients or figures["counted"].get(499, 0) > 0, figures
    assert figures["burst"].keys() == {200, 429} and sum(figures["burst"].values()) == 3 * (waiting + batch)
    assert figures["counted"].keys() <= {200, 400, 404, 429, 499}
    before, after = figures["memory_mib"]
    assert after < before + 100
    assert figures["status"] == -15


def answers_of_a_server(takes, clients=6, answers=120):
    """(client, asked, answered) of clients who ask again at once, until the server, which takes one of those that wait
    by `takes`, has given so many answers."""
    waiting = [(client, 0.0) for client in range(clients)]
    given = []
    for now in range(1, answers + clients + 1):
        client, asked = waiting.pop(takes(waiting))
        given.append((client, asked, float(now)))
        if now <= answers:
            waiting.append((client, float(now)))
    return given


@pytest.mark.parametrize(
    "takes, most",
    [
        (lambda waiting: 0, 1),  # the oldest
        (lambda waiting: -1, 121),  # the newest
        (lambda waiting: len(waiting) // 2, 41),  # somebody in between
    ],
)
def test_a_server_that_passes_somebody_over_is_noticed(takes, most):
    assert bench_serve.most_answers_to_another(answers_of_a_server(takes)) == most
    assert bench_serve.most_answers_to_another(answers_of_a_server(takes, clients=1)) == 0
