"""How much memory of its own a call takes."""

import threading
import time


def anonymous_memory() -> int:
    """Bytes of this process that belong to no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def data_memory() -> int:
    """Bytes of memory that this process has asked for, whether it has written there yet or not."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024


def peak_of_anonymous_memory(function, *args, **kwargs) -> int:
    """By how many bytes anonymous memory grew at most while function(*args, **kwargs) ran, looked at every 2 ms."""
    before, highest, done = anonymous_memory(), 0, threading.Event()

    def watch():
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous_memory())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function(*args, **kwargs)
    finally:
        done.set()
        thread.join()
    return highest - before
