"""What stands before the server without a key: no other site. And before the page: few addresses, no file, nothing
large; and everything else as it was.
"""

import json

import anyio
import httpx
import pytest
from starlette.responses import JSONResponse

from sat_lora.serve.bodies import Bodies
from sat_lora.serve.gate import HEADERS, Gate, OwnSenders, is_of_page, is_own_name

JOIN = "/gradio_api/queue/join"


async def page(scope, receive, send):
    """Stands for Gradio: says what reached it."""
    message = await receive()
    body = message.get("body", b"").decode()
    answer = {"page": scope["path"], "query": scope["query_string"].decode(), "body": body}
    await JSONResponse(answer, headers={"x-content-type-options": "none", "x-own": "1"})(scope, receive, send)


async def application(scope, receive, send):
    await JSONResponse({"application": scope["path"]})(scope, receive, send)


def refusal(error):
    return JSONResponse({"error": str(error)}, error.status)


def asked(method, path, *, has_key=True, most=1000, **request):
    gate = Gate(application, page=page, refuse=refusal, bodies=Bodies(most, 60))
    server = gate if has_key else OwnSenders(gate, refuse=refusal)

    async def send():
        transport = httpx.ASGITransport(server)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, path, **request)

    return anyio.run(send)


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css?v=1", "/assets/index-Aa1_.js", "/static/img/x.svg", "/gradio_api/queue/data"]
)
def test_what_the_page_needs_passes(path):
    answer = asked("GET", path)
    assert answer.json()["page"] == path.partition("?")[0]
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS and answer.headers["x-own"] == "1"
    assert len(answer.headers.get_list("x-content-type-options")) == 1


# Every address of Gradio 6 that reads files, fetches, edits the app, or tells of it; and some of nobody.
OF_FILES = """
/gradio_api/file=/etc/passwd /file=/etc/passwd /gradio_api/file/etc/passwd /gradio_api/proxy=http://127.0.0.1/
/gradio_api/upload /upload /gradio_api/upload_progress /gradio_api/component_server /gradio_api/process_recording
/gradio_api/vibe-edit /gradio_api/vibe-code /gradio_api/undo-vibe-edit /gradio_api/deep_link /gradio_api/runs
/gradio_api/call/answer /gradio_api/call/v2/answer /gradio_api/run/answer /gradio_api/api/answer /gradio_api/mcp/sse
/gradio_api/stream/a/b/1/playlist.m3u8 /gradio_api/custom_component/a/client/b/c /gradio_api/dev/reload
/gradio_api/token /gradio_api/user /gradio_api/login_check /gradio_api/app_id /gradio_api/openapi.json
/gradio_api/profiling/traces /gradio_api/run-history/connect /monitoring /monitoring/summary /login /logout
/manifest.json /pwa_icon /robots.txt /svelte/a.js /docs /openapi.json /v1/models /health /nothing
/assets/../../../../etc/passwd /assets/..%2f..%2fetc/passwd /assets/%2e%2e/%2e%2e/x /static//etc/passwd /assets/.env
/assets/ /static/x/..%2fy //etc/passwd /%2fetc/passwd /gradio_api/queue/status /gradio_api/heartbeat/../file=/etc/passwd
""".split()


@pytest.mark.parametrize("path", OF_FILES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_reaches_gradio(method, path):
    answer = asked(method, path)
    assert "page" not in answer.json() and "application" in answer.json(), answer.text


@pytest.mark.parametrize("method, path", [("POST", "/"), ("PUT", JOIN), ("GET", JOIN), ("DELETE", "/config")])
def test_methods_that_an_address_does_not_take(method, path):
    assert asked(method, path).status_code == 405


def test_what_is_asked_of_the_page_itself_names_no_stored_state():
    assert asked("GET", "/?deep_link=../../x&__theme=dark").json() == {"page": "/", "query": "", "body": ""}
    assert asked("GET", "/gradio_api/queue/data?session_hash=a").json()["query"] == "session_hash=a"


def test_a_question_passes_as_it_is():
    body = json.dumps({"data": ["what?", "data:image/png;base64,AAAA", "mine", False, 0, {"turns": []}], "fn_index": 0})
    assert asked("POST", f"{JOIN}?", content=body).json()["body"] == body


@pytest.mark.parametrize(
    "value",
    [
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"url": "http://169.254.169.254/latest"},
        {"path": "http://127.0.0.1:22/"},
        [{"file": {"path": "x"}}],
        {"a": {"b": [[{"path": None}]]}},
        {"is_stream": True},
    ],
)
def test_values_that_name_a_file_or_an_address_do_not(value):
    answer = asked("POST", JOIN, json={"data": [value], "fn_index": 0, "session_hash": "a"})
    assert (answer.status_code, answer.json()) == (400, {"error": "the page takes no file, address or path"})


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b"\xff", b"[" * 900, b'{"a":' * 190, b"null"])
def test_bodies_that_are_none(body):
    assert asked("POST", JOIN, content=body).status_code == 400


def test_a_body_has_a_limit_whatever_its_header_says():
    async def parts():
        for _ in range(20):
            yield b"x" * 100

    for content in (b"x" * 1001, parts()):
        answer = asked("POST", JOIN, content=content)
        assert answer.status_code == 413 and "longer than 1000 bytes" in answer.text


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost:8001", "http://localhost.evil.example"]
)
def test_no_other_site_sends_requests(origin):
    for method, path in (("POST", JOIN), ("GET", "/config")):
        assert asked(method, path, headers={"origin": origin}).status_code == 403
    assert asked("GET", "/config", headers={"origin": "http://localhost:8000"}).status_code == 200
    for method, path in (("POST", "/v1/chat/completions"), ("OPTIONS", "/v1/models"), ("GET", "/metrics")):
        assert asked(method, path, has_key=False, headers={"origin": origin}).status_code == 403
        assert asked(method, path, has_key=True, headers={"origin": origin}).status_code == 200  # whoever has the key
        for own in ({}, {"origin": "http://localhost:8000"}):
            assert asked(method, path, has_key=False, headers=own).json() == {"application": path}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "[::",
        "@",
        "localhost@evil.example",
    ],
)
def test_without_a_key_no_other_name_leads_here(host):
    """A site may give its own name the address 127.0.0.1; what its page asks for then has no other origin."""
    assert not is_own_name(host)
    own_site = {"host": host, "origin": f"http://{host}"}
    for path in ("/", "/v1/models", "/v1/chat/completions", "/metrics", "/nowhere"):
        assert asked("GET", path, has_key=False, headers={"host": host}).status_code == 403
        assert asked("POST", path, has_key=False, headers=own_site).status_code == 403
    assert asked("GET", "/v1/models", has_key=True, headers={"host": host}).status_code == 200
    assert asked("GET", "/health", has_key=False, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "127.3.2.1", "me.localhost", "LOCALHOST:80"]
)
def test_names_of_this_machine(host):
    assert is_own_name(host)
    assert asked("GET", "/v1/models", has_key=False, headers={"host": host}).status_code == 200


def test_the_page_s_addresses_are_few():
    assert is_of_page("/") and not any(map(is_of_page, OF_FILES))
