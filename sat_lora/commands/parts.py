"""The parts that several commands share: examples in their help, a progress bar, and refusals before anything slow."""

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import sat_lora
from sat_lora.errors import ConfigError
from sat_lora.files.foreign import name_problem
from sat_lora.files.paths import ADAPTER_WANTED, missing_adapter, missing_base
from sat_lora.printable import printable
from sat_lora.terminal.progress import shown

DEMO = Path(sat_lora.__file__).resolve().parents[1] / "finetune_demo" / "demo.py"
"""The demo's module in a clone of sat_lora; installed without a clone there is none."""
ANY_BASE = "take a base that the adapter was not trained on"


def examples(*lines: str) -> dict:
    """Return arguments of `add_parser` that put these lines, as they are, at the end of its help."""
    return dict(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n  ".join([f"example{'s' if len(lines) > 1 else ''}:", *lines]),
    )


def bar(what: str, unit: str) -> Callable[[Collection], Iterable]:
    """Return a function that goes through a collection and shows on stderr how far it is, see `shown`."""
    return lambda items: shown(items, what, unit)


def refuse_existing(out: str) -> None:
    """Raise ConfigError, before anything slow is imported, where something lies at `--out`, since commands write new
    folders, or where what they write could not be read.
    """
    if os.path.lexists(out):
        raise ConfigError(f"--out: {printable(out)} exists; give a new folder")
    if problem := name_problem(out):
        raise ConfigError(f"--out: {printable(out)}: {problem}; give another folder")


def refuse_missing(
    *adapters: str, base: str | None = None, option: str = "--adapter", wanted: str = ADAPTER_WANTED
) -> None:
    """Raise ConfigError, before anything slow is imported, with all folders of adapters and of a base that are not
    there.

    option: the one that names the adapters; empty where none does. wanted: what to give instead of an adapter.
    """
    named = [(option, missing_adapter(adapter, wanted)) for adapter in adapters]
    if base is not None:
        with contextlib.suppress(OSError):  # it may not be looked for, and whoever reads it says so
            named.append(("--base", missing_base(base)))
    problems = [f"{name}: {problem}" if name else problem for name, problem in named if problem]
    if problems:
        raise ConfigError("; ".join(problems))


def demo_of_clone() -> Any:
    """Return the Demo that lies beside the package in a clone of sat_lora; None where it is installed without one."""
    specification = importlib.util.spec_from_file_location("sat_lora_demo", DEMO) if DEMO.is_file() else None
    if specification is None or specification.loader is None:
        return None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.DEMO


def size_text(size: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
