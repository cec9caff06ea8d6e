"""How the processes of a run find each other, within a time and with words, and compare what they were started with.

All of it goes through torch's key-value store, before there is a process group: backends and collectives depend on the
options that are compared.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from sat_lora.errors import ConfigError
from sat_lora.parallel.agreement import differences, disagreement
from sat_lora.parallel.launch import ALONE, Place, agent_listens, taken_port
from sat_lora.printable import printable

PATIENCE = 15.0  # seconds of waiting before it is said
_meetings = 0  # of this process: a store that lives on has the keys of earlier ones


def meet(place: Place) -> PrefixStore:
    """Return the store of all ranks, once they are all there.

    Raises ConfigError if the port is taken, or some ranks do not come in time.
    """
    global _meetings
    _meetings += 1
    if place.size == 1:
        # A port of its own: one that the environment names may be another job's, and nobody else has to know it.
        return PrefixStore(f"sat_lora/{_meetings}", TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False))
    deadline = _Deadline(place)
    store = PrefixStore(f"sat_lora/{_attempt()}.{_meetings}", _store(place, deadline))
    size = store.compare_set("size", "", str(place.size)).decode()
    if size != str(place.size):
        raise ConfigError(f"WORLD_SIZE is {place.size} on rank {place.rank} and {size} on others; give all the same")
    if store.add(f"rank/{place.rank}", 1) > 1:
        raise ConfigError(f"RANK {place.rank} was given to two processes of {place.size}; give each its own")
    store.add("here", 1)
    deadline.wait_until(
        lambda: store.add("here", 0) >= place.size,
        lambda: [rank for rank in range(place.size) if not store.check([f"rank/{rank}"])],
    )
    return store


def compare(store: Store, place: Place, marks: Mapping[str, str]) -> None:
    """Raise ConfigError, the same on every rank, if marks are not alike on all; every rank of `meet` calls it."""
    deadline = _Deadline(place)
    if place.rank == 0:
        store.set("marks", json.dumps(marks))
    deadline.wait_until(lambda: store.check(["marks"]))
    first = json.loads(store.get("marks"))
    differing = differences(marks, first)
    if differing:
        store.set(f"differences/{place.rank}", json.dumps(differing))
        store.add("differing", 1)
    store.add("compared", 1)
    deadline.wait_until(lambda: store.add("compared", 0) >= place.size)
    if store.add("differing", 0) == 0:
        return
    by_rank = {
        rank: json.loads(store.get(f"differences/{rank}"))
        for rank in range(place.size)
        if store.check([f"differences/{rank}"])
    }
    store.add("read", 1)
    end = time.monotonic() + 5
    while place.rank == 0 and store.add("read", 0) < place.size and time.monotonic() < end:
        time.sleep(0.05)  # the store goes with rank 0
    raise disagreement(first, by_rank)


class _Deadline:
    """A time until which to wait: in Python, so that Ctrl-C is heard; it says what it waits for, and gives up."""

    def __init__(self, place: Place):
        self.place = place
        self.end = time.monotonic() + place.limit
        # Of processes without a launcher `announce` has said it already.
        self.says_at = time.monotonic() + PATIENCE if place.has_local_rank else float("inf")

    def wait_until(self, condition: Callable[[], bool], missing: Callable[[], list[int]] = lambda: []) -> None:
        """Wait until `condition` holds. Raises ConfigError, with the ranks that are `missing`, after the deadline."""
        pause = 0.002
        while not condition():
            now = time.monotonic()
            if now > self.end:
                raise self.given_up(missing())
            if now > self.says_at and self.place.rank == 0:
                print(f"{self.place.waiting}", file=sys.stderr, flush=True)
            if now > self.says_at:
                self.says_at = float("inf")
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def given_up(self, missing: list[int]) -> ConfigError:
        place = self.place
        who = f"rank {', '.join(map(str, missing[:8]))} did" if missing else "the others did"
        return ConfigError(
            f"rank {place.rank} waited {place.limit} s at {place.address}:{place.port} and {who} not come: "
            f"WORLD_SIZE={place.size} in the environment says that there are {place.size} processes. Start all of them "
            f"(torchrun or deepspeed on each machine), and see that the machines reach each other; {ALONE}"
        )


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _store(place: Place, deadline: _Deadline) -> TCPStore:
    """Return the store: rank 0 listens, unless torchrun's agent does, and the others connect.

    Raises ConfigError if the port is taken, or nothing of ours answers there.
    """
    listens = place.rank == 0 and not agent_listens()
    if not listens:
        _wait_for_listener(place, deadline)
    remaining = timedelta(seconds=max(5.0, deadline.end - time.monotonic()))
    try:
        return TCPStore(
            place.address, place.port, place.size, listens, remaining, wait_for_workers=False, multi_tenant=True
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # DistNetworkError among them
        reason = str(error).splitlines()[0][:300]
        if listens:
            raise taken_port(place, reason) from error
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: rank {place.rank} cannot join at {place.address}:{place.port}: "
            f"{printable(reason)}; most likely something else listens there, choose another port (--master_port)"
        ) from error


def _wait_for_listener(place: Place, deadline: _Deadline) -> None:
    if place.address is None or place.port is None:
        return
    listener = place.address, place.port

    def listens() -> bool:
        try:
            with socket.create_connection(listener, timeout=2):
                return True
        except socket.gaierror as error:
            raise ConfigError(
                f"MASTER_ADDR: {printable(place.address)} is no name of a machine that is known here: {error.strerror}"
            ) from error
        except OSError:
            return False

    deadline.wait_until(listens, lambda: [0])
