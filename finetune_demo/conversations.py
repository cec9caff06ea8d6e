"""The demo's second task, in one command: conversations about captchas, of three turns each.

    python finetune_demo/conversations.py                               # data, training, answers before and after
    python finetune_demo/conversations.py --run runs/conversations      # the answers of a run that there is

Other options are those of finetune_cogvlm.py. Every question comes behind what the model itself has answered before,
and a conversation counts if all of its answers are exact.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sat_lora.cogvlm import CogVLMModel
    from sat_lora.data.samples import ImageTextDataset, Item

NAME = "conversations.py"
HERE = Path(__file__).resolve().parent
BATCH = 100  # conversations at once


def main(argv: list[str] | None = None) -> int:
    """Make the data, train and ask, and return the exit status: 0, 2 for a mistake, 130 for Ctrl-C, or the run's."""
    from sat_lora.terminal.edge import run_command

    return run_command(NAME, lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    from sat_lora.terminal.option_parser import OptionParser

    parser = OptionParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, takes_more=True
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of conversations (default: made, and kept here)")
    parser.add_argument("--run", metavar="RUN_FOLDER", help="ask the base and the adapter of this run; train none")
    options, more = parser.parse_known_args(argv)
    if options.run and more:
        parser.refuse_unknown(more)
    sys.path.insert(0, str(HERE))
    from make_conversations import DEFAULT_OUT, make_conversations

    data = options.data or DEFAULT_OUT
    argv = training_options(data, more)
    run = options.run or str(_run_folder(argv))  # a mistake among the options is told before anything is made
    if options.data is None:
        make_conversations(data)
    status = 0 if options.run else _train(argv)
    if status == 0:
        print(table(*asked(run, data / "test.json")), flush=True)
    return status


def training_options(data: Path, more: Sequence[str]) -> list[str]:
    """Return the options of finetune_cogvlm.py for a run on the conversations in `data`. more: further ones."""
    argv = ["--config", str(HERE / "conversations.yaml"), "--from_pretrained", str(HERE / "tiny_cogvlm")]
    return [*argv, "--train-data", str(data / "train.json"), "--valid-data", str(data / "valid.json"), *more]


def _run_folder(argv: list[str]) -> Path:
    from sat_lora.training.settings.options import parse_options

    return parse_options(argv, prog=NAME).run_folder


def _train(argv: list[str]) -> int:
    """Run finetune_cogvlm.py, print what time it took, and return its exit status."""
    started = time.monotonic()
    before = _children_seconds()
    status = subprocess.run([sys.executable, str(HERE / "finetune_cogvlm.py"), *argv], check=False).returncode
    seconds = _children_seconds() - before
    print(f"the run took {time.monotonic() - started:.0f} s, and {seconds:.0f} s of processor time", flush=True)
    return status


def _children_seconds() -> float:
    """Return the processor time of all processes that this one has started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def asked(run: str, data: Path) -> tuple[list["Item"], dict[str, list[list[str]]]]:
    """Return (the conversations of a file, the answers to the questions of each, by base and base + adapter).

    run: a run folder, whose base, adapter and prompt format are asked.
    """
    from sat_lora.adapters.save_load import load_adapter
    from sat_lora.commands.evaluate import build_parser, read_settings
    from sat_lora.data.samples import read_items
    from sat_lora.lora.mixin import lora_mixins
    from sat_lora.parallel.distributed import init_distributed, init_model_parallel
    from sat_lora.training.prepare import dataset_maker, load_base

    world = init_model_parallel(init_distributed())
    settings = read_settings(build_parser(NAME).parse_args(["--run", run, "--test-data", str(data)]))
    model, sizes = load_base(settings.config, world)
    load_adapter(model, settings.adapter)
    model.eval()
    items = read_items([data])
    dataset = dataset_maker(settings.config.model, settings.config.data, sizes, with_answer=False)(items)
    answers = {}
    for side in ("base", "base + adapter"):
        for mixin in lora_mixins(model).values():
            mixin.enabled = side != "base"
        answers[side] = answers_of(model, dataset, world.device)
    return items, answers


def answers_of(model: "CogVLMModel", dataset: "ImageTextDataset", device) -> list[list[str]]:
    """Return the answers to all questions of each conversation, each asked behind the model's own ones before it."""
    from sat_lora.cogvlm.decoding.generate import generate
    from sat_lora.cogvlm.inputs.text import Sample
    from sat_lora.data.samples import collate
    from sat_lora.errors import DataError
    from sat_lora.training.steps.step import to_device

    tokenizer = dataset.tokenizer
    queries = [questions_of(item) for item in dataset.items]
    answers: list[list[str]] = [[] for _ in queries]
    longest = max(len(answer) for item in dataset.items for answer in right_answers(item)) + 1
    for turn in range(max(map(len, queries))):
        numbers = [number for number, own in enumerate(queries) if turn < len(own)]
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            samples = []
            for number in chosen:
                history = tuple(zip(queries[number], answers[number]))
                item = replace(dataset.items[number], prompt=queries[number][turn], history=history)
                sample = dataset.make_sample(item)
                if not isinstance(sample, Sample):
                    raise DataError(sample.reason)
                samples.append(sample)
            batch = to_device(collate(samples, image_size=dataset.image_size), device)
            tokens = generate(model, batch, max_new_tokens=longest, eos_token_id=tokenizer.eos_token_id)
            for number, ids in zip(chosen, tokens, strict=True):
                answers[number].append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers


def questions_of(item: "Item") -> list[str]:
    """Return the questions of a conversation, the first one first."""
    return [*(query for query, _ in item.history), item.prompt or ""]


def right_answers(item: "Item") -> list[str]:
    """Return the answers to `questions_of`."""
    return [*(answer for _, answer in item.history), item.answer]


def table(items: Sequence["Item"], answers: dict[str, list[list[str]]]) -> str:
    """Return, by side, how many conversations have exact answers alone, and how many answers to each question are."""
    questions = list(dict.fromkeys(question for item in items for question in questions_of(item)))
    widths = [max(len(question), 8) for question in questions]
    titles = "".join(f"   {question:>{width}}" for question, width in zip(questions, widths))
    lines = [f"{len(items)} conversations   every answer exact{titles}"]
    for side, said in answers.items():
        whole = sum(own == right_answers(item) for own, item in zip(said, items, strict=True)) / len(items)
        shares = []
        for question, width in zip(questions, widths):
            exact = [
                answer == right
                for own, item in zip(said, items, strict=True)
                for asked_for, answer, right in zip(questions_of(item), own, right_answers(item), strict=True)
                if asked_for == question
            ]
            shares.append(f"   {sum(exact) / len(exact):>{width}.1%}")
        lines.append(f"  {side:<16}   {whole:>18.1%}{''.join(shares)}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(f"{NAME}: error: {error} for {sys.executable}; see Two commands in README.md", file=sys.stderr)
        sys.exit(2)
    run_script(NAME, main)
