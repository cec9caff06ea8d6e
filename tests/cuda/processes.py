"""A function in a process of its own, alone in its process group, on one device."""

import multiprocessing
import os
import traceback

LIMIT = 90.0  # seconds


def run_alone(device: str, target, *args):
    """target(*args) of a fresh process that sees `device` alone; its failure is an AssertionError with its traceback.

    `target` is a function of a test module; what it returns has to be picklable.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(sender, device, target, args), daemon=True)
    with _described(device):
        process.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT):
            raise AssertionError(f"no answer after {LIMIT:.0f} s")
        status, answer = receiver.recv()
    except EOFError as error:
        raise AssertionError("the process ended without an answer") from error
    finally:
        process.kill()  # DeepSpeed's destructors would wait
        process.join()
    if status != "done":
        raise AssertionError(answer)
    return answer


class _described:
    """Inside, the environment is that of a single rank; a process that starts reads it before it imports anything."""

    def __init__(self, device: str):
        self.alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", OMP_NUM_THREADS="1")
        if device == "cpu":
            self.alone |= dict(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

    def __enter__(self) -> None:
        self.before = dict(os.environ)
        os.environ.pop("MASTER_PORT", None)
        os.environ.update(self.alone)

    def __exit__(self, *error) -> None:
        os.environ.clear()
        os.environ.update(self.before)


def _main(sender, device: str, target, args: tuple) -> None:
    try:
        import torch

        torch.set_num_threads(1)
        sender.send(("done", target(*args)))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    finally:
        sender.close()
