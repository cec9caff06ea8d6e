"""docs/options.md: every option of every command, from the parsers that read them.

python docs/tools/options_page.py            # writes the page anew; tests/docs says when it is stale
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "options.md"
DEMO = Path("/demo")  # stands for finetune_demo/, so that the page is the same on every machine

SCRIPTS = {"train": "finetune_cogvlm.py", "evaluate": "evaluate_cogvlm.py", "pack": "pack_shards.py"}

HEAD = """\
# Options

`python docs/tools/options_page.py` writes this page from the parsers themselves. Each option may be written with `-` or
`_` between its words; none is read as the abbreviation of another. [Training](training.md#options-of-finetune_cogvlmpy)
tells how options, a `--deepspeed_config` file and defaults go together.
"""


def page() -> str:
    """The page as Markdown."""
    from sat_lora.cli import build_parser as sat_lora_parser
    from sat_lora.commands.evaluate import build_parser as evaluation_parser
    from sat_lora.commands.pack import build_parser as packing_parser
    from sat_lora.training.settings.options import build_parser as finetune_parser

    lines = [HEAD, "## finetune_cogvlm.py", ""]
    lines += ["The third column is what the demo takes instead of the default, where that differs.", ""]
    lines += _finetune_tables(finetune_parser())
    lines += [
        *_sections(),
        "## evaluate_cogvlm.py",
        "",
        *_table(evaluation_parser()._actions),
        "",
    ]
    lines += ["## pack_shards.py", "", *_table(packing_parser()._actions), ""]
    for name, parser in _commands(sat_lora_parser()):
        lines += [f"## sat-lora {name}", "", f"{_sentence(parser.description or parser.format_usage)}", ""]
        if name in SCRIPTS:
            heading = SCRIPTS[name].replace(".", "")
            lines += [f"It is [{SCRIPTS[name]}](#{heading}), and takes its options.", ""]
            continue
        lines += [*_table(parser._actions), ""]
        if parser.epilog:
            lines += ["```", parser.epilog.strip(), "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _finetune_tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The lines of a table for each group of options."""
    demo = _script("demo").demo_in(DEMO).values(None)
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            yield from (f"### {group.title[:1].upper()}{group.title[1:]}", "")
            if group.description:
                yield from (_sentence(group.description), "")
            yield from ("| option | | demo |", "|---|---|---|")
            for action in actions:
                yield f"| {_names(action)} | {_text(action.help)} | {_demo_value(action, demo)} |"
            yield ""


def _sections() -> Iterator[str]:
    """The lines that tell what a --config file may hold."""
    from sat_lora.training.settings.config import KNOWN, SECTIONS
    from sat_lora.training.settings.config_file import UNPRINTED

    yield from ("### In a file", "")
    yield from (
        "Under these names, by section or flat, settings stand in a `--config` file; `--print-config` writes one.",
        "",
    )
    yield from ("| section | settings |", "|---|---|")
    for section in (section for section in SECTIONS if section not in UNPRINTED):
        names = ", ".join(f"`{name}`" for name, known in KNOWN.items() if known.section == section)
        yield f"| `{section}` | {names} |"
    yield ""


def _table(actions: list[argparse.Action]) -> Iterator[str]:
    """The lines of a table of options and arguments, without those that a parser hides."""
    shown = [action for action in actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    yield from ("| option | |", "|---|---|")
    for action in shown:
        required = " (required)" if action.required and action.option_strings else ""
        yield f"| {_names(action)} | {_text(action.help)}{required} |"


def _commands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    """The sub-commands with their parsers; one that has only a help text gets it as its description."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in action._choices_actions}
    for name, command in action.choices.items():
        command.description = command.description or helps[name]
    return list(action.choices.items())


def _names(action: argparse.Action) -> str:
    """The option's spellings, and the values that it takes."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if not action.option_strings or action.nargs == 0:
        return names
    values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else action.metavar
    more = " ..." if action.nargs in ("+", "*") else ""
    return f"{names} `{values or action.dest.upper()}{more}`".replace("|", "\\|")


def _demo_value(action: argparse.Action, demo: dict) -> str:
    if action.dest not in demo:
        return ""
    value = demo[action.dest]
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    shown = f"{shown:.3g}" if isinstance(shown, float) else str(shown).replace(f"{DEMO}/", "")
    return f"`{shown}`"


def _text(text: str | None) -> str:
    """A help text in a cell of a table."""
    text = re.sub(r"\s+", " ", (text or "").replace("%%", "%")).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![\w-])(--\w[\w-]*)", r"`\1`", text)


def _sentence(text: str) -> str:
    text = _text(text).strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _script(name: str):
    """A script of finetune_demo/, as a module."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "finetune_demo" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
