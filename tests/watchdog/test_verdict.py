"""The verdict from evidence that no CPU run gives: NCCL's pending collectives and log lines."""

import json
import pickle

import pytest
import torch

from sat_lora.cli import main
from sat_lora.errors import ConfigError
from sat_lora.watchdog import trace
from sat_lora.watchdog.evidence import read_ranks
from sat_lora.watchdog.flight_record import FLIGHT, read_collectives
from sat_lora.watchdog.nccl_log import read_timeouts
from sat_lora.watchdog.places import PACKAGE
from sat_lora.watchdog.rank_files import ALIVE, NCCL_DUMP, file_of, folder_of
from sat_lora.watchdog.testimony import STACKS
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.verdict import verdict

STEP_PY = "/home/me/sat_lora/training/steps/step.py"
SYNC = [[STEP_PY, 70, "train_step", "loss = total.item()"]]
IN_A_HOOK = [["/usr/lib/python3/threading.py", 1, "wait", ""], ["/home/me/mine.py", 8, "hook", "event.wait()"]]
IN_AUTOGRAD = [["/x/site-packages/torch/autograd/graph.py", 1, "_engine_run_backward", ""], *SYNC]


def leave(run, rank, phase, threads, collectives, arrivals=0):
    """What a rank of two leaves; threads: (name, is main, frames); collectives: (number, operation, sizes, done)."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    trace = Trace(run, model, rank=rank, world_size=2)
    trace.at("forward", step=5)
    trace.at(phase)
    for number in range(arrivals):
        trace.arrival(number)(None)
    folder = folder_of(run)
    (folder / ALIVE).write_text('{"0": true, "1": true}')
    entries = [dict(name=name, main=main, frames=frames) for name, main, frames in threads]
    file_of(folder, rank, STACKS).write_text(json.dumps(entries))
    file_of(folder, rank, FLIGHT).write_bytes(pickle.dumps({"entries": [entry_of(*one) for one in collectives]}))


def entry_of(number, operation, elements, done):
    """As torch's flight recorder has it."""
    state = "completed" if done else "started"
    own = dict(collective_seq_id=number, profiling_name=operation, input_sizes=[[elements]], state=state)
    return {"process_group": ("0", "default_pg"), "frames": [], **own}


REDUCED, WAITING = (7, "nccl:all_reduce", 4096, True), (8, "nccl:all_reduce", 4096, False)


def test_on_a_gpu_the_rank_without_a_pending_collective_is_the_one(tmp_path):
    leave(tmp_path, 0, "reduce", [("MainThread", True, SYNC)], [REDUCED, WAITING])
    threads = [("MainThread", True, IN_AUTOGRAD), ("autograd", False, [*IN_A_HOOK, [STEP_PY, 1, "backward", ""]])]
    leave(tmp_path, 1, "backward", threads, [REDUCED], arrivals=2)
    found = verdict(tmp_path)
    assert (found.finding.code, found.finding.ranks) == ("stuck-in-code", (1,))
    assert "hook (/home/me/mine.py:8): event.wait()" in found.text
    assert "2 of 4 gradients had come, the last 0.bias" in found.text


CLONE = "/home/me/sat_lora"  # git's default, with the environment that `make` puts there
INSTALLED = f"{CLONE}/.venv/lib/python3.12/site-packages"


@pytest.mark.parametrize("package", [f"{CLONE}/sat_lora", f"{INSTALLED}/sat_lora"])
def test_in_a_folder_called_sat_lora_the_environment_below_is_not_taken_for_own_code(package, tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "PACKAGE", package)
    step = [f"{package}/training/step.py", 70, "train_step", "engine.backward(loss)"]
    reduce = [f"{INSTALLED}/torch/distributed/distributed_c10d.py", 1, "all_reduce", "work.wait()"]
    engine = [f"{INSTALLED}/torch/autograd/graph.py", 1, "_engine_run_backward", ""]
    saving = [f"{package}/training/save.py", 5, "write", "queue.get()"]
    started = ["/usr/lib/python3.12/threading.py", 1, "_bootstrap", ""]
    hook = [f"{CLONE}/finetune_demo/mine.py", 8, "hook", "event.wait()"]
    leave(tmp_path, 0, "reduce", [("MainThread", True, [reduce, step])], [REDUCED, WAITING])
    threads = [
        ("MainThread", True, [engine, step]),
        ("saves", False, [saving, started]),
        ("?", False, [[f"{INSTALLED}/torch/utils/checkpoint.py", 1, "unpack", ""], hook]),
    ]
    leave(tmp_path, 1, "backward", threads, [REDUCED])
    found = verdict(tmp_path)
    assert (found.finding.code, found.finding.ranks) == ("stuck-in-code", (1,))
    assert f"Rank 1 is in hook ({hook[0]}:8): event.wait()" in found.text
    assert f"Rank 0 waits in phase reduce of step 5, in train_step ({step[0]}:70)" in found.text


ZERO = f"{INSTALLED}/deepspeed/runtime/zero"
GATHER = [  # what waits is no Python: the innermost frame is the one that calls it
    [f"{INSTALLED}/deepspeed/utils/nvtx.py", 33, "wrapped_fn", "ret_val = func(*args, **kwargs)"],
    [f"{ZERO}/partition_parameters.py", 720, "wait", "instrument_w_nvtx(self.__handle.wait)()"],
    [f"{ZERO}/partitioned_param_coordinator.py", 406, "_fetch_sub_module_impl", "....wait(...)"],
]
TENSOR = [
    [f"{INSTALLED}/torch/_ops.py", 1, "__call__", "return self._op(*args, **kwargs)"],
    [f"{INSTALLED}/torch/distributed/_functional_collectives.py", 1, "wait_tensor", ""],
]


@pytest.mark.parametrize("waits", [GATHER, TENSOR], ids=["zero-3", "functional"])
def test_a_rank_that_waits_for_what_it_has_started_is_not_the_one(tmp_path, waits):
    """Though it has given its last sign before the other, which never comes with its part."""
    leave(tmp_path, 0, "data", [("MainThread", True, [*waits, *SYNC])], [])
    leave(tmp_path, 1, "data", [("MainThread", True, IN_A_HOOK)], [])
    found = verdict(tmp_path)
    assert (found.finding.code, found.finding.ranks) == ("stuck-in-data", (1,))
    assert "Rank 0 waits in phase data" in found.text


def test_the_first_collective_that_differs_is_named(tmp_path):
    gathered = (8, "nccl:all_gather", 512, False)
    leave(tmp_path, 0, "reduce", [("MainThread", True, SYNC)], [REDUCED, WAITING])
    leave(tmp_path, 1, "reduce", [("MainThread", True, SYNC)], [REDUCED, gathered])
    found = verdict(tmp_path).finding
    assert (found.code, found.ranks) == ("collectives-differ", (0, 1))
    assert "collective 8" in found.seen
    assert "nccl:all_gather of 512 on rank 1 and nccl:all_reduce of 4096 on rank 0" in found.seen


def test_ranks_that_wait_for_the_same_are_called_a_hang(tmp_path):
    for rank in (0, 1):
        leave(tmp_path, rank, "reduce", [("MainThread", True, SYNC)], [REDUCED, WAITING])
    log = tmp_path / "out.log"
    line = (
        "[rank1]:[E1 ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=8, OpType=ALLREDUCE, NumelIn=4096, NumelOut=4096, Timeout(ms)=600000) "
        "ran for 600029 milliseconds before timing out.\n"
    )
    log.write_text(line * 3)
    found = verdict(tmp_path, [log])
    assert found.finding.code == "hang"
    assert found.text.count("NCCL: rank 1 waited 600 s for collective 8, ALLREDUCE of 4,096 elements") == 1


def test_a_log_that_is_not_there_and_files_that_are_cut_are_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="--log: .*nowhere cannot be read"):
        read_timeouts([tmp_path / "nowhere"])
    leave(tmp_path, 0, "reduce", [], [])
    state = file_of(folder_of(tmp_path), 0, ".state")
    state.write_bytes(state.read_bytes()[:7])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ranks(tmp_path)


class Malicious:
    def __reduce__(self):
        return (print, ("it ran",))


def test_a_dump_of_nccls_own_watchdog_is_read_and_nothing_in_it_runs(tmp_path, capsys):
    path = tmp_path / f"{NCCL_DUMP}3"
    path.write_bytes(pickle.dumps({"entries": [entry_of(*WAITING)]}))
    (found,) = read_collectives(tmp_path, 3, None)
    assert (found.number, found.operation, found.sizes, found.is_done) == (8, "nccl:all_reduce", "4096", False)
    assert read_collectives(tmp_path, 2, None) == []
    path.write_bytes(pickle.dumps({"entries": [Malicious()]}))
    with pytest.raises(ValueError, match="it holds builtins.print, which is no plain value"):
        read_collectives(tmp_path, 3, None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", ["TrainingError: step 5: the loss is not finite", "Stopped: by SIGTERM after step 5"])
def test_an_end_that_every_rank_was_told_of_is_nobodys_fault_and_not_called_well(tmp_path, error):
    for rank in (0, 1):
        leave(tmp_path, rank, "save", [], [])
        end = dict(error=error, frames=[], time=1.0)
        file_of(folder_of(tmp_path), rank, ".end.json").write_text(json.dumps(end))
        file_of(folder_of(tmp_path), rank, STACKS).unlink()
    found = verdict(tmp_path)
    assert found.finding is None and error in found.text and "well" not in found.text


def test_a_hang_before_any_gradient_is_told_though_it_cannot_be_drawn(tmp_path, capsys):
    for rank in (0, 1):
        leave(tmp_path, rank, "data", [("MainThread", True, SYNC)], [REDUCED, WAITING])
    assert main(["doctor", "--run", str(tmp_path), "--plot", str(tmp_path / "a.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("error: hang") and "--plot: no gradient had arrived" in printed.err


SCHEMES_PY = f"{PACKAGE}/quantized/schemes.py"
KERNELS_PY = f"{PACKAGE}/quantized/kernels.py"
LAYER = [[f"{PACKAGE}/quantized/quantized_weight.py", 330, "linear", "return _Linear.apply(x, weight)"]]


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([[SCHEMES_PY, 83, "_decode", "values = look_up()"], *LAYER], f"_decode ({SCHEMES_PY}:83): values = look_up()"),
        ([["/x/site-packages/torch/_ops.py", 9, "__call__", ""], [KERNELS_PY, 70, "decode_nf4", "return op()"], *LAYER],
         f"decode_nf4 ({KERNELS_PY}:70): return op()"),
    ],
)  # fmt: skip
def test_a_rank_that_stays_in_decoding_is_found_there(tmp_path, frames, words):
    leave(tmp_path, 0, "forward", [("MainThread", True, WAITS)], [])
    leave(tmp_path, 1, "forward", [("MainThread", True, frames)], [])
    found = verdict(tmp_path)
    assert (found.finding.code, found.finding.ranks) == ("stuck-in-code", (1,))
    assert f"rank 1 is in {words}" in found.finding.seen


WAITS = [["/x/site-packages/torch/distributed/distributed_c10d.py", 1, "all_reduce", ""], *SYNC]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB", True),
        ("OutOfMemoryError: CUDA out of memory", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory", True),
        ("MemoryError: ", True),
        ("RuntimeError: shapes do not fit", False),
    ],
)
def test_a_rank_without_memory_is_told_what_takes_less_and_where_it_was(tmp_path, error, is_memory):
    code = compile("raise kind(text)", SCHEMES_PY, "exec")
    kind, _, text = error.partition(": ")
    own = type(kind.rpartition(".")[2], (Exception,), {})
    trace = Trace(tmp_path, torch.nn.Linear(2, 2), rank=0, world_size=1)
    trace.at("forward", step=5)
    with pytest.raises(own), trace.told():
        exec(code, dict(kind=own, text=text))
    found = verdict(tmp_path)
    assert found.finding.code == "rank-failed" and f"({SCHEMES_PY}:1)" in found.finding.seen
    assert ("--quantize nf4" in found.text and "sat-lora estimate --fit" in found.text) == is_memory
