"""Requests that are too large, malformed, unauthorised or for nobody: each one error of the right status, and the next
question is answered.
"""

import base64
import gzip
import io
import json
import socket
import threading
import time

import anyio
import httpx
import openai
import pytest
from PIL import Image

from sat_lora.serve import app
from sat_lora.serve.app import RequestLimits
from sat_lora.serve.bodies import BODIES_HELD, Bodies
from sat_lora.serve.questions import RequestError
from tests.support.serving import chat_of, served
from tests.support.talking import adapters, base, picture  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.usefixtures("single_process_group"), pytest.mark.timeout(120)]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def address(base, adapters, single_process_group):  # noqa: F811
    with served(chat_of(base, {"mine": adapters["mine"]}), limits=RequestLimits(body=2**20)) as address:
        yield address


@pytest.fixture(scope="module")
def http(address):
    """One client for all: making one takes longer than what it asks."""
    with httpx.Client(base_url=address, timeout=60, verify=False) as client:
        yield client


def of_picture(content: bytes, kind: str = "image/png") -> list[dict]:
    url = f"data:{kind};base64," + base64.b64encode(content).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]


def png(**settings) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20)).save(out, "PNG", **settings)
    return out.getvalue()


def asked(content, **more) -> dict:
    return {"model": "mine", "messages": [{"role": "user", "content": content}], **more}


PICTURES = {
    "an svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "a page": b"<html><img src='http://127.0.0.1/'></html>",
    "a pdf": b"%PDF-1.4\n",
    "a shell script of ImageMagick": b"push graphic-context\nimage over 0,0 0,0 'https://127.0.0.1/x'",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "nothing": b"",
    "half a png": png()[:40],
    "zeros": b"\0" * 1000,
    "a png of text": png() and b"\x89PNG\r\n\x1a\n" + b"tEXt" * 50,
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "a gif of huge size": b"GIF89a\xff\xff\xff\xff\xf7\x00\x00" + b"\0" * 900,
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_none(name, http):
    answer = http.post(CHAT, json=asked(of_picture(PICTURES[name])))
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("the image: "), answer.text


URLS = """
http://127.0.0.1/x.png https://169.254.169.254/latest/meta-data ftp://localhost/x file:///etc/passwd /etc/passwd
../x.png ~/x.png data:image/png,AAAA data:;base64,%41 data:image/png;base64 blob:abc gopher://localhost/
\\\\host\\share\\x.png data:text/plain;base64,L2V0Yy9wYXNzd2Q= javascript:alert(1) pipe:cat s3://bucket/x.png
""".split()


@pytest.mark.parametrize("url", URLS)
def test_a_picture_by_an_address_or_path(url, http):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    answer = http.post(CHAT, json=asked(parts))
    assert answer.status_code == 400 and "root:" not in answer.text


BODIES = {
    "nothing": b"",
    "a form": b"model=mine&messages=x",
    "compressed": gzip.compress(json.dumps(asked("x")).encode()),
    "utf-16": json.dumps(asked("x")).encode("utf-16"),
    "two of them": json.dumps(asked("x")).encode() * 2,
    "a number without end": b'{"messages": ' + b"9" * 5000 + b"}",
    "infinity": b'{"messages": Infinity}',
    "deep": b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "no closing": json.dumps(asked("x")).encode()[:-1],
    "a null byte after it": json.dumps(asked("x")).encode() + b"\0",
    "a name twice": b'{"messages": [], "messages": [{"role": "user"}]}',
    "multipart": b"--x\r\nContent-Disposition: form-data; name=file; filename=/etc/passwd\r\n\r\nx\r\n--x--",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_none(name, http):
    answer = http.post(CHAT, content=BODIES[name])
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", answer.text
    assert len(answer.text) < 1000


ODD = {
    "half a surrogate": asked("\ud800"),
    "a null character": asked("a\0b"),
    "a long question": asked("x" * 200_000),
    "an empty one": asked(""),
    "a huge penalty": asked("x", temperature=1, repetition_penalty=1e308),
    "a tiny penalty": asked("x", temperature=1, repetition_penalty=1e-308),
    "a tiny temperature": asked("x", temperature=1e-320),
    "a huge temperature": asked("x", temperature=1e308),
    "huge top_k": asked("x", temperature=1, top_k=2**70),
    "tiny top_p": asked("x", temperature=1, top_p=1e-320),
    "huge max_tokens": asked("x", max_tokens=10**300),
    "a long stop": asked("x", stop=["y" * 500_000]),
    "seed of 64 bits": asked("x", temperature=1, seed=-(2**63)),
    "no content": {"messages": [{"role": "user"}]},
    "a role of its own": {"messages": [{"role": "user\n", "content": "x"}]},
    "a name with control characters": asked("x", model="\x1b[31m"),
    "tools": asked("x", tools=[], tool_choice="none"),
    "a format": asked("x", response_format={"type": "json_object"}),
    "logprobs": asked("x", logprobs=True),
    "a temperature of 400 digits": asked("x", temperature=10**400),
    "top_p of 400 digits": asked("x", temperature=1, top_p=10**400),
    "a penalty of 400 digits": asked("x", repetition_penalty=-(10**400)),
    "another penalty of 400 digits": asked("x", presence_penalty=10**400),
    "top_k of 400 digits": asked("x", temperature=1, top_k=-(10**400)),
    "a seed of 4,000 digits": asked("x", temperature=1, seed=10**4000),
    "n of 4,000 digits": asked("x", n=10**4000),
    "a text of 4,000 digits": asked(10**4000),
    "no part": asked([]),
    "a model that is a path": asked("x", model="../../etc/passwd"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_answered_or_refused(name, http):
    answer = http.post(CHAT, content=json.dumps(ODD[name]))
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"], answer.text
    assert len(answer.text) < 2000 and "\x1b" not in answer.text
    assert http.post(CHAT, json=asked("12", max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", CHAT, 405), ("PUT", CHAT, 405), ("OPTIONS", CHAT, 405), ("TRACE", CHAT, 405), ("POST", f"{CHAT}/", 404),
        ("POST", "/v1/models", 405), ("GET", "/v1/models/", 404), ("GET", "/v1/models/yours", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404), ("POST", "/v1/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "//etc/passwd", 404), ("POST", "/health", 405),
        ("DELETE", "/v1/models/mine", 405), ("GET", "/", 404), ("GET", "/v1", 404), ("GET", "/%00", 404),
    ],
)  # fmt: skip
def test_addresses_and_methods_that_are_none(method, path, status, http):
    answer = http.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["message"], answer.text


EVIL = [
    {"origin": "https://evil.example", "content-type": "text/plain"},  # which a browser sends without asking before
    {"origin": "null", "content-type": "application/x-www-form-urlencoded"},
    {"origin": "http://127.0.0.1:1", "content-type": "text/plain"},  # another server of this machine
    {"host": "evil.example", "origin": "http://evil.example"},  # whose name leads to 127.0.0.1
    {"host": "evil.example:8000"},
]


@pytest.mark.parametrize("headers", EVIL)
def test_the_pages_of_other_sites_ask_nothing_where_there_is_no_key(headers, http):
    before = http.get("/metrics").text
    answer = http.post(CHAT, content=json.dumps(asked("12", max_tokens=1)), headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == 403, answer.text
    for path in ("/v1/models", "/metrics"):
        assert http.get(path, headers=headers).status_code == 403
    assert "access-control-allow-origin" not in http.options(CHAT, headers=headers).headers
    assert http.get("/health", headers=headers).status_code == 200
    assert [line for line in http.get("/metrics").text.splitlines() if "requests_total{" in line] == [
        line for line in before.splitlines() if "requests_total{" in line
    ]
    own = {"host": "localhost:8000", "origin": "http://localhost:8000", "content-type": "text/plain"}
    assert http.post(CHAT, content=json.dumps(asked("12", max_tokens=1)), headers=own).status_code == 200


def test_with_a_key_it_alone_decides(base, adapters):  # noqa: F811
    with served(chat_of(base, {"mine": adapters["mine"]}), api_key="secret") as address:
        for headers in ({}, *EVIL):
            answers = [
                httpx.get(f"{address}/v1/models", headers={**headers, **key}).status_code
                for key in ({}, {"authorization": "Bearer secret"})
            ]
            assert answers == [401, 200]


def test_what_nobody_thought_of_is_one_error_a_count_and_a_line_of_the_log(http, monkeypatch, caplog):
    def fault(*arguments, **more):
        raise ZeroDivisionError("no \x1b[31m secret")

    def failures() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if 'requests_total{status="500"}' in line)

    before = failures()
    places = [("read_question", {}), ("_told", {}), ("_told", {"stream": True}), ("_model", None)]
    for number, (place, more) in enumerate(places, start=1):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(app, place, fault)
            if more is None:
                answer = http.get("/v1/models")
            else:
                answer = http.post(CHAT, json=asked("12", max_tokens=1, **more))
        assert "Traceback" not in answer.text and "secret" not in answer.text
        if more == {"stream": True}:  # which has begun
            *_, last = filter(None, answer.text.split("\n\n"))
            content = json.loads(last.removeprefix("data: "))
        else:
            assert answer.status_code == 500 and answer.headers["content-type"] == "application/json"
            content = answer.json()
        assert content["error"]["code"] == 500 and content["error"]["type"] == "server_error"
        logged = [record.getMessage() for record in caplog.records if "secret" in record.getMessage()]
        assert len(logged) == 1 and "ZeroDivisionError: no \\x1b[31m secret" in logged[0] and "\x1b" not in logged[0]
        assert failures() == before + number
        assert http.post(CHAT, json=asked("12", max_tokens=1)).status_code == 200


def test_without_the_page_its_address_says_how_to_get_it(address):
    assert "pip install 'sat_lora[page]' for a page here" in httpx.get(address).json()["error"]["message"]
    assert "pip install" not in httpx.get(f"{address}/nowhere").text


def test_a_model_is_told_of_by_its_name(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    assert client.models.retrieve("mine").id == "mine"
    with pytest.raises(openai.NotFoundError, match="there are: mine, base"):
        client.models.retrieve("yours")


def test_bytes_that_are_no_http_end_their_own_connection(address):
    host, port = address.removeprefix("http://").split(":")
    for content in (
        b"\0" * 100,
        b"\x16\x03\x01\x02\x00",
        b"GET " + b"/" * 100_000,
        b"SSH-2.0-x\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_body_that_never_ends_is_given_up(base, adapters):  # noqa: F811
    with served(chat_of(base, {"mine": adapters["mine"]}), limits=RequestLimits(seconds=0.3)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_many_large_bodies_at_once_are_refused_and_none_is_forgotten():
    """The bytes that are being read have a limit together, and are given back however a request ends."""
    bodies = Bodies(100, 5)
    held = [b"x" * 100] * BODIES_HELD

    async def never():
        await anyio.sleep(60)

    def receive_of(*parts, ends):
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

        async def receive():
            if messages:
                return messages.pop(0)
            if ends == "gone":
                return {"type": "http.disconnect"}
            await (gate.wait() if ends == "open" else never())
            return {"type": "http.request", "body": b"", "more_body": False}

        return receive

    gate = None

    async def run():
        nonlocal gate
        gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for part in held:
                tasks.start_soon(bodies.read, receive_of(part, ends="open"))
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RequestError, match="too many large requests at once") as error:
                await bodies.read(receive_of(b"x", ends="open"))
            assert error.value.status == 429
            gate.set()
        for parts, ends, status in (([b"x" * 101], "open", 413), ([b"x"], "gone", 499)):
            with pytest.raises(RequestError) as error:
                await bodies.read(receive_of(*parts, ends=ends))
            assert error.value.status == status
        assert await bodies.read(receive_of(b"ab", b"c", ends="open")) == b"abc" and bodies._held == 0

    anyio.run(run)


def test_headers_of_a_key_that_are_none(base, adapters):  # noqa: F811
    chat = chat_of(base, {"mine": adapters["mine"]})
    with served(chat, api_key="secret") as address, httpx.Client(base_url=address, verify=False) as http:
        values = ["", "secret", "Bearer", "Bearer  secret", "Basic c2VjcmV0", "Basic OnNlY3JldA==", "bearer Secret"]
        for value in [*values, "Token secret", "Bearer secret, Bearer secret", "Bearer secret2", "Bearer s%65cret"]:
            assert http.get("/v1/models", headers={"authorization": value}).status_code == 401, value
        for path in (
            "/v1/models/",
            "/V1/models",
            "/v1/models?api_key=secret",
            "/health/",
            "/health/../v1/models",
            "//health",
        ):
            assert http.get(address + path).status_code == 401, path
        assert http.get("/v1/models", headers={"authorization": "bearer secret"}).status_code == 200


def test_a_flood_of_clients_that_go_leaves_the_server_as_it_was(address):
    threads = threading.active_count()
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(asked("12")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for number in range(40):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall((head + body)[: len(head) + len(body) * (number % 5) // 4])
    deadline = time.monotonic() + 60
    while " 0.0" not in httpx.get(f"{address}/metrics").text.partition("\nsat_lora_waiting_requests")[2].split("\n")[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert httpx.post(address + CHAT, json=asked("12", max_tokens=1), timeout=60).status_code == 200
    assert threading.active_count() <= threads + 1
