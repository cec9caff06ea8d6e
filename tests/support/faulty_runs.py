"""finetune_cogvlm.py on two ranks with a planted fault, and no launcher that would end one when the other has died.

Every fault begins at the third step, on rank 1.
"""

import os
import random
import signal
import sys
import threading
import time
import types
from functools import partial

import torch

from tests.support.patience import patient
from tests.support.ranks import become_rank, free_port, process_context
from tests.support.scripts import load_script

STEP = 3
LIMIT = 2.0  # seconds, --watchdog-limit
CULPRIT = 1


def is_culprit():
    return int(os.environ["RANK"]) == CULPRIT


def once_at_the_step(action):
    """A function that counts its calls in this process and runs `action` at the STEP-th."""
    calls = [0]

    def count(*args, **kwargs):
        calls[0] += 1
        if calls[0] == STEP:
            action()

    return count


# Faults. Each is called before the run begins, on every rank.


def jitter():
    """No fault: every batch takes 5 to 15 ms more, on every rank by itself."""
    from sat_lora.training import loop

    islice, chance = loop.itertools.islice, random.Random(os.environ["RANK"])

    def late(*args):
        time.sleep(chance.uniform(0.005, 0.015))
        return islice(*args)

    loop.itertools = types.SimpleNamespace(islice=late)


def exception_in_a_loader():
    def fail():
        raise RuntimeError("the disk of this machine is broken")

    before_each_batch(fail)


def loader_that_sleeps():
    before_each_batch(lambda: time.sleep(600))


def before_each_batch(action):
    from sat_lora.training import loop

    islice, count = loop.itertools.islice, once_at_the_step(action)

    def after_action(*args):
        if is_culprit():
            count()
        return islice(*args)

    loop.itertools = types.SimpleNamespace(islice=after_action)


def extra_collective():
    in_layer_1(lambda: torch.distributed.all_reduce(torch.zeros(3)))


def killed_rank():
    in_layer_1(lambda: os.kill(os.getpid(), signal.SIGKILL))


def bus_error():
    """What a full /dev/shm gives."""
    in_layer_1(lambda: os.kill(os.getpid(), signal.SIGBUS))


def deadlock_in_a_hook():
    lock = threading.Lock()
    lock.acquire()
    in_layer_1(lock.acquire)


def stopped_rank():
    """As a rank whose interpreter hangs as a whole: it answers to nothing, and lives."""
    in_layer_1(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def in_layer_1(action):
    """In a forward hook of the language model's second MLP."""
    from sat_lora.training import prepare

    add_lora, count = prepare.add_lora, once_at_the_step(action)

    def add_lora_and_hook(model, *args, **kwargs):
        add_lora(model, *args, **kwargs)
        if is_culprit():
            model.transformer.layers[1].mlp.register_forward_hook(count)

    prepare.add_lora = add_lora_and_hook


def published_branching():
    """CogVLM's own: without an image no vision expert runs. Rank 1 has no images from the third step on."""
    from sat_lora.doctor.batches import text_alone
    from sat_lora.training import loop
    from tests.support.branching_cogvlm import branch_on_data

    branch_on_data()
    train_step, calls = loop.train_step, [0]

    def with_text_alone(engine, micro_batches, *args, **kwargs):
        calls[0] += 1
        if is_culprit() and calls[0] >= STEP:
            micro_batches = [text_alone(batch) for batch in micro_batches]
        return train_step(engine, micro_batches, *args, **kwargs)

    loop.train_step = with_text_alone


def run_faulty(fault, options, folder, timeout=60, ranks=2):
    """([exit status of each rank], [what each printed], when rank 0 ended) of a run with this fault.

    A rank that is stopped ends by -9. The time is in seconds since the epoch.
    """
    return end_of_ranks(partial(_run_script, fault, options), folder, timeout, ranks, is_stopped=fault is stopped_rank)


def end_of_ranks(main, folder, timeout=60, ranks=2, *, is_stopped=False):
    """The same of ranks that run `main`, and end by the status that it returns. is_stopped: one of them never ends."""
    context, port = process_context(), free_port()
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    processes = [
        context.Process(target=_run_rank, args=(str(log), rank, ranks, port, main), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    timeout = patient(timeout)
    end = time.monotonic() + timeout
    try:
        processes[0].join(timeout)
        ended = time.time()
        for process in processes[1:]:
            process.join(2 if is_stopped else max(0.0, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    finally:
        for process in processes:
            process.kill()
            process.join()
    output = [log.read_text(errors="replace") for log in logs]
    if hung and not is_stopped:
        raise AssertionError(f"ranks {hung} did not end in {timeout} s: {output}")
    return [process.exitcode for process in processes], output, ended


def _run_rank(output, rank, size, port, main):
    become_rank(output, rank, size, port)
    sys.exit(main())


def _run_script(fault, options):
    fault()
    return load_script("finetune_cogvlm").main(options)
