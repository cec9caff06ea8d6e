"""An Overview as lines of text, and as a page of HTML that needs no other file."""

import base64
import html
import io
from collections.abc import Sequence

from sat_lora.cogvlm.inputs.boxes import draw_boxes
from sat_lora.cogvlm.inputs.pictures import read_picture
from sat_lora.data.overview.examine import SHOWN, Overview, picture_bytes, pieces_of, place_of
from sat_lora.data.samples import ImageTextDataset, Item
from sat_lora.errors import DataError, SatLoraError
from sat_lora.printable import printable

SIDE = 320  # pixels of a picture in a page
LONGEST = 2000  # characters of a piece that is shown
MARKS = ("«", "»")
"""What stands around texts that are trained on."""
GENERATOR = '<meta name="generator" content="sat-lora data">'

Row = tuple[str, str]


def rows_of(overview: Overview, dataset: ImageTextDataset) -> list[Row]:
    """Return (label, text) of all that an overview says, without the samples."""
    layouts = ", ".join(f"{count:,} {printable(layout)}" for layout, count in overview.layouts.items())
    size = f"{dataset.image_size[1]} x {dataset.image_size[0]}"
    rows = [("layout", layouts or "none"), ("samples", f"{overview.samples:,}")]
    counts = [
        (overview.text_only, "of text alone"),
        (overview.several_turns, "of several turns"),
        (overview.several_images, "of several images"),
    ]
    rows += [("", f"{count:,} {what}") for count, what in counts if count]
    part = f" of {overview.laid_out:,} samples" if overview.laid_out < overview.samples else ""
    rows += [
        ("tokens", f"{overview.lengths}{part} (--max_length {dataset.max_length})"),
        ("learnt", f"{overview.answers} of a sample"),
    ]
    longest = max(overview.lengths.numbers, default=0)
    cut = f"{overview.cut:,} of {overview.laid_out:,} answers; --max_length {longest} would hold them"
    rows.append(("cut", cut if overview.cut else "no answer"))
    looked_at = f"{overview.looked_at:,} of {overview.pictures:,} looked at"
    if overview.pictures:
        rows.append(("pictures", f"{looked_at}: width {overview.widths}; height {overview.heights}"))
    if overview.smaller:
        rows.append(("", f"{overview.smaller:,} are smaller than the {size} pixels that the base takes"))
    rows.append(("broken", f"{len(overview.broken):,}" if overview.broken else "none"))
    rows += [("", printable(_cut(reason, 300))) for reason in [*overview.broken.values()][:SHOWN]]
    rows += [("", f"and {len(overview.broken) - SHOWN:,} more")] * (len(overview.broken) > SHOWN)
    repeats = [
        (overview.repeated, "samples came before, word for word"),
        (overview.contradicted, "samples have the picture and the question of another, and another answer"),
        (overview.same_pictures, "pictures have the pixels of another file"),
    ]
    said = [f"{count:,} {what}" for count, what in repeats if count]
    rows += [("twice" * (not number), text) for number, text in enumerate(said or ["nothing"])]
    unused = [f"{count:,} {printable(reason)}" for reason, count in overview.unused]
    return rows + [("unused" * (not number), text) for number, text in enumerate(unused or ["nothing"])]


def lines_of(rows: Sequence[Row]) -> str:
    """Return the rows as lines."""
    return "\n".join(f"{label:<10}{text}" for label, text in rows)


def sample_lines(items: Sequence[Item], dataset: ImageTextDataset) -> str:
    """Return the items as a run lays them out, with MARKS around what is trained on."""
    blocks = []
    for item in items:
        pieces = _pieces(item, dataset)
        texts = [f"{MARKS[0]}{text}{MARKS[1]}" if kind == "learnt" else text for kind, text in pieces]
        blocks.append(f"{place_of(item)}\n  " + "".join(printable(_cut(text, LONGEST)) for text in texts))
    return "\n".join(blocks)


def page(title: str, rows: Sequence[Row], items: Sequence[Item], dataset: ImageTextDataset) -> str:
    """Return a page of HTML: the rows, and the items with their pictures; it holds all that it shows."""
    table = "".join(f"<tr><th>{_escaped(label)}</th><td>{_escaped(text)}</td></tr>" for label, text in rows)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_escaped(title)}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}}
th{{text-align:left;vertical-align:top;padding-right:1.5rem;font-weight:600}}td{{overflow-wrap:anywhere}}
section{{display:flex;gap:1.2rem;border-top:1px solid #ccc;padding:1rem 0;flex-wrap:wrap}}
img{{max-width:{SIDE}px;max-height:{SIDE}px;border:1px solid #ddd}}h2{{font-size:.9rem;color:#555;margin:0}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.6 ui-monospace,monospace;margin:.4rem 0;flex:1}}
mark{{background:#ffe08a}}i{{color:#06c}}.broken{{color:#b00}}
</style></head><body><h1>{_escaped(title)}</h1><table>{table}</table>
<p>Marked is what is trained on.</p>{"".join(_section(item, dataset) for item in items)}</body></html>
"""


def _section(item: Item, dataset: ImageTextDataset) -> str:
    tags = {"learnt": "mark", "image": "i", "given": "span", "broken": "b"}
    pieces = _pieces(item, dataset)
    text = "".join(f"<{tags[kind]}>{_escaped(_cut(text, LONGEST))}</{tags[kind]}>" for kind, text in pieces)
    texts = "".join(text for _, text in pieces)
    pictures = "".join(_picture(image, texts, dataset.max_pixels) for image in item.images)
    return f"<section><div>{pictures}</div><div><h2>{_escaped(place_of(item))}</h2><pre>{text}</pre></div></section>"


def _picture(image: object, texts: str, max_pixels: int) -> str:
    try:
        picture = read_picture(picture_bytes(image, max_pixels), max_pixels=max_pixels, name="the picture")
    except (DataError, OSError, ValueError) as error:
        return f'<p class="broken">{_escaped(str(error))}</p>'
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    draw_boxes(picture, texts).save(content, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'


def _pieces(item: Item, dataset: ImageTextDataset) -> list[tuple[str, str]]:
    try:
        sample = dataset.lay_out(item)
    except SatLoraError as error:
        return [("broken", str(error))]
    decode = dataset.tokenizer.decode
    return pieces_of(sample, lambda tokens: decode(tokens, clean_up_tokenization_spaces=False))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} characters more)"


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())
