"""`sat-lora chat`: ask a base and its adapters, once or in a conversation."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lora.commands.parts import ANY_BASE, examples
from sat_lora.terminal.option_types import count, not_negative, positive_int

if TYPE_CHECKING:
    from sat_lora.chat.session import Chat
    from sat_lora.parallel.launch import Place
    from sat_lora.training.settings.config import TrainConfig

DRAWN = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "chat",
        help="ask a base and its adapters about a picture, once or in a conversation",
        **examples(
            "sat-lora chat --run runs/mine",
            'sat-lora chat --run runs/mine --image cat.png --prompt "What is this?"',
            "sat-lora chat --base cogvlm-chat-v1.1 --adapter runs/a/adapter runs/b/adapter --temperature 0.7",
        ),
    )
    add_model_options(command)
    option = command.add_argument
    option("--image", metavar="FILE", help="the picture (CogVLM2-Video: film, or folder of its frames) to ask about")
    option("--prompt", metavar="TEXT", help="print the answer to this and end, instead of a conversation")
    option("--temperature", type=not_negative, metavar="T", help="draw answers; 1 is the model's own distribution")
    option("--top_p", type=not_negative, metavar="P", help="draw from the likeliest tokens of this probability")
    option("--top_k", type=count, metavar="N", help="draw from so many likeliest tokens")
    option("--repetition-penalty", type=not_negative, metavar="X", help="above 1: against saying a word again")
    option("--seed", type=int, metavar="N", help="draw the same answers every time")
    option("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")
    option("--model-parallel-size", type=positive_int, metavar="N", help="ranks that share one model (default: 1)")
    command.set_defaults(run_command=run)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Add the options that name a base and its adapters, and say how they are loaded and asked."""
    option = command.add_argument
    from_run = "a run folder: base, adapter and formats that are not given come from it"
    option("--run", metavar="RUN_FOLDER", help=from_run)
    option("--base", "--from_pretrained", metavar="DIR", help="SAT or Hugging Face folder of the base, or a merged one")
    adapters = "adapter folders, the first answers (default: RUN_FOLDER/adapter)"
    option("--adapter", nargs="+", metavar="DIR", help=adapters)
    option("--any-base", action="store_true", help=ANY_BASE)
    trust = "unpickle all of the base: runs any code in it"
    option("--trust-checkpoint", action="store_true", default=None, help=trust)
    option("--local_tokenizer", metavar="DIR", help="tokenizer folder (default: the base's)")
    formats = ["base", "chat", "vqa", "chat_old"]
    option("--version", choices=formats, help="prompt format of the base (default: its config's, or chat)")
    option("--max-new-tokens", type=positive_int, default=512, metavar="N", help="of an answer (default: 512)")
    length = "of question, turns before and answer, in tokens (default: the base's, or the run's where that is longer)"
    option("--max_length", type=positive_int, metavar="N", help=length)
    special = "a text that spells </s> means the token"
    option("--special-tokens-in-text", action="store_true", default=None, help=special)
    option("--max-pixels", type=positive_int, metavar="N", help="a larger picture is not read (default: 89478485)")
    held = "hold the base's linears in so few bits (default: as in the run, or as its folder does)"
    option("--quantize", choices=["none", "nf4", "int8"], help=held)
    which = "of --quantize: which linears, by preset or pattern (default: as in the run, or all-linear)"
    option("--quantize_modules", nargs="+", metavar="NAME", help=which)
    kept = "of --quantize: linears that stay as they are (default: as in the run, or none)"
    option("--keep_modules", nargs="+", metavar="NAME", help=kept)
    option("--bf16", action="store_true", default=None, help="bfloat16 (default on CUDA)")
    option("--fp16", action="store_true", default=None, help="float16")


def run(options: argparse.Namespace) -> None:
    """Answer --prompt, or go on until the input ends. Raises a SatLoraError for a user's mistake."""
    from sat_lora.parallel.launch import find_place

    place = find_place()
    chat = load_chat(options)
    is_main = place.rank == 0
    if options.prompt is None:
        from sat_lora.chat.terminal import Conversation, converse, typed_lines

        lines: Iterable[str] = _while_somebody_reads(typed_lines(chat)) if is_main else ()
        conversation = Conversation(chat, sys.stdout if is_main else None, is_alone=place.size == 1)
        converse(conversation, lines if place.size == 1 else _of_first_rank(lines, is_main))
        return
    from sat_lora.printable import printable_lines

    for piece in chat.stream(options.prompt):
        if is_main:
            print(printable_lines(piece), end="", flush=True)
    if is_main:
        print(flush=True)


def read_settings(options: argparse.Namespace) -> tuple["TrainConfig", dict[str, str]]:
    """Return the settings of the options, filled up from the run, and the adapters' folders by name.

    Raises ConfigError where no base is named, the run cannot be read, or the base is held otherwise than options say.
    """
    from sat_lora.cogvlm.inputs.prompts import settings_of_base
    from sat_lora.errors import ConfigError
    from sat_lora.training.settings.config import KNOWN
    from sat_lora.training.settings.resolve import held_as_its_folder, resolve
    from sat_lora.training.settings.run_settings import settings_of_run

    stored: dict[str, Any] = {}
    if options.run:
        try:
            stored = settings_of_run(options.run)
        except ConfigError as error:
            raise ConfigError(f"--run: {error}") from error
        stored |= {"given": [], "train_iters": None, "epochs": None, "model_parallel_size": 1}
        stored |= {"bf16": False, "fp16": False} if options.bf16 or options.fp16 else {}
    taken = {name: value for name, value in vars(options).items() if value is not None and name in KNOWN}
    given = {name: value for name, value in taken.items() if name not in ("prompt", "max_length", "seed")}
    given |= {"from_pretrained": options.base} if options.base else {}
    base = {**stored, **given}.get("from_pretrained")
    if base is None:
        raise ConfigError("--base missing: give the folder of a base, or --run RUN_FOLDER of a run that has one")
    stored = {name: value for name, value in stored.items() if name != "version" or value}
    config, _ = resolve(given, resumed_run=stored, base=settings_of_base(base))
    config = held_as_its_folder(config)
    folders = options.adapter or ([str(Path(options.run) / "adapter")] if options.run else [])
    return config, names_of(folders)


def names_of(folders: Iterable[str]) -> dict[str, str]:
    """Return adapter folders by what they are called: by their run, where they lie in one; no two alike."""
    names: dict[str, str] = {}
    for folder in folders:
        parts = Path(folder).absolute().parts[1:]
        called = next((part for part in reversed(parts) if part not in ("adapter", "best") and not part.isdigit()), "")
        name = called.replace(".", "_").strip() or "adapter"
        name = "adapter" if name == "base" else name
        taken = sum(other == name or other.startswith(f"{name}-") for other in names)
        names[f"{name}-{taken + 1}" if taken else name] = folder
    return names


def load_chat(options: argparse.Namespace) -> "Chat":
    """Return a conversation as the options say, about their picture if they have one. Raises a SatLoraError for a
    user's mistake, before anything slow is imported where that can be.
    """
    from sat_lora.parallel.launch import find_place

    config, adapters = read_settings(options)
    place = find_place()
    image = vars(options).get("image")
    _check_early(config, adapters, place, image)
    sampling = {name: vars(options)[name] for name in DRAWN if vars(options).get(name) is not None}
    chat = _load(options, config, adapters, place, sampling)
    if image is not None:
        chat.show(image)
    return chat


def _check_early(config: "TrainConfig", adapters: dict[str, str], place: "Place", image: str | None) -> None:
    """Raise ConfigError, before anything slow is imported, with what is not there or cannot be."""
    from sat_lora.errors import ConfigError
    from sat_lora.files.paths import missing_adapter
    from sat_lora.printable import printable
    from sat_lora.training.early import base_problems

    problems = base_problems(config.model.base)
    missing = (missing_adapter(folder) for folder in adapters.values())
    problems += [f"--adapter: {problem}" for problem in missing if problem]
    if image is not None and not Path(image).exists():
        problems.append(f"--image: {printable(image)} is no file")
    elif image is not None and not problems and (problem := film_problem(config.model.base, Path(image))):
        problems.append(f"--image: {printable(image)} {problem}")
    size = config.parallel.model_parallel_size
    if place.size != size:
        problems.append(
            f"--model-parallel-size: got {size} and {place.size} rank{'s' * (place.size > 1)}, wanted as many; start "
            f"them with torchrun --nproc_per_node {size} -m sat_lora.cli chat ..."
        )
    if problems:
        raise ConfigError("; ".join(problems))


def film_problem(base: str, image: Path) -> str | None:
    """Return why a base cannot be asked about what lies at `image`; None where it can, as far as its kind says."""
    from sat_lora.cogvlm.inputs.picture_kinds import FILM_SUFFIXES

    if image.is_file() and image.suffix.lower() not in FILM_SUFFIXES:
        return None
    from sat_lora.cogvlm.checkpoints.load import read_config
    from sat_lora.cogvlm.families import family_of

    family = family_of(read_config(base))
    if image.is_file() or image.is_dir():
        kind = "a film" if image.is_file() else "a folder, no file"
        return None if family.takes_frames else f"is {kind}; {family.title} takes pictures: give a picture's file"
    return "is no file"


def _load(
    options: argparse.Namespace,
    config: "TrainConfig",
    adapters: dict[str, str],
    place: "Place",
    sampling: dict[str, Any],
) -> "Chat":
    """Return the conversation, without a picture."""
    from dataclasses import replace
    from functools import partial

    from sat_lora.adapters.loftq_base import refuse_other_bases
    from sat_lora.adapters.read import trained_whole
    from sat_lora.chat.session import Chat
    from sat_lora.cogvlm import load_cogvlm
    from sat_lora.cogvlm.decoding.sampling import Sampling
    from sat_lora.parallel.distributed import init_distributed, init_model_parallel
    from sat_lora.terminal.progress import shown
    from sat_lora.training.settings.config import NONE
    from sat_lora.training.settings.deepspeed_config import base_dtype

    chosen = Sampling(**sampling)
    trust = config.start.trust_checkpoint
    scheme = None if config.quantization.quantize == NONE else config.quantization.quantize
    refuse_other_bases(adapters, config.model.base, scheme, trust=trust)
    size = config.parallel.model_parallel_size
    device = init_model_parallel(init_distributed(), size).device
    config = config.replaced(bf16=config.precision.bf16 or (device.type == "cuda" and not config.precision.fp16))
    quantization = config.quantization.of(config.lora)
    if quantization is not None:
        brought = [name for folder in adapters.values() for name in trained_whole(folder)]
        quantization = replace(quantization, trained=(*quantization.trained, *brought))
    loaded = load_cogvlm(
        config.model.base,
        dtype=base_dtype(config.precision),
        device=device,
        model_parallel_size=size,
        trust=trust,
        quantize=quantization,
        progress=partial(shown, what="loading the base", unit="modules") if place.rank == 0 else iter,
    )
    max_length = options.max_length
    if max_length is None and options.run:  # what fitted into a sample of the run fits into a question
        max_length = max(config.model.max_length, int(loaded[1].get("max_sequence_length") or 0))
    return Chat(
        loaded,
        adapters=adapters,
        tokenizer=config.model.tokenizer,
        version=config.model.version,
        sampling=chosen,
        max_new_tokens=options.max_new_tokens,
        max_length=max_length,
        stop=vars(options).get("stop") or (),
        any_base=options.any_base,
        special_tokens=config.data.special_tokens_in_text,
        max_pixels=config.data.max_pixels,
    )


def _while_somebody_reads(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines until stdout's reader has gone, as `head` does when it has heard enough."""
    for line in lines:
        if getattr(sys.stdout, "error", None) is not None:
            return
        yield line


def _of_first_rank(lines: Iterable[str], is_main: bool) -> Iterator[str]:
    """Yield on every rank the lines of the first, one at a time."""
    import torch

    iterator = iter(lines)
    while True:
        line = [next(iterator, None) if is_main else None]
        torch.distributed.broadcast_object_list(line, src=0)
        if line[0] is None:
            return
        yield line[0]
