"""Saves that are written while the steps go on: what lands on the disk, failures, signals."""

import json
import os
import re
import signal
import time
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch

from sat_lora import LoraConfig, add_lora, save_adapter
from sat_lora.adapters.card import CARD, is_ours
from sat_lora.errors import SatLoraError
from sat_lora.files.host_copies import CHUNK, HostCopies
from sat_lora.files.step_folders import read_pointer
from sat_lora.lora.live_base import identity_of_model
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.stop_signals import Stopped
from sat_lora.training import saving
from sat_lora.training.loop import train
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.saving import BackgroundWriter
from sat_lora.training.steps.checkpoint import STATE, RunState, load_checkpoint
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.optimizer_state import create_moments
from tests.support.configs import config_of
from tests.support.patience import patient
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, mixed_batch, save_now

SAVED_AT, STEPS = 2, 5


def options(**changes):
    settings = dict(train_iters=STEPS, gradient_accumulation_steps=1, batch_size=2, warmup=0, lr=1e-2, min_lr_ratio=0)
    settings |= dict(lr_decay_style="constant", log_interval=1, eval_interval=0, save_interval=SAVED_AT, keep=0)
    settings |= dict(max_broken_share=1, skip_nonfinite=0, fp16=False)
    return config_of(**settings | changes)


class Training:
    """A run of the loop on this rank; `end` is the error that ended it."""

    def __init__(self, folder, stage=2, model_parallel=1):
        self.world, self.state = init_model_parallel(init_distributed(), model_parallel), RunState()
        model = tiny_model(model_parallel_size=model_parallel).train()
        add_lora(model, LoraConfig(r=4, modules_to_save=["boi"], use_dora=True, qkv_slots="qv"))
        self.engine = start_engine(model, adapter_optimizer(model, lr=1e-2), engine_config(stage, 2))
        create_moments(self.engine)
        self.folder, self.end = RunFolder(folder, is_writer=self.world.is_main), None
        torch.manual_seed(self.world.data_parallel_rank)

    def run(self, **changes):
        batches = (mixed_batch(self.world.data_parallel_rank, step) for step in count())
        try:
            train(self.engine, batches, None, options(**changes), self.folder, self.world, self.state, dataset_size=100)
        except (SatLoraError, Stopped) as error:
            self.end = f"{type(error).__name__}: {error}"
        return self


def files_in(folder):
    """Their content; of state.json without the generators, which two runs in one process share."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    if STATE in files:
        files[STATE] = json.loads(files[STATE])
        del files[STATE]["random"]
    return files


def before_writing(action):
    """Let `action(checkpoint)` run on the writer's thread before a checkpoint is written."""
    write = saving.save_checkpoint

    def write_after(folder, checkpoint):
        action(checkpoint)
        write(folder, checkpoint)

    saving.save_checkpoint = write_after


def wait_until(condition):
    deadline = time.monotonic() + patient(30)
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def save_on_a_slow_disk(folder, stage, model_parallel):
    """How far the run was before and after each write, how it ended; then the same save once more, waited for."""
    run, steps, write = Training(f"{folder}/slow", stage, model_parallel), [], saving.save_checkpoint

    def write_slowly(target, checkpoint):
        wait_until(lambda: run.state.step >= min(checkpoint.step + 2, STEPS))
        write(target, checkpoint)
        steps.append((checkpoint.step, run.state.step))

    saving.save_checkpoint, saving.prune = write_slowly, lambda *args, **settings: None
    run.run()
    again = Training(f"{folder}/other", stage, model_parallel)
    saving.save_checkpoint = write
    again.run(train_iters=SAVED_AT, save_interval=0)
    save_adapter(again.engine.module, f"{folder}/expected/adapter/{SAVED_AT}")
    base = identity_of_model(again.engine.module)
    samples, facts = 2 * again.world.data_parallel_size, {"base": {"fingerprint": base.fingerprint, **base.to_dict()}}
    save_now(again.engine, Path(folder) / "expected/checkpoints", again.state, again.world, samples, run=facts)
    return steps, run.end, again.end


@pytest.mark.parametrize(
    "ranks, stage, model_parallel",
    [(2, 2, 1), *(pytest.param(*layout, marks=pytest.mark.matrix) for layout in ((1, 0, 1), (2, 1, 2), (2, 3, 1)))],
)
def test_a_slow_disk_holds_no_step_and_later_steps_change_no_byte(tmp_path, ranks, stage, model_parallel):
    first, *_ = run_ranks(save_on_a_slow_disk, ranks, str(tmp_path), stage, model_parallel)
    assert first == ([(2, 4), (4, 5), (5, 5)], None, None)
    for folder in (f"adapter/{SAVED_AT}", f"checkpoints/{SAVED_AT}"):
        slow, expected = (files_in(tmp_path / name / folder) for name in ("slow", "expected"))
        cards = [files.pop(CARD, None) for files in (slow, expected)]  # the run's own tells more
        assert len(expected) == 2 and slow == expected
        if folder.startswith("adapter"):
            assert all(is_ours(tmp_path / name / folder / CARD) for name in ("slow", "expected"))
            assert b"## Training" in cards[0] and f"| Steps | {SAVED_AT} |".encode() in cards[0] != cards[1]


def save_where_nothing_can_be_written(folder, train_iters, save_interval):
    """How a run ends, and after how many steps, whose checkpoints cannot be written."""
    run = Training(folder)
    if run.world.is_main:
        (Path(folder) / "checkpoints").write_text("a file, and no folder")
    before_writing(lambda checkpoint: wait_until(lambda: run.state.step >= min(checkpoint.step + 1, train_iters)))
    run.run(train_iters=train_iters, save_interval=save_interval)
    return run.end, run.state.step


@pytest.mark.parametrize(
    "steps, interval, stops_before",
    [(3, 2, 4), *(pytest.param(*case, marks=pytest.mark.matrix) for case in ((1000, 10, 20), (2, 2, 3)))],
    ids=str,
)
def test_a_save_that_fails_stops_every_rank_with_its_error(tmp_path, steps, interval, stops_before):
    """At a step before the next save, at that save, at the end."""
    (first, step), other = run_ranks(save_where_nothing_can_be_written, 2, str(tmp_path), steps, interval)
    assert (first, step) == other
    assert first.startswith(
        f"CheckpointError: {tmp_path}/checkpoints/{interval}: the checkpoint could not be written: "
    )
    assert interval <= step < stops_before
    assert read_pointer(tmp_path / "adapter" / "latest") == interval


def save_every_step(folder, keep):
    run = Training(folder)
    run.run(train_iters=4, save_interval=1, keep=keep)
    return run.end, sorted(os.listdir(f"{folder}/checkpoints")), sorted(os.listdir(f"{folder}/adapter"))


def test_the_newest_checkpoint_is_kept_and_the_one_before_it_which_is_known_to_be_well(tmp_path):
    ((end, checkpoints, adapters),) = run_ranks(save_every_step, 1, str(tmp_path), 1)
    assert end is None
    assert checkpoints == adapters == ["3", "4", "latest"]


def blow_up(folder):
    """Two good steps, then a rate that throws the adapters out of float32's range, then the way back."""
    run = Training(folder)
    run.run(train_iters=2, save_interval=1, keep=1)
    run.run(train_iters=9, save_interval=1, keep=1, lr=1e30)
    if run.world.is_main:
        names = sorted(os.listdir(f"{folder}/adapter")), sorted(os.listdir(f"{folder}/checkpoints"))
    else:
        names = None
    pointers = [read_pointer(Path(folder) / one / "latest") for one in ("adapter", "checkpoints")]
    again = Training(folder)
    again.state = load_checkpoint(again.engine, again.folder.checkpoints, again.world)
    again.run(train_iters=6, save_interval=0, keep=1)
    return run.end, names, pointers, again.end, again.state.step


def test_a_save_that_is_blown_up_gives_its_place_back_to_the_one_before_it(tmp_path):
    (end, names, pointers, end_again, step), (other_end, *_) = run_ranks(blow_up, 2, str(tmp_path))
    blown = int(re.search(r"But that of step (\d+) is blown up", end)[1])
    good = blown - 1
    assert end == other_end and end.startswith(f"TrainingError: step {blown + 1}: the ")
    assert f"adapter/latest and checkpoints/latest name step {good} again" in end and "a lower --lr" in end
    assert names == ([str(good), str(blown), "latest"],) * 2 and pointers == [good, good]
    assert (end_again, step) == (None, 6)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [str(good), "6", "latest"]


def stop_during_a_save(folder):
    run = Training(folder)

    def ask_to_stop(checkpoint):
        if checkpoint.step == SAVED_AT:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: run.state.step > checkpoint.step)

    before_writing(ask_to_stop)
    run.run(train_iters=1000)
    return run.end, run.state.step


def test_a_signal_during_a_save_loses_neither_that_save_nor_the_last_step(tmp_path):
    (first, step), other = run_ranks(stop_during_a_save, 2, str(tmp_path))
    assert (first, step) == other == (f"Stopped: stopped by SIGTERM after step {step}", step)
    assert SAVED_AT < step < 1000
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted(
        [str(SAVED_AT), str(step), "latest"]
    )
    assert read_pointer(tmp_path / "adapter" / "latest") == read_pointer(tmp_path / "checkpoints" / "latest") == step


def test_an_error_on_the_way_out_does_not_cut_the_save_that_is_written(tmp_path):
    done = []

    def write_slowly():
        time.sleep(0.2)
        done.append(True)

    with pytest.raises(KeyError), BackgroundWriter() as writer:
        writer.start(write_slowly)
        raise KeyError
    assert done


def test_a_failure_is_told_once():
    with BackgroundWriter() as writer:
        writer.start(lambda: 1 / 0)
        wait_until(lambda: writer.has_failed)
        with pytest.raises(ZeroDivisionError):
            writer.wait()
        assert not writer.has_failed
        writer.wait()


def test_host_copies_hold_any_tensor_and_use_their_memory_again():
    copies = HostCopies()
    for _ in range(2):
        copies.clear()
        large = torch.arange(CHUNK // 4 + 3, dtype=torch.float32)
        tensors = [torch.randn(3, 5), torch.zeros(0, 4), torch.tensor(2.5), torch.ones(7, dtype=torch.bfloat16), large]
        tensors.append(torch.randn(4, 6).t())
        held = [copies.copy(tensor) for tensor in tensors]
        copies.wait()
        for tensor, copy in zip(tensors, held, strict=True):
            assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.is_contiguous()
        storages = {copy.untyped_storage().data_ptr() for copy in held}
        assert len(storages) == 2
        ends = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in held)
        assert all(before[1] <= after[0] for before, after in pairwise(ends))
