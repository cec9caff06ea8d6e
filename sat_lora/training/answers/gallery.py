"""A page of pictures with the right answers and those that were given, the worst first."""

import os
from pathlib import Path

from sat_lora.data.overview.html_page import Row, escaped, html_page, is_page_of, picture_tag, shortened
from sat_lora.errors import ConfigError
from sat_lora.files.atomic import replace_lines
from sat_lora.files.foreign import open_file
from sat_lora.printable import printable
from sat_lora.training.answers.prediction import Evaluated
from sat_lora.training.metrics.generated import GENERATED, is_code

GENERATOR = "sat-lora evaluate"
MOST = 200
"""Samples in a page."""
ROOM = 32 << 20
"""Characters of a page's samples; a picture takes some 20,000."""
SHOWN = 600  # characters of a text
PAGE_LIMIT = 1 << 30  # bytes of a file that is looked into


def gallery_file(evaluation: Path, name: str) -> Path:
    """Return the file of --gallery; without a name that beside the evaluation's, evaluation.html."""
    return Path(name) if name else evaluation.with_name(f"{evaluation.name.removesuffix('.json')}.html")


def refuse_other_page(file: Path) -> None:
    """Raise ConfigError where something else than such a page lies at `file`, or no file can be made there."""
    shown = f"--gallery: {printable(file)}"
    if not file.parent.is_dir():
        raise ConfigError(f"{shown}: its folder does not exist; make it, or give another file")
    if file.is_dir():
        raise ConfigError(f"{shown} is a folder; give a file, such as {printable(file / 'gallery.html')}")
    if not os.path.lexists(file):
        return
    try:
        with open_file(file, PAGE_LIMIT) as content:
            beginning = content.read(400)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown}: cannot be looked at: {printable(error)}; give another file") from error
    if beginning and not is_page_of(GENERATOR, beginning):
        raise ConfigError(f"{shown} exists and is no page of {GENERATOR}; give another file")


def write_gallery(file: Path, measured: Evaluated, max_pixels: int) -> None:
    """Write the page of an evaluation. Raises ConfigError where it cannot be written."""
    try:
        replace_lines(file, [gallery(measured, max_pixels)])
    except OSError as error:
        raise ConfigError(f"--gallery: {printable(file)}: cannot be written: {error.strerror}") from error


def gallery(measured: Evaluated, max_pixels: int) -> str:
    """Return the page: MOST samples at most, by what the last of those who answer has in the first metric."""
    predictions = measured.predictions
    *_, judged = measured.scores
    metric = next(iter(measured.scores[judged]))
    lower_is_better = not is_code(metric) and GENERATED[metric].lower_is_better
    scores = measured.scores[judged][metric].samples
    order = sorted(range(len(predictions)), key=lambda n: (-scores[n] if lower_is_better else scores[n], n))
    sections: list[str] = []
    room = ROOM
    for number in order[:MOST]:
        section = _section(measured, number, max_pixels)
        room -= len(section)
        if room < 0:
            break
        sections.append(section)
    rows: list[Row] = [("samples", f"{len(predictions):,}, {len(sections):,} of them here, the worst first")]
    rows.append(("order", f"{metric} of {judged}"))
    for side, by_name in measured.scores.items():
        values = ", ".join(f"{name} {own.value:.4f}" for name, own in by_name.items())
        rows.append((side, values))
    return html_page("Answers, the worst first", GENERATOR, rows, "".join(sections))


def _section(measured: Evaluated, number: int, max_pixels: int) -> str:
    """Return the HTML of one sample: its picture with the boxes of all texts, the question and the answers."""
    prediction = measured.predictions[number]
    rows = [("asked", prediction.prompt, "", ""), *(("right", text, "", "") for text in prediction.references[:10])]
    for side, by_name in measured.scores.items():
        own = {name: scores.samples[number] for name, scores in by_name.items()}
        is_right = prediction.answers[side] in prediction.references
        values = ", ".join(f"{name} {score:.3g}" for name, score in own.items())
        rows.append((side, prediction.answers[side], values, "right" if is_right else "wrong"))
    cells = "".join(
        f'<tr><th>{escaped(label)}</th><td class="said {kind}" dir="auto">{escaped(shortened(text, SHOWN))}</td>'
        f"<td>{escaped(values)}</td></tr>"
        for label, text, values, kind in rows
    )
    texts = "".join([*prediction.references[:10], *prediction.answers.values()])
    images = measured.samples[prediction.index].images
    pictures = "".join(
        picture_tag(image, texts, max_pixels, takes_frames=measured.takes_frames) for image in images[:4]
    )
    name = escaped(shortened(prediction.sample, SHOWN))
    return f"<section><div>{pictures}</div><div><h2>{name}</h2><table>{cells}</table></div></section>"
