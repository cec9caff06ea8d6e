"""The mistakes that people make, as command lines, and what each one is answered: the source of docs/errors.md.

    python -m tests.cases.mistakes --markdown     # writes docs/errors.md anew

All commands run one after the other in one process, with what they need around them, in a folder of their own.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import pkgutil
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.support.paths import DEMO, ROOT
from tests.support.picture_files import write_images
from tests.support.scripts import load_script

PAGE = ROOT / "docs" / "errors.md"
HERE = "/here"  # stands for the folder in which the commands run
MINE = "--train-data images"
SHORT = "--batch-size 2 --num-workers 0"
HELD_OUT = "--test-data images --version base --max_length 64"
TEXT_OF_LLAVA = {
    "image": "7Kq2.png",
    "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}],
}


# What else is so while a command runs


@contextlib.contextmanager
def no_right_to_closed() -> Iterator[None]:
    """As for a user who may not enter `closed`; the administrator may enter every folder."""
    stat, scandir = os.stat, os.scandir

    def guard(call):
        def guarded(path=".", *args, **settings):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("closed"):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return call(path, *args, **settings)

        return guarded

    with mock.patch.object(os, "stat", guard(stat)), mock.patch.object(os, "scandir", guard(scandir)):
        yield


def full_disk():
    full = os.statvfs_result((4096, 4096, 9, 8, 8, 0, 0, 0, 0, 255))
    return mock.patch.object(os, "statvfs", lambda path: full)


def another_run_in_first():
    from sat_lora.training.runs.run_lock import RunLock

    return RunLock("runs/first", doing="training", option="--save")


@contextlib.contextmanager
def port_in_use() -> Iterator[None]:
    """By this process, if nobody else on the machine has it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 4711)))
        yield


def ctrl_c_in(name: str) -> Callable:
    """Ctrl-C when the function of that dotted name is called."""

    @contextlib.contextmanager
    def given() -> Iterator[None]:
        call = pkgutil.resolve_name(name)

        def interrupted(*args, **settings):
            signal.raise_signal(signal.SIGINT)
            return call(*args, **settings)

        with mock.patch(name, interrupted):
            yield

    return given


@dataclass(frozen=True)
class Mistake:
    row: int
    """The kind; kinds are numbered as they were first written down."""
    done: str
    """What somebody did."""
    command: str
    status: int = 2
    says: str = ": error: "
    """Stands in the first line of the answer, and in no other line."""
    given: Callable = contextlib.nullcontext
    saves: str | None = None
    """A run that can be gone on with afterwards."""


def train(row: int, done: str, options: str, *more, **settings) -> Mistake:
    return Mistake(row, done, f"finetune_cogvlm.py {options}", *more, **settings)


# In the order in which they run: the first one leaves runs/first, which later ones need.
MISTAKES = [
    train(
        16,
        "NCCL without a GPU",
        f"{MINE} {SHORT} --train-iters 1 --experiment-name first --distributed-backend nccl",
        status=0,
        says="--distributed-backend: ",
        saves="runs/first",
    ),
    train(1, "a base that is not there", f"--from_pretrained no/such/base {MINE}"),
    Mistake(1, "the same in a merge", "sat-lora merge --base no/base --adapter runs/first/adapter --out merged"),
    train(2, "a folder of images as base", f"--from_pretrained images {MINE}"),
    train(2, "a name of a hub as base", f"--from_pretrained THUDM/cogvlm-base-490-hf {MINE}"),
    train(3, "a slip in the data's path", "--train-data imges"),
    train(3, "the same in validation data", f"{MINE} --valid-data imges"),
    train(3, "a variable of the shell that is not set", "--train-data ''"),
    train(4, "an option of another trainer", f"{MINE} --learning-rate 1e-4"),
    train(4, "an option for what is not there", f"{MINE} --qlora"),
    train(5, "a slip in an option", "--train_dat images"),
    train(5, "DeepSpeed's entries as settings", f"{MINE} --config my.yaml"),
    train(5, "a slip in a file of settings", f"{MINE} --config slip.yaml"),
    train(5, "a file of settings that is no YAML", f"{MINE} --config tab.yaml"),
    train(6, "a rate that is no number", f"{MINE} --lr abc"),
    train(6, "a comma in a number", f"{MINE} --lr 0,0001"),
    train(6, "commas in shares", f"{MINE} --split 0,8 0,1"),
    train(6, "a rate below 0", f"{MINE} --lr -1"),
    train(6, "half a step", f"{MINE} --train-iters 1.5"),
    train(6, "a batch of nothing", f"{MINE} --batch-size 0"),
    train(6, "a rank of 0", f"{MINE} --r 0"),
    train(6, "a ZeRO stage that is none", f"{MINE} --zero-stage 4"),
    train(7, "no data for a base of one's own", "--from_pretrained base"),
    train(8, "two keys that may be the prompt", "--train-data keys.jsonl"),
    train(8, "a line that is no JSON", "--train-data broken.jsonl"),
    train(9, "an image of LLaVA without a place in the text", "--train-data llava.json"),
    train(9, "a place without its image", "--train-data sharegpt.jsonl"),
    train(9, "turns out of order", "--train-data turns.jsonl"),
    train(9, "more images than the base takes", "--train-data images.jsonl"),
    train(9, "data of another layout than was insisted on", "--train-data keys.jsonl --data-format messages"),
    train(9, "an export of Label Studio", "--train-data studio.json"),
    train(10, "images beside a folder of labels", "--train-data sft"),
    train(10, "images beside a table of labels", "--train-data table/images"),
    train(10, "the table itself", "--train-data table/train.csv"),
    train(11, "to resume what is not there", "--resume runs/nowhere"),
    train(11, "to resume what is no run", "--resume images"),
    train(11, "to resume the folder of runs", "--resume runs"),
    train(11, "to resume an adapter", "--resume runs/first/adapter/1"),
    train(12, "to resume with another batch", "--resume runs/first --train-iters 2 --batch-size 3"),
    train(13, "to resume a finished run", "--resume runs/first", status=0, says="is already at step"),
    train(14, "a slip in a preset", f"{MINE} --target_modules language-mpl"),
    train(14, "PEFT's name of a layer", f"{MINE} --target_modules q_proj v_proj"),
    train(14, "PEFT's name of all layers", f"{MINE} --target_modules all-linears"),
    train(15, "float16 without a GPU", f"{MINE} --fp16"),
    train(15, "two mistakes at once", f"{MINE} --fp16 --model-parallel-size 3"),
    train(17, "YAML for DeepSpeed", f"{MINE} --deepspeed_config my.yaml"),
    train(18, "too short a length", f"{MINE} --max_length 30"),
    train(19, "a folder without tokenizer", f"{MINE} --local_tokenizer images"),
    train(19, "a name of a hub as tokenizer", f"{MINE} --local_tokenizer lmsys/vicuna-7b-v1.5"),
    train(20, "an empty folder of data", "--train-data empty"),
    train(20, "images that are cut off", "--train-data cut"),
    train(
        20,
        "one image of two broken",
        f"--train-data half {SHORT} --train-iters 4 --experiment-name half",
    ),
    train(21, "data that the user may not read", "--train-data closed/images", given=no_right_to_closed),
    train(22, "a link to a disk that is not there", f"{MINE} --save unmounted/runs"),
    train(22, "a file as folder of runs", f"{MINE} --save my.yaml"),
    train(23, "a full disk", f"{MINE} --experiment-name full", given=full_disk),
    train(24, "a second run of the same name", f"{MINE} {SHORT} --experiment-name first"),
    train(25, "two runs in one folder", "--resume runs/first --train-iters 2", given=another_run_in_first),
    Mistake(
        26,
        "to evaluate on another base",
        f"evaluate_cogvlm.py --from_pretrained other-base --adapter runs/first/adapter {HELD_OUT}",
    ),
    Mistake(26, "to evaluate without test data", "evaluate_cogvlm.py --run runs/first"),
    Mistake(26, "to evaluate nothing", "evaluate_cogvlm.py"),
    Mistake(
        27,
        "to merge into another base",
        "sat-lora merge --base other-base --adapter runs/first/adapter --out merged",
    ),
    Mistake(28, "to merge over a folder", "sat-lora merge --base base --adapter runs/first/adapter --out images"),
    Mistake(28, "to merge what is not there", "sat-lora merge --base base --adapter no/adapter --out merged"),
    Mistake(28, "to merge an adapter of PEFT", "sat-lora merge --base base --adapter peft --out merged"),
    Mistake(28, "to merge a run", "sat-lora merge --base base --adapter runs/first --out merged"),
    Mistake(29, "a slip in a command", "sat-lora mrege --base base"),
    Mistake(29, "no command", "sat-lora"),
    Mistake(29, "a command without its options", "sat-lora merge"),
    train(30, "test data as tar", f"{MINE} --test-data shards.tar"),
    Mistake(30, "the same in an evaluation", "evaluate_cogvlm.py --from_pretrained base --test-data shards.tar"),
    train(30, "shards without end", "--train-data shards-{0..99999999999}.tar"),
    train(30, "a prompt format that is none", f"{MINE} --version cog"),
    Mistake(31, "to pack what is not there", "pack_shards.py nowhere --out shards"),
    Mistake(31, "shards of nothing", "pack_shards.py images --out shards --samples-per-shard 0"),
    train(34, "a scheme of quantising that is none", f"{MINE} --quantize nf8"),
    train(34, "to quantise what is not there", f"{MINE} --quantize nf4 --quantize_modules q_proj"),
    train(34, "LoftQ on a base that is whole", f"{MINE} --init_lora_weights loftq"),
    Mistake(34, "to quantise a folder of images", "sat-lora quantize --base images --out small"),
    Mistake(34, "a card without a size", "sat-lora estimate --fit large"),
    Mistake(35, "a slip in a metric", f"evaluate_cogvlm.py --run runs/first {HELD_OUT} --metrics exact-mach"),
    Mistake(35, "a metric of a missing file", f"evaluate_cogvlm.py --run runs/first {HELD_OUT} --metrics mine:f"),
    train(35, "to choose the best by what is not measured", f"{MINE} {SHORT} --metric rouge --experiment-name best"),
    train(35, "an early end without validation", f"{MINE} {SHORT} --early-stopping 2 --experiment-name early-end"),
    Mistake(36, "to look at data that are not there", "sat-lora data nowhere"),
    train(36, "a column that the data lack", "--train-data keys.jsonl --columns prompt=caption"),
    train(36, "a weight that is none", "--train-data images:much"),
    Mistake(37, "to ask about a missing picture", "sat-lora chat --run runs/first --image no.png --prompt ?"),
    Mistake(37, "to talk to a missing adapter", "sat-lora chat --from_pretrained base --adapter no --prompt ?"),
    Mistake(37, "to serve others without a key", "sat-lora serve --run runs/first --host 0.0.0.0"),
    Mistake(37, "to serve at a port in use", "sat-lora serve --run runs/first --port 4711", given=port_in_use),
    train(
        32,
        "Ctrl-C in training",
        f"{MINE} {SHORT} --train-iters 50 --log-interval 1 --experiment-name stopped",
        status=130,
        says="stopped by SIGINT",
        given=ctrl_c_in("sat_lora.training.runs.logs.run_logs.RunLog.on_step"),
        saves="runs/stopped",
    ),
    train(
        33,
        "Ctrl-C while the base loads",
        f"{MINE} {SHORT} --experiment-name early",
        status=130,
        says="stopped by Ctrl-C",
        given=ctrl_c_in("sat_lora.training.prepare.load_cogvlm"),
    ),
    Mistake(
        33,
        "Ctrl-C in an evaluation",
        f"evaluate_cogvlm.py --run runs/first {HELD_OUT}",
        status=130,
        says="stopped by Ctrl-C",
        given=ctrl_c_in("sat_lora.training.prepare.load_cogvlm"),
    ),
    Mistake(
        33,
        "Ctrl-C in a merge",
        "sat-lora merge --base base --adapter runs/first/adapter --out merged",
        status=130,
        says="stopped by Ctrl-C",
        given=ctrl_c_in("sat_lora.adapters.merge.merged_tensor"),
    ),
]  # fmt: skip

ALSO = {  # tests of the same kinds that take processes, launchers and disks of their own
    4: ["tests/cases/test_published_scripts.py::test_a_near_name_is_a_hint_and_never_an_option"],
    6: ["tests/cases/test_published_scripts.py::test_whole_numbers_may_be_written_as_people_write_them"],
    12: ["tests/training/test_preflight.py::test_another_number_of_ranks_has_to_keep_the_samples_of_a_step"],
    15: ["tests/finetune_demo/test_finetune_cogvlm.py::test_ranks_that_do_not_divide_are_told_once"],
    20: ["tests/faults/test_broken_images.py::test_too_many_stop_every_rank_with_the_list_and_keep_the_adapter"],
    21: ["tests/cases/test_starting.py::test_folders_that_may_not_be_entered_are_problems_of_their_options"],
    22: ["tests/cases/test_run_is_never_lost.py::test_a_folder_in_which_nothing_can_be_written_is_refused_by_name"],
    23: ["tests/faults/test_full_disk.py::test_twenty_full_disks_keep_the_old_adapter_and_say_so_on_every_rank"],
    24: ["tests/cases/test_run_is_never_lost.py::test_a_second_start_ends_on_every_rank_before_the_base_loads"],
    25: ["tests/cases/test_run_is_never_lost.py::test_a_rank_that_outlives_its_launcher_holds_the_lock"],
    32: ["tests/faults/test_stop_signals.py::test_every_launcher_lets_the_ranks_save"],
    33: ["tests/cases/test_stopping.py::test_in_the_middle_of_an_import_it_ends_at_once"],
}


@dataclass(frozen=True)
class Answer:
    status: int | str
    """A traceback, where an exception came out."""
    out: str
    err: str
    lost: tuple[str, ...]
    """Files that are gone or changed."""
    left: tuple[str, ...]
    """Files that are new."""

    def lines(self, mistake: Mistake) -> list[str]:
        """The first line that says it, and those behind it that belong to it."""
        lines = [*self.err.splitlines(), *self.out.splitlines()]
        first = next((number for number, line in enumerate(lines) if mistake.says in line), None)
        if first is None:
            return []
        last = first + 1
        while last < len(lines) and lines[last][:2] in ("  ", "- "):
            last += 1
        return lines[first:last]


# Running them


def set_up(folder: Path) -> None:
    """What the commands find where they run."""
    import torch

    names = ["7Kq2.png", "m3xZ.png", "p9.png", "22a.png"]
    write_images(folder / "images", names)
    write_images(folder / "closed" / "images", names)
    write_images(folder / "sft" / "images", ["000001.png"])
    labels = folder / "sft" / "labels_en"
    labels.mkdir()
    (labels / "000001.json").write_text(json.dumps(TEXT_OF_LLAVA["conversations"]))
    rows = "".join(f"{Path(name).stem};word {number}\r\n" for number, name in enumerate(names))
    write_images(folder / "table" / "images", names)
    (folder / "table" / "train.csv").write_text("id;label\r\n" + rows, encoding="utf-16")
    (folder / "studio.json").write_text(json.dumps([{"id": 1, "data": {"image": "7Kq2.png"}, "annotations": []}]))
    (folder / "empty").mkdir()
    (folder / "unmounted").symlink_to("nowhere/at/all")
    for name in ("cut", "half"):
        write_images(folder / name, names[:2])
    for image in ("cut/7Kq2.png", "cut/m3xZ.png", "half/m3xZ.png"):
        (folder / image).write_bytes((folder / image).read_bytes()[:-30])
    (folder / "keys.jsonl").write_text(
        '{"img": "images/7Kq2.png", "question": "What?", "query": "Which?", "answer": "7"}\n'
    )
    good = '{"image": "images/7Kq2.png", "answer": "7"}'
    (folder / "broken.jsonl").write_text(f'{good}\n{good[:-1]} "prompt": "What?"}}\n')
    question, reply = TEXT_OF_LLAVA["conversations"]
    without_place = {**TEXT_OF_LLAVA, "conversations": [{**question, "value": "?"}, reply]}
    (folder / "llava.json").write_text(json.dumps([{"id": "1", **without_place}]))
    (folder / "turns.jsonl").write_text(json.dumps({"conversations": [question, reply, reply]}) + "\n")
    images = [f"images/{name}" for name in names[:2]]
    (folder / "images.jsonl").write_text(json.dumps({"image": images, "prompt": "Which?", "answer": "a"}) + "\n")
    (folder / "sharegpt.jsonl").write_text(json.dumps({"conversations": TEXT_OF_LLAVA["conversations"]}) + "\n")
    (folder / "my.yaml").write_text("train_batch_size: 8\nzero_optimization:\n  stage: 2\n")
    (folder / "slip.yaml").write_text("schedule:\n  batchsize: 8\n  warmup: 3%\n")
    (folder / "tab.yaml").write_text("optimizer:\n\tlr: 1e-4\n")
    (folder / "shards.tar").write_bytes(bytes(1024))
    for name in ("base", "other-base"):
        shutil.copytree(DEMO / "tiny_cogvlm", folder / name)
    weights = folder / "other-base" / "release" / "mp_rank_00_model_states.pt"
    content = torch.load(weights, weights_only=True)
    content["module"] = {name: tensor + tensor.abs().mean() / 2 for name, tensor in content["module"].items()}
    torch.save(content, weights)
    (folder / "peft").mkdir()
    peft = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query_key_value"]}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(peft))
    (folder / "peft" / "adapter_model.safetensors").write_bytes(bytes(16))


def contents(folder: Path) -> dict[str, str]:
    """A hash by name; the files of the watchdog are each start's own."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "watchdog")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main_of(program: str) -> Callable[[list[str]], int]:
    if program == "sat-lora":
        from sat_lora.cli import main

        return main
    return load_script(program.removesuffix(".py")).main


@contextlib.contextmanager
def captured() -> Iterator[dict[str, str]]:
    """What is written to the descriptors 1 and 2 and by Python meanwhile, as {"out": ..., "err": ...} afterwards."""
    texts = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for name, number in (("out", 1), ("err", 2)):
            files[name] = stack.enter_context(tempfile.TemporaryFile())
            copy = os.dup(number)
            stack.callback(os.close, copy)
            stack.callback(os.dup2, copy, number)
            os.dup2(files[name].fileno(), number)
        with (
            open(1, "w", encoding="utf-8", closefd=False, buffering=1) as out,
            open(2, "w", encoding="utf-8", closefd=False, buffering=1) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield texts
        for name, file in files.items():
            file.seek(0)
            texts[name] = file.read().decode()


def answer_to(mistake: Mistake, folder: Path) -> Answer:
    """In the current folder, which is `folder`."""
    program, *argv = shlex.split(mistake.command)
    before = contents(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    main = main_of(program)
    with captured() as texts:
        # As Python's own handler of last resort, which a process with another handler does not have.
        logger, handler = logging.getLogger("sat_lora"), logging.StreamHandler()
        logger.addHandler(handler)
        try:
            with mistake.given(), mock.patch.object(sys, "argv", [program]):
                status = main(argv)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            status = traceback.format_exc()
        finally:
            logger.removeHandler(handler)
            for number, former in handlers.items():
                signal.signal(number, former)
    after = contents(folder)
    lost = tuple(sorted(name for name in before if after.get(name) != before[name]))
    left = tuple(sorted(after.keys() - before.keys()))
    return Answer(status, _as_on_the_page(texts["out"], folder), _as_on_the_page(texts["err"], folder), lost, left)


def _as_on_the_page(text: str, folder: Path) -> str:
    """Without what is of this machine and this moment."""
    clone = ((ROOT, "/sat_lora"), (ROOT.resolve(), "/sat_lora"))
    for name, placeholder in ((sys.executable, "python"), (folder, HERE), *clone):  # one may lie within the next
        text = text.replace(str(name), placeholder)
    text = re.sub(r"'((?:/sat_lora|/here)[\w./-]*|python)'", r"\1", text)  # what a space in their names asked for
    text = re.sub(r"\b(process|kill) \d+", r"\1 4711", text)
    return re.sub(r" on [^\s,]+, since [\d-]+ [\d:]+", " on node17, since 2026-01-01 12:00:00", text)


def answers(folder: str) -> list[Answer]:
    """To every mistake, in their order, in this process, whose folder and environment they change."""
    import torch

    from sat_lora.parallel import distributed

    path = Path(folder).resolve()
    set_up(path)
    os.chdir(path)
    logging.getLogger("sat_lora").propagate = False
    with (
        mock.patch.object(distributed, "destroy", lambda: None),  # groups are there for the next command too
        mock.patch.object(torch.cuda, "is_available", lambda: False),
    ):
        return [answer_to(mistake, path) for mistake in MISTAKES]


def all_answers(folder: Path) -> list[Answer]:
    """To every mistake, by a process of their own."""
    from tests.cases import mistakes
    from tests.support.ranks import run_ranks

    (made,) = run_ranks(mistakes.answers, 1, str(folder), timeout=240)
    return made


# The page

INTRO = f"""# What a mistake is answered

Each mistake below was made: its command ran in a folder `{HERE}`, and what it said stands beside it, with its exit
status; `/sat_lora` stands for the clone. A mistake is one message and status 2, Ctrl-C is one line and 130; there is
never a traceback, and no file of a run is lost. `python -m tests.cases.mistakes --markdown` writes this page, and
`tests/cases/test_mistakes.py` checks it.
"""
ALSO_SHOWN = """
The same kinds with several ranks, launchers, processes and disks:

| # | Shown by |
| --- | --- |"""


def page(made: list[Answer]) -> str:
    """docs/errors.md."""
    lines = [INTRO, "| # | Mistake | Command | What it says | Status |", "| --- | --- | --- | --- | --- |"]
    for mistake, answer in sorted(zip(MISTAKES, made), key=lambda pair: pair[0].row):
        said = "<br>".join(map(_code, answer.lines(mistake)))
        lines.append(f"| {mistake.row} | {mistake.done} | {_code(mistake.command)} | {said} | {answer.status} |")
    lines.append(ALSO_SHOWN)
    lines += [f"| {row} | {'<br>'.join(map(_code, tests))} |" for row, tests in ALSO.items()]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    mark = "``" if "`" in text else "`"
    return f"{mark}{text.strip()}{mark}".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="write docs/errors.md, instead of printing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = page(all_answers(Path(folder)))
    if options.markdown:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
