"""The page itself, in Gradio: asked over the server's socket as a browser asks it, and in a browser."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import threading

import httpx
import pytest

from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from sat_lora.serve.app import RequestLimits
from tests.support.serving import chat_of, served

pytest.importorskip("gradio", reason="the page's packages are not installed: pip install 'sat_lora[page]'")
pytestmark = [pytest.mark.usefixtures("single_process_group"), pytest.mark.timeout(180)]
JOIN = "/gradio_api/queue/join"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def address(base, adapters, single_process_group):
    with served(chat_of(base, adapters), limits=RequestLimits(body=2**20), with_page=True) as address:
        yield address


def data_url(picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def ask(address, question, picture="", speaker="mine", compares=False, temperature=0, kept=None, **client):
    """(kept, shown, what stays in the box), all of them as they grow."""
    from gradio_client.utils import apply_diff

    data = [question, picture, speaker, compares, temperature, kept]
    with httpx.Client(base_url=address, timeout=60, verify=False, **client) as http:
        body = {"data": data, "fn_index": 0, "session_hash": "abc", "event_data": None, "trigger_id": None}
        answer = http.post(JOIN, json=body)
        assert answer.status_code == 200, answer.text
        states = []
        with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "abc"}) as events:
            for line in filter(None, events.iter_lines()):
                event = json.loads(line.removeprefix("data: "))
                if event["msg"] == "process_generating":
                    assert event["success"], event
                    changes = event["output"]["data"]
                    states.append([*map(apply_diff, states[-1], changes)] if states else changes)
                if event["msg"] == "process_completed":
                    return states
    raise AssertionError("the page has not answered")


def test_answers_are_those_of_a_conversation_piece_by_piece(base, adapters, picture, address):
    chat = chat_of(base, adapters)
    states = ask(address, "12 34", data_url(picture))
    kept, shown, stays = states[-1]
    assert kept["turns"] == [["12 34", [["mine", chat.ask("12 34", picture).strip(), ""]]]] and stays == ""
    assert len(states) > 2 and 'data-speaker="mine"' in shown
    more, _, _ = ask(address, "more", data_url(picture), kept=kept)[-1]
    assert [turn[0] for turn in more["turns"]] == ["12 34", "more"]
    assert more["turns"][1][1][0][1] == chat.ask("more").strip()
    other, _, _ = ask(address, "12 34", "", kept=more)[-1]  # about something else: begun anew
    assert [turn[0] for turn in other["turns"]] == ["12 34"]


def test_base_and_adapter_answer_side_by_side(base, adapters, picture, address):
    chat = chat_of(base, adapters)
    chat.show(picture)
    expected = [[name, "".join(pieces).strip(), ""] for name, pieces in chat.compare("12 34")]
    for speaker, columns in (("mine", [0, 1]), ("other", [0, 2]), ("base", [0, 1])):
        kept, shown, _ = ask(address, "12 34", data_url(picture), speaker, True)[-1]
        assert kept["turns"][0][1] == [expected[column] for column in columns]
        assert shown.count('class="reply"') == 2


@pytest.mark.parametrize(
    "problem, arguments",
    [
        ("type a question", dict(question="  ")),
        ("model: got a list", dict(question="x", speaker=["mine"])),
        ("the image: cannot be read as an image", dict(question="x", picture="data:image/png;base64,AAAA")),
        ("no address is fetched and no file is read", dict(question="x", picture="http://127.0.0.1/x.png")),
        ("no address is fetched and no file is read", dict(question="x", picture="/etc/passwd")),
        ("the picture is none of this page", dict(question="x", picture=[1])),
        ("the conversation is none of this page", dict(question="x", kept={"turns": 3})),
        ("the question takes 3", dict(question="x" * 3000)),
    ],
)
def test_what_is_wrong_is_shown_and_the_question_stays(address, problem, arguments):
    ((kept, shown, stays),) = ask(address, **arguments)
    assert problem in shown.partition('role="alert">')[2]
    assert kept["turns"] == [] and stays == arguments["question"]


@pytest.mark.parametrize("values", [dict(speaker="yours"), dict(temperature=-1), dict(temperature="hot")])
def test_values_that_the_page_has_not_end_nothing(address, values):
    assert ask(address, "x", **values) == []
    assert ask(address, "x")[-1][0]["turns"]


class SlowChat(Chat):
    """A conversation whose steps take their time, until somebody is in a hurry."""

    hurry = threading.Event()

    def answer_together(self, questions):
        for pieces in super().answer_together(questions):
            yield pieces
            self.hurry.wait(0.02)


def test_a_tab_that_is_closed_ends_its_answer(base, adapters, picture):
    chat = SlowChat(load_cogvlm(base), adapters={"mine": adapters["mine"]}, version="chat", max_new_tokens=400)
    with served(chat, with_page=True) as address, httpx.Client(base_url=address, timeout=60, verify=False) as http:
        data = ["12 34", data_url(picture), "mine", False, 0, None]
        body = {"data": data, "fn_index": 0, "session_hash": "gone", "event_data": None, "trigger_id": None}
        assert http.post(JOIN, json=body).status_code == 200
        with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "gone"}) as events:
            next(line for line in events.iter_lines() if "process_generating" in line)
        chat.hurry.set()
        assert ask(address, "12")[-1][0]["turns"]
        metrics = http.get("/metrics").text
    assert 'sat_lora_requests_total{status="200"} 1.0' in metrics  # the answer that was left is none


def test_nothing_of_gradio_but_the_page_is_there(address):
    with httpx.Client(base_url=address, verify=False) as http:
        for path in (
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/proxy=http://127.0.0.1/",
            "/gradio_api/runs",
            "/login",
        ):
            assert http.get(path).status_code == 404, path
        for path in ("/gradio_api/upload", "/gradio_api/call/answer", "/gradio_api/vibe-code", "/upload"):
            assert http.post(path, files={"files": b"x"}).status_code == 404, path
        assert http.get("/v1/chat/completions").status_code == 405
        page = http.get("/", params={"deep_link": "../x"})
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    config = json.loads(page.text.partition("window.gradio_config = ")[2].partition(";</script>")[0])
    assert not config["analytics_enabled"] and not config.get("space_id")
    components = {component["type"] for component in config["components"]}
    assert components.isdisjoint({"image", "file", "uploadbutton", "chatbot", "multimodaltextbox", "gallery", "video"})


def test_bodies_are_bounded_and_hold_no_files(address):
    with httpx.Client(base_url=address, verify=False) as http:
        assert http.post(JOIN, content=b"x" * (2**20 + 1)).status_code == 413
        body = {"data": ["x", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}
        assert http.post(JOIN, json={**body, "session_hash": "a"}).status_code == 400
        assert http.get("/config", headers={"origin": "http://evil.example"}).status_code == 403
        assert http.get("/", headers={"host": "evil.example"}).status_code == 403


def test_nothing_is_fetched_and_nothing_kept_on_the_disk(base, adapters, picture, tmp_path, monkeypatch):
    hosts = set()
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **named: hosts.add(host) or look_up(host, *more, **named)
    )
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # of whoever starts it
    chat = chat_of(base, {"mine": adapters["mine"]})
    with served(chat, with_page=True) as address:
        url = data_url(picture)
        assert ask(address, "![x](http://example.invalid/x.png)", url)[-1][0]["turns"]
        for path in ("/", "/config", "/theme.css"):
            assert httpx.get(address + path).status_code == 200
    assert {host.decode() if isinstance(host, bytes) else host for host in hosts} <= {"127.0.0.1", "localhost", None}
    assert [path for path in (tmp_path / "gradio").rglob("*") if path.is_file()] == []


WEIRD = [
    {},
    {"data": []},
    {"data": ["x"], "fn_index": 0, "session_hash": "w"},
    {"data": ["x"] * 50, "fn_index": 0, "session_hash": "w"},
    {"data": "x", "fn_index": 0, "session_hash": "w"},
    {"data": [{}] * 6, "fn_index": 0, "session_hash": "w"},
    {"data": [None] * 6, "fn_index": 0, "session_hash": "w"},
    {"data": [1e300, 3, True, "x", [], "x"], "fn_index": 0, "session_hash": "w"},
    {"data": ["\ud800", "", "mine", False, 0, None], "fn_index": 0, "session_hash": "w"},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": 99, "session_hash": "w"},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": -1, "session_hash": "w"},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": "a", "session_hash": "w"},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": 0, "session_hash": ["w"]},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": 0},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": 0, "session_hash": "w", "simple_format": True},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": 0, "session_hash": "w", "batched": True},
    {"data": ["x", "", "mine", False, 0, None], "fn_index": 0, "session_hash": "w", "event_data": {"_data": {}}},
]


@pytest.mark.matrix
def test_values_of_no_page_tell_nothing_and_end_nothing(address):
    secrets = ("Traceback", "site-packages", ".py", str(os.getcwd()))
    with httpx.Client(base_url=address, timeout=60, verify=False) as http:
        for number, body in enumerate(WEIRD):
            body = {**body, **({"session_hash": f"w{number}"} if body.get("session_hash") == "w" else {})}
            answer = http.post(JOIN, content=json.dumps(body))
            text = answer.text
            if answer.status_code == 200:
                with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": f"w{number}"}) as events:
                    for line in events.iter_lines():
                        text += line
                        if "process_completed" in line:
                            break
            assert not [secret for secret in secrets if secret in text], text
        for path in ("/config", "/", "/gradio_api/info", "/gradio_api/startup-events"):
            answer = http.get(path)
            assert answer.status_code == 200 and not [secret for secret in secrets if secret in answer.text], path
    assert ask(address, "x")[-1][0]["turns"]


def test_a_browser_brings_the_key_as_a_password_and_to_the_page_alone(base, adapters, picture):
    chat = chat_of(base, {"mine": adapters["mine"]})
    with served(chat, api_key="se:cret", with_page=True) as address:
        for auth in (None, ("me", "secret"), ("se:cret", "")):
            refused = httpx.get(address, auth=auth)
            assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
        assert httpx.get(address, headers={"authorization": "Basic ???"}).status_code == 401
        assert httpx.get(address, auth=("anybody", "se:cret")).status_code == 200
        assert httpx.get(address, headers={"authorization": "Bearer se:cret"}).status_code == 200
        refused = httpx.get(f"{address}/v1/models", auth=("anybody", "se:cret"))
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        kept, _, _ = ask(address, "12", data_url(picture), auth=("me", "se:cret"))[-1]
        assert kept["turns"][0][1][0][0] == "mine"


@pytest.fixture
def chromium():
    """The program of a browser, and options that it needs here."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no chromium here: apt-get install chromium")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which root has none of
    return program, ["--disable-gpu", *sandbox]


def test_a_browser_shows_the_page(address, chromium, tmp_path):
    """What is in the document once its scripts have run, by the browser alone; more of it is in the test below."""
    program, options = chromium
    options += ["--headless", f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    shown = subprocess.run(
        [program, *options, "--dump-dom", address], capture_output=True, text=True, errors="replace", timeout=150
    )
    document = re.sub(r"<(script|style)\b.*?</\1>", "", shown.stdout, flags=re.DOTALL)
    for text in (
        "Drop a picture here",
        "Who answers",
        "Base and adapter side by side",
        "Ask",
        "Forget the conversation",
    ):
        assert text in document, shown.stderr[-3000:]
    assert '<div class="conversation">' in document and "${" not in document
    complaints = [line for line in shown.stderr.splitlines() if "CONSOLE" in line and address in line]
    assert not [line for line in complaints if "Uncaught" in line or "Content Security Policy" in line]


@pytest.fixture
def browser_page(chromium):
    """A function that opens a page in headless Chromium, and what it asked for and complained of."""
    program, options = chromium
    reason = "Playwright is not installed: pip install 'sat_lora[matrix]'"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        page = browser.new_context(http_credentials={"username": "me", "password": "secret"}).new_page()
        page.set_default_timeout(60_000)
        page.seen = []
        page.complaints = []
        page.on("request", lambda asked: page.seen.append(asked.url))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        yield page
        browser.close()


class BoxesChat:
    """What a model would say that has learnt of boxes, with something that means to be obeyed."""

    TEXT = "a cat [[100,100,500,800]] ${document.title='taken'} <img src=x onerror=\"document.title='taken'\">"

    @classmethod
    def of(cls, chat):
        def answer_together(questions):
            for question in questions:
                question.answer.is_finished = True
            yield [cls.TEXT if chat.speaker == "mine" else f"I am {chat.speaker}"] * len(questions)

        chat.answer_together = answer_together
        return chat


@pytest.mark.matrix
def test_the_page_in_a_browser(base, adapters, picture, tmp_path, browser_page):
    chat = BoxesChat.of(chat_of(base, adapters))
    with served(chat, api_key="secret", with_page=True) as address:
        page = browser_page
        page.goto(address)
        page.get_by_label("Question").wait_for()
        page.set_input_files("#picture input[type=file]", picture)
        page.locator("#picture img").wait_for()
        page.get_by_label("Base and adapter side by side").check()
        page.get_by_label("Question").fill("what is this?")
        page.get_by_role("button", name="Ask").click()
        drawn = page.locator("#conversation img")
        drawn.wait_for()
        assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") == 60
        replies = page.locator("#conversation .reply")
        texts = [replies.nth(n).locator("p").inner_text() for n in range(replies.count())]
        assert texts == ["I am base", BoxesChat.TEXT]
        left, right = (replies.nth(n).bounding_box() for n in range(2))
        assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
        assert page.title() == "sat_lora"  # nothing that was said is obeyed
        page.get_by_label("Base and adapter side by side").uncheck()
        page.get_by_label("Who answers").click()
        page.get_by_role("option", name="other").click()
        page.get_by_label("Question").fill("and this?")
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("I am other").wait_for()
        assert page.locator("#conversation .turn").count() == 2
        page.get_by_role("button", name="Forget the conversation").click()
        page.locator("#conversation .turn").first.wait_for(state="detached")
        page.get_by_role("button", name="Without a picture").click()
        page.locator("#picture img").wait_for(state="detached")
        elsewhere = [url for url in page.seen if not url.startswith((address, "data:", "blob:"))]
        assert elsewhere == [] and page.complaints == []
