"""Run a function on several gloo ranks of this machine, each its own process, with a time limit.

The ranks are forked from a server process that has imported SAT and DeepSpeed once, so that starting one costs
a fraction of a second.
"""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from tests.support.patience import patient

_PRELOAD = ["tests.support.preloaded"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_context():
    """Of multiprocessing: its processes are forked from the server."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def become_rank(output: str, rank: int, size: int, port: int) -> None:
    """In a new process: its place among `size` of this machine, and its output into a file."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    import torch

    torch.set_num_threads(1)


def _rank_main(connection, output: str, rank: int, size: int, port: int, target, args, kwargs):
    become_rank(output, rank, size, port)
    try:
        connection.send(("done", target(*args, **kwargs)))
        connection.poll(None)  # the first rank has the others' store: nobody ends before all have answered
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
        raise
    finally:
        connection.close()
        os._exit(0)  # a rank whose peers are gone would wait for them in a destructor


def run_ranks(target, size: int, *args, timeout: float = 90, **kwargs) -> list:
    """[target(*args, **kwargs) of rank 0, 1, ...]; a failure or a hang of any is an AssertionError with its traceback.

    `target` is a function of a test module; what it returns has to be picklable (no tensors that share memory).
    """
    context = process_context()
    port, folder = free_port(), tempfile.TemporaryDirectory()
    logs = [Path(folder.name) / f"rank_{rank}.log" for rank in range(size)]
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe()
        process = context.Process(
            target=_rank_main, args=(sender, str(logs[rank]), rank, size, port, target, args, kwargs), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    answers, deadline = {}, time.monotonic() + patient(timeout)
    try:
        while len(answers) < size and time.monotonic() < deadline:
            open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
            for pipe in wait(open_pipes, timeout=1):
                rank = pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = ("failed", f"the process ended without a word; its output:\n{_tail(logs[rank])}")
            if any(kind == "failed" for kind, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 2)  # let the others say what they saw
    finally:
        for process in processes:
            process.kill()
            process.join()
        problems = [f"rank {r}: {text}" for r, (kind, text) in sorted(answers.items()) if kind == "failed"]
        problems += [f"rank {r}: no answer; its output:\n{_tail(logs[r])}" for r in range(size) if r not in answers]
        folder.cleanup()
    if problems:
        raise AssertionError("\n".join(problems))
    return [answers[rank][1] for rank in range(size)]


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.exists() else "(none)"
