"""Load on `sat-lora serve`: many clients at once, clients that go, a picture bomb, requests that are malformed, and at
last more at once than may wait.

    python -m benchmarks.bench_serve --clients 32 --seconds 60 --batches 1 8 --out serve.json

Starts the server on the demo's base with an adapter of random values, in a process of its own, and tells how many
answers a second it gave, what one took of the processors, whatever else they did, how long they took, that nobody got
another's answer, how many requests were left by their clients, how many the full queue refused, and what it held in
memory.
"""

import argparse
import base64
import bisect
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch
from PIL import Image

from benchmarks.interleaved import environment, quartiles
from benchmarks.report import table, write_json
from sat_lora import LoraConfig, add_lora, save_adapter
from sat_lora.cogvlm import load_cogvlm

BASE = Path(__file__).parents[1] / "finetune_demo" / "tiny_cogvlm"
BOMB_SIDE = 30_000  # pixels: a png of some hundred kilobytes that would take 2.7 GB


def write_adapter(folder: Path) -> None:
    """An adapter of the demo's base whose delta is not zero."""
    torch.manual_seed(0)
    model, _ = load_cogvlm(BASE)
    add_lora(model, LoraConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, folder)


def question(picture: bytes, model: str) -> dict:
    """A request."""
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "CAPTCHA:"}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}


def noise(seed: int, side: int = 42) -> bytes:
    """A picture of noise, of its own for every seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A picture that is small as a file and would be large in memory."""
    out = io.BytesIO()
    Image.new("1", (BOMB_SIDE, BOMB_SIDE)).save(out, "PNG")
    return out.getvalue()


WHOLE = json.dumps(question(noise(0), "base")).encode()
KINDS = ("bytes", "cut", "overwritten", "messages")


def malformed(draw: random.Random) -> tuple[str, bytes]:
    """A kind and a body of it: bytes; the beginning of a request; one with three bytes overwritten; wrong messages.

    Of them only one that is overwritten can be a request after all, see `is_request`.
    """
    kind = draw.choice(KINDS)
    if kind == "bytes":
        return kind, draw.randbytes(draw.randrange(200))
    if kind == "cut":
        return kind, WHOLE[: draw.randrange(len(WHOLE))]
    if kind == "overwritten":
        place = draw.randrange(40)
        content = draw.choice([draw.randbytes(3), WHOLE[place : place + 3].replace(b" ", b"\n"), b"   "])
        return kind, WHOLE[:place] + content + WHOLE[place + 3 :]
    message = {"role": draw.choice(["user", "system", 3]), "content": draw.choice([[], 3, {}])}
    return kind, json.dumps({"messages": [message]}).encode()


def is_request(body: bytes) -> bool:
    """Whether a body says what the whole request says, other spaces between its parts or none."""
    try:
        return json.loads(body) == json.loads(WHOLE)
    except ValueError:
        return False


class Load:
    """What the clients saw."""

    def __init__(self, address: str):
        self.address = address
        self.statuses: Counter[int] = Counter()
        self.answered: list[tuple[int, float, float]] = []  # client, when it asked, when it had the answer
        self.wrong = 0
        self.per_client: Counter[int] = Counter()
        self.left = 0
        self._lock = threading.Lock()

    def ask_until(self, client: int, deadline: float, picture: bytes, expected: str | None) -> None:
        """Ask one question again and again."""
        model = ("base", "mine")[client % 2]
        with httpx.Client(base_url=self.address, timeout=120) as http:
            while time.monotonic() < deadline:
                start = time.monotonic()
                answer = http.post("/v1/chat/completions", json=question(picture, model))
                with self._lock:
                    self.statuses[answer.status_code] += 1
                    if answer.status_code == 200:
                        self.per_client[client] += 1
                        self.answered.append((client, start, time.monotonic()))
                        content = answer.json()["choices"][0]["message"]["content"]
                        self.wrong += expected is not None and content != expected
                if answer.status_code == 429:
                    time.sleep(float(answer.headers["Retry-After"]))

    def go_away(self, deadline: float, picture: bytes) -> None:
        """Begin to ask and leave, again and again: some at once, of whom a busy server need not have heard at all, and
        some so late that a fast one has answered them."""
        for patience in itertools.cycle((0.05, 0.2, 0.4, 1.0)):
            if time.monotonic() >= deadline:
                break
            try:
                httpx.post(f"{self.address}/v1/chat/completions", json=question(picture, "base"), timeout=patience)
            except httpx.TimeoutException:
                self.left += 1
            time.sleep(0.2)

    def ask_once(self, picture: bytes) -> None:
        """Ask one question, and take no for an answer."""
        answer = httpx.post(f"{self.address}/v1/chat/completions", json=question(picture, "base"), timeout=120)
        with self._lock:
            self.statuses[answer.status_code] += 1


def most_answers_to_another(answered: list[tuple[int, float, float]]) -> int:
    """The most answers that a client had while another waited for one: 1 or 2 in the order of arrival.

    answered: (client, when it asked, when it had the answer) of each. One whose turn is before has its answer, and then
    stands behind; a client's own thread may hear of an answer late, or send a question late that it has written down.
    """
    ends: dict[int, list[float]] = {}
    for client, _, end in sorted(answered, key=lambda answer: answer[2]):
        ends.setdefault(client, []).append(end)
    counts = (
        bisect.bisect_left(others, end) - bisect.bisect_right(others, start)
        for client, start, end in answered
        for other, others in ends.items()
        if other != client
    )
    return max(counts, default=0)


def burst(address: str, count: int, picture: bytes) -> dict[int, int]:
    """The statuses of so many requests at once."""
    load = Load(address)
    with ThreadPoolExecutor(count) as clients:
        for asked in [clients.submit(load.ask_once, picture) for _ in range(count)]:
            asked.result()
    return dict(load.statuses)


def counted(address: str) -> dict[int, int]:
    """The requests that the server has counted, by status."""
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    found = (re.match(r'sat_lora_requests_total\{status="(\d+)"\} ([\d.e+]+)', line) for line in lines)
    return {int(match[1]): int(float(match[2])) for match in found if match}


def memory_mib(process: int) -> float:
    """What a process holds in memory, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def cpu_seconds(process: int) -> float:
    """What a process has had of the processors, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_server(folder: Path, waiting: int, batch: int) -> tuple[subprocess.Popen, str]:
    """The server's process and its address."""
    command = [sys.executable, "-m", "sat_lora.cli", "serve", "--base", str(BASE), "--version", "base"]
    command += ["--adapter", str(folder), "--port", "0", "--max-waiting", str(waiting)]
    command += ["--no-page", "--max-batch", str(batch)]
    path = os.pathsep.join([str(BASE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    for line in process.stdout:
        if line.startswith("listening at "):
            return process, line.split()[-1].removesuffix("/v1")
    raise RuntimeError(f"the server ended with status {process.wait()}")


def measure(clients: int, seconds: float, broken: int, waiting: int, batch: int = 8) -> dict:
    """The figures of a server under load."""
    with tempfile.TemporaryDirectory() as home:
        adapter = Path(home) / "mine" / "adapter"
        write_adapter(adapter)
        process, address = start_server(adapter, waiting, batch)
        try:
            figures = under_load(process.pid, address, clients, seconds, broken)
            figures["burst"] = burst(address, 3 * (waiting + batch), noise(0))
            figures["counted"] = counted(address)
        finally:
            process.send_signal(signal.SIGTERM)
            figures_status = process.wait(60)
        return {"batch": batch, **figures, "status": figures_status}


def under_load(process: int, address: str, clients: int, seconds: float, broken: int) -> dict:
    """What happens to the clients of a server, and to its memory."""
    pictures = [noise(client) for client in range(clients)]
    expected = []
    for client, picture in enumerate(pictures):
        answer = httpx.post(
            f"{address}/v1/chat/completions", json=question(picture, ("base", "mine")[client % 2]), timeout=60
        )
        expected.append(answer.json()["choices"][0]["message"]["content"])
    before = memory_mib(process)
    cpu_before = cpu_seconds(process)
    load = Load(address)
    deadline = time.monotonic() + seconds
    threads = ThreadPoolExecutor(clients + 1)
    asking = [
        threads.submit(load.ask_until, client, deadline, pictures[client], expected[client])
        for client in range(clients)
    ]
    asking.append(threads.submit(load.go_away, deadline, pictures[0]))
    draw = random.Random(0)
    refused = {kind: Counter[int]() for kind in KINDS}
    requests = 0
    with httpx.Client(base_url=address, timeout=120) as http:
        for _ in range(broken):
            kind, body = malformed(draw)
            requests += is_request(body)
            refused[kind][http.post("/v1/chat/completions", content=body).status_code] += 1
        bombed = http.post("/v1/chat/completions", json=question(bomb(), "base"))
        while bombed.status_code == 429:  # of a full queue, which it has not been in yet
            time.sleep(float(bombed.headers["Retry-After"]))
            bombed = http.post("/v1/chat/completions", json=question(bomb(), "base"))
    for asked in asking:
        asked.result()  # or what went wrong with a client
    threads.shutdown()
    cpu = cpu_seconds(process) - cpu_before
    ordered = sorted(end - start for _, start, end in load.answered)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers_per_second": len(ordered) / seconds,
        "cpu_seconds_per_answer": cpu / len(ordered),
        "latency": quartiles(ordered),
        "latency_p95": ordered[int(0.95 * (len(ordered) - 1))],
        "statuses": dict(load.statuses),
        "wrong_answers": load.wrong,
        "most_answers_to_another": most_answers_to_another(load.answered),
        "least_and_most_of_a_client": [min(load.per_client.values()), max(load.per_client.values())],
        "left_by_clients": load.left,
        "malformed": {kind: dict(statuses) for kind, statuses in refused.items()},
        "malformed_that_are_requests": requests,
        "bomb_status": bombed.status_code,
        "memory_mib": [before, memory_mib(process)],
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print and write the figures, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=1000, help="requests")
    parser.add_argument("--waiting", type=int, default=64, help="--max-waiting of the server")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[8], help="--max-batch of the server, one after another"
    )
    parser.add_argument("--out", type=Path, help="json file")
    args = parser.parse_args(arguments)
    figures = [measure(args.clients, args.seconds, args.malformed, args.waiting, batch) for batch in args.batches]
    rows = [[name, *(str(of_batch[name]) for of_batch in figures)] for name in figures[0]]
    print(table(["", *(f"batches of {batch}" for batch in args.batches)], rows, False))
    if args.out:
        write_json({"environment": environment(torch.device("cpu"), "wall"), "serve": figures}, args.out)
    return figures


if __name__ == "__main__":
    main()
