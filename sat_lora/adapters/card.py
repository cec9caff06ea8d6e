"""The model card, README.md of an adapter folder: what the adapter is of and how it is loaded, for whoever gets it.

It names no path and no date: the same adapter has the same card, wherever and whenever it was written. Its last line
tells whether anybody has edited it, and a card that was edited, or that somebody else wrote, is never replaced.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import read_bytes
from sat_lora.printable import printable

if TYPE_CHECKING:
    from sat_lora.adapters.format import SavedAdapter

CARD = "README.md"
CARD_LIMIT = 1 << 20  # bytes
MOST_SHOWN = 300  # characters of a value
_MARK = re.compile(r"\n<!-- sat_lora wrote this, and writes it anew while it is unchanged: ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Section:
    """A part of the card: a table of names and values, which may be of others."""

    title: str
    rows: tuple[tuple[str, object], ...]


def card_of(saved: "SavedAdapter", sections: Sequence[Section] = ()) -> str:
    """Return the card of an adapter. sections: what its training can tell beside what is saved."""
    base = saved.base
    name = base.name if base is not None and base.name else "a base without a name"
    is_cogvlm = base is not None and base.family is not None and base.family.startswith("CogVLM")
    tags = ["lora", "sat_lora", *(["cogvlm"] if is_cogvlm else [])]
    head = ["---", *(["pipeline_tag: image-text-to-text"] if is_cogvlm else []), f"tags: {json.dumps(tags)}", "---"]
    parts = [
        "\n".join(head),
        f"# A LoRA adapter of {_code(name)}",
        "Made with sat_lora. It holds the low-rank pairs alone, nothing of the base; its format is that of "
        "`adapter_config.json`.",
        _text_of(_about_base(saved)),
        _text_of(_about_adapter(saved)),
        *map(_text_of, sections),
        COGVLM if is_cogvlm else OTHERS,
    ]
    return _marked("\n\n".join(parts) + "\n")


def write_card(folder: Path, saved: "SavedAdapter", sections: Sequence[Section], old: Path) -> None:
    """Write the card into a folder that is being written; where `old`, which it will replace, has a card of somebody
    else, copy that. Raises OSError where it cannot be written.
    """
    if is_ours(old / CARD):
        (folder / CARD).write_text(card_of(saved, sections), encoding="utf-8")
    else:
        shutil.copy2(old / CARD, folder / CARD)


def add_section(folder: Path, section: Section) -> None:
    """Put a section into the card of a folder, in place of one of the same title. A card that was edited stays.

    Raises OSError where it cannot be written.
    """
    file = folder / CARD
    if not file.is_file() or not is_ours(file):
        return
    text = _MARK.sub("", file.read_text(encoding="utf-8"))
    head, title, tail = text.partition(f"\n## {LOADING}\n")
    parts = [part for part in head.split("\n## ") if part.partition("\n")[0] != section.title]
    added = "\n## ".join(parts).rstrip("\n") + "\n\n" + _text_of(section) + "\n"
    replace_text(file, _marked(added + title + tail if title else added))


def is_ours(file: Path) -> bool:
    """Return whether nobody misses a card that is replaced: there is none, or it stands as it was written here."""
    if not file.is_file():
        return True
    try:
        text = read_bytes(file, CARD_LIMIT).decode("utf-8")
    except (OSError, ValueError):
        return False
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


def _marked(text: str) -> str:
    return f"{text}\n<!-- sat_lora wrote this, and writes it anew while it is unchanged: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _about_base(saved: "SavedAdapter") -> Section:
    base = saved.base
    rows: list[tuple[str, object]] = []
    if base is not None:
        rows = [("Name of its folder", base.name), ("Family", base.family), ("Parameters", base.parameters)]
        rows.append(("Digest of its values", base.digest))
    rows.append(("Fingerprint of its names and shapes", saved.base_fingerprint))
    if saved.base_quantization is not None:
        rows.append(("Quantised while it trained", json.dumps(saved.base_quantization, sort_keys=True)))
    return Section("Base", tuple((name, value) for name, value in rows if value is not None))


def _about_adapter(saved: "SavedAdapter") -> Section:
    config = saved.config
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in saved.tensors.values()})
    ranks = sorted({entry.r for entry in saved.layers.values()})
    rows: list[tuple[str, object]] = [
        ("Layers", len(saved.layers)),
        ("Rank", ", ".join(map(str, ranks))),
        ("Alpha", config.lora_alpha),
        ("Parameters", sum(tensor.numel() for tensor in saved.tensors.values())),
        ("Precision", ", ".join(dtypes)),
        ("Targets", config.target_modules),
        ("Dropout", config.lora_dropout),
    ]
    rows += [(name, "yes") for name, value in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if value]
    if saved.trained:
        rows.append(("Parameters of the base trained whole", saved.trained))
    return Section("Adapter", tuple(rows))


def _text_of(section: Section) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in section.rows]
    return "\n".join([f"## {section.title}", "", "| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    """Return a value as a cell of a table shows it: a number as it is, whatever else as code."""
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_code(part) for part in value[:20]) + (", ..." if len(value) > 20 else "") or "none"
    return _code(value)


def _code(value: object) -> str:
    """Return a text of whomever as code, which means nothing to a viewer of the card."""
    text = printable(value).replace("`", "'").replace("|", "/")
    shown = text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + " ..."
    return f"`{shown}`" if shown.strip() else "none"


LOADING = "How to load it"
IN_PEFT = """In PEFT, on the base as transformers loads it:

```sh
sat-lora export --to peft --adapter ADAPTER --out PEFT
```

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "PEFT")
```"""
COGVLM = f"""## {LOADING}

Here, where BASE is the folder of the base, SAT's or Hugging Face's, and ADAPTER this folder:

```sh
sat-lora chat --base BASE --adapter ADAPTER
sat-lora merge --base BASE --adapter ADAPTER --out MERGED
```

```python
from sat_lora import load_adapter
from sat_lora.cogvlm import load_cogvlm

model, config = load_cogvlm("BASE")
load_adapter(model, "ADAPTER")
```

{IN_PEFT}"""
OTHERS = f"""## {LOADING}

Here, where `model` is the base as SAT loads it and ADAPTER this folder:

```python
from sat_lora import load_adapter

load_adapter(model, "ADAPTER")
```

{IN_PEFT}"""
