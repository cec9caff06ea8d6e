"""Write conversations about captchas as LLaVA does: OUT/{train,valid,test}.json, and their pictures in OUT/images.

Three turns each: what is on the captcha, the same backwards, and one of its digits. The pictures are those of
make_captchas.py, so no string of one set appears in another.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

DEFAULT_OUT = Path(__file__).resolve().parent / "conversations"
READ = "CAPTCHA:"
BACKWARDS = "Backwards?"
DIGITS: dict[str, Callable[[str], str]] = {"First digit?": lambda text: text[0], "Last digit?": lambda text: text[-1]}
"""What the last turn may ask, and the answer for the captcha's string."""


def conversation(image: str, seed: int) -> dict:
    """Return the record of the captcha at `image`, a path below OUT; its last question comes from seed and path."""
    text = Path(image).stem
    question = random.Random(f"{seed} {image}").choice([*DIGITS])
    turns = [("human", f"<image>\n{READ}"), ("gpt", text), ("human", BACKWARDS), ("gpt", text[::-1])]
    turns += [("human", question), ("gpt", DIGITS[question](text))]
    return {"id": image, "image": image, "conversations": [{"from": who, "value": value} for who, value in turns]}


def make_conversations(out: str | Path = DEFAULT_OUT, *, seed: int = 0, **captchas) -> Path:
    """Write the conversations, unless `out` has all of them, and return `out`. captchas: see `make_captchas`."""
    from make_captchas import IMAGES, make_captchas

    from sat_lora.files.atomic import replace_text

    out = Path(out)
    files = {name: out / f"{name}.json" for name in IMAGES}
    if all(file.exists() for file in files.values()):
        print(f"conversations: already at {out}")
        return out
    images = make_captchas(out / "images", seed=seed, **captchas)
    for name, file in files.items():
        paths = sorted(path.relative_to(out).as_posix() for path in (images / name).glob("*/*.png"))
        records = [conversation(path, seed) for path in paths]
        replace_text(file, json.dumps(records, indent=1) + "\n")
    print(f"conversations: {', '.join(map(str, files.values()))}")
    return out


def main(argv: list[str] | None = None) -> int:
    """Write the conversations, and return the exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    from sat_lora.terminal.edge import run_command

    return run_command("make_conversations.py", lambda: _make(argv))


def _make(argv: list[str] | None) -> None:
    """Write the conversations that the options ask for."""
    from make_captchas import options_of

    description = "Write conversations about captchas, as LLaVA does."
    out = "folder to write; what it has already stays"
    make_conversations(**options_of(argv, "make_conversations.py", DEFAULT_OUT, description=description, out=out))


if __name__ == "__main__":
    from sat_lora.terminal.edge import run_script

    run_script("make_conversations.py", main)
