"""Everything that the ranks of a run have left in RUN/watchdog, read together."""

import struct
from dataclasses import dataclass
from pathlib import Path

from sat_lora.errors import ConfigError
from sat_lora.watchdog.flight_record import Collective, read_collectives
from sat_lora.watchdog.places import Place
from sat_lora.watchdog.rank_files import folder_of
from sat_lora.watchdog.rank_state import RankState, read_states
from sat_lora.watchdog.testimony import Thread, has_testified, read_threads


@dataclass(frozen=True)
class Rank:
    """Everything that one rank has left."""

    state: RankState
    threads: list[Thread]
    collectives: list[Collective]
    has_testified: bool

    @property
    def number(self) -> int:
        """The rank's number, from 0."""
        return self.state.rank

    @property
    def pending(self) -> Collective | None:
        """Its last collective, if that is not known to be done."""
        last = self.collectives[-1:]
        return last[0] if last and not last[0].is_done else None

    @property
    def waits(self) -> bool:
        """Whether it is in a collective: by its stack, or because one that it has started on the GPU is not done."""
        if any(thread.waits_in_collective for thread in self.threads):
            return True
        return self.pending is not None and self.pending.is_done is False

    @property
    def place(self) -> Place | None:
        """Where its own code is: in the main thread, or in autograd's if that one only waits for it."""
        main = next((thread for thread in self.threads if thread.is_main), None)
        if main is not None and main.waits_for_autograd:
            main = next((thread for thread in self.threads if thread.may_be_autograds), main)
        return main.place if main is not None else None


def read_ranks(run: str | Path) -> list[Rank]:
    """Return what each rank of a run has left, in order.

    Raises ConfigError if the run has no watchdog files, or they cannot be read.
    """
    folder = folder_of(run)
    try:
        ranks = [
            Rank(
                state,
                read_threads(folder, state.rank, state.package),
                read_collectives(folder, state.rank, state.package),
                has_testified(folder, state.rank),
            )
            for state in read_states(run)
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"--run: the files in {folder} cannot be read: {_cause(error)}") from error
    if not ranks:
        raise ConfigError(f"--run: {run} has no {folder.name}/rank_*.state; give the folder of a run with a watchdog")
    return ranks


def _cause(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
