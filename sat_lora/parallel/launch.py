"""The place of this process among others, as a launcher or a platform describes it in the environment."""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from sat_lora.errors import ConfigError
from sat_lora.printable import printable, shell_line

# Started as several processes by something that names no RANK: what says how many, and what started them.
STARTERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun_rsh",
    "JSM_NAMESPACE_SIZE": "jsrun",
}
# Seconds until a process gives up to wait for the others.
BY_HAND_LIMIT = 120
LAUNCHED_LIMIT = 600
ALONE = "for one process alone: env -u RANK -u WORLD_SIZE python ..."
START_ALL = "start all processes of a machine with torchrun or deepspeed"
Default = TypeVar("Default", int, None)


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks.

    rank: from 0, below size. address, port: where rank 0 listens; None where the process is alone.
    launcher: `deepspeed`, `torchrun`, or None for processes that were started one by one, or by a platform.
    """

    rank: int
    size: int
    local_rank: int
    address: str | None
    port: int | None
    launcher: str | None
    has_local_rank: bool

    @property
    def limit(self) -> int:
        """Seconds to wait for the others: those that a launcher has started do come, if late."""
        return LAUNCHED_LIMIT if self.has_local_rank else BY_HAND_LIMIT

    @property
    def waiting(self) -> str:
        """What the process waits for, and what to do if nothing comes, as a sentence."""
        others = f"{self.size - 1} more process{'es' * (self.size > 2)}"
        return (
            f"rank {self.rank} waits for {others} at {self.address}:{self.port} (WORLD_SIZE={self.size} in the "
            f"environment), and gives up after {self.limit} s; {ALONE}"
        )


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """Return the place that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT give.

    Empty values count as missing. Raises ConfigError if a value is wrong, some are missing where there are several
    processes, or there are several processes and none knows its rank.
    """
    variables = {name: text.strip() for name, text in environ.items() if text.strip()}
    _refuse_to_be_alone_among_many(variables)
    size = _whole(variables, "WORLD_SIZE", least=1, default=1)
    rank = _whole(variables, "RANK", least=0, default=0)
    local_rank = _whole(variables, "LOCAL_RANK", least=0, default=0)
    port = _whole(variables, "MASTER_PORT", least=0, default=None, most=65535)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        _whole(variables, name, least=1, default=None)
    if rank >= size:
        world = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in variables else "WORLD_SIZE is missing"
        raise ConfigError(f"RANK is {rank} and {world} in the environment: ranks are 0 to WORLD_SIZE - 1; {ALONE}")
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in variables else "deepspeed" if "CROSS_RANK" in variables else None
    if size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in variables]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size} in the environment and {', '.join(missing)} missing: as a platform sets it that "
                f"expects a launcher; {START_ALL}; {ALONE}"
            )
        if port == 0:
            raise ConfigError("MASTER_PORT is 0 in the environment: ranks have to know the port; give 1024 to 65535")
    address = variables["MASTER_ADDR"] if size > 1 else None
    return Place(rank, size, local_rank, address, port if size > 1 else None, launcher, "LOCAL_RANK" in variables)


def ranks_on_this_machine(all_ranks: int, environ: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks run here, as the launcher says; `all_ranks` where it does not."""
    return int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or all_ranks)


def announce(place: Place, environ: Mapping[str, str] = os.environ) -> None:
    """Say what the process will wait for, where no launcher is known to have started the others.

    Raises ConfigError if rank 0 is to listen at a port that another process has: seconds before torch is imported.
    """
    if place.size == 1:
        return
    if place.rank == 0 and not agent_listens(environ):
        try:
            socket.create_server(("", place.port)).close()
        except OSError as error:
            raise taken_port(place, error.strerror) from error
    if not place.has_local_rank:
        print(place.waiting, file=sys.stderr, flush=True)


def agent_listens(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun's agent keeps the store in which the ranks meet, and no rank does."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def taken_port(place: Place, reason: object) -> ConfigError:
    """Return the error of a rank 0 that cannot listen at its port."""
    return ConfigError(
        f"MASTER_PORT: rank 0 cannot listen at port {place.port}: {printable(reason)}; most likely another job has it. "
        f"Choose another: deepspeed --master_port {_another(place.port)} ..., torchrun --master_port "
        f"{_another(place.port)} ..., or MASTER_PORT={_another(place.port)} in the environment of every rank"
    )


def _another(port: int | None) -> int:
    return port + 1 if port is not None and port < 65535 else 29500


def _refuse_to_be_alone_among_many(variables: Mapping[str, str]) -> None:
    if "RANK" in variables:
        return
    for name, starter in STARTERS.items():
        text = variables.get(name, "")
        tasks = int(text) if text.isdecimal() else 1
        if tasks > 1:
            raise ConfigError(
                f"{starter} has started {tasks} tasks and none knows its rank: each would train alone, into the same "
                "run folder; start one torchrun per node, as finetune_demo/launch/slurm.sh does"
            )


def _whole(
    variables: Mapping[str, str], name: str, *, least: int, default: Default, most: int | None = None
) -> int | Default:
    text = variables.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if number < least or (most is not None and number > most):
        wanted = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ConfigError(f"{name}: got {printable(text)!r} from the environment, wanted a whole number {wanted}")
    return number


SAT_LORA = ("-m", "sat_lora.cli")  # the command, by an interpreter that may not have it on its PATH


class Program(NamedTuple):
    """What people start: its name in messages, and the words after an interpreter's name that start it.

    start: the absolute path of a script; or `-m`, a module, and its first arguments.
    """

    name: str
    start: tuple[str, ...]


def command_program(command: str) -> Program:
    """Return a command of `sat-lora` as a Program."""
    return Program(f"sat-lora {command}", (*SAT_LORA, command))


def relaunch(program: Program, *arguments: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return a shell line that starts a program with as many ranks, under the launcher that started this process.

    It is None where no single line does: on several machines, or for ranks that were started one by one.
    """
    place = find_place(environ)
    local_ranks = ranks_on_this_machine(place.size, environ)
    is_module = program.start[0] == "-m"
    target = program.start[is_module:]
    if place.size == 1:
        start = list(program.start)
    elif local_ranks != place.size or place.launcher is None:
        return None
    elif place.launcher == "deepspeed":
        port = [] if place.port in (None, 29500) else ["--master_port", str(place.port)]
        start = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(local_ranks), *port]
        start += [*["--module"] * is_module, *target]
    else:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(local_ranks)]
        start += [*["-m"] * is_module, "--", *target]
    return shell_line([sys.executable, *start, *arguments])


def sat_lora_line(*arguments: str | os.PathLike[str]) -> str:
    """Return a line for any shell that runs `sat-lora` with these arguments, by the interpreter that runs now."""
    return shell_line([sys.executable, *SAT_LORA, *map(str, arguments)])
