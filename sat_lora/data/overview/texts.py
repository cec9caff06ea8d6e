"""An Overview as lines of text, and as a page of HTML that needs no other file."""

from collections.abc import Sequence

from sat_lora.data.overview.examine import SHOWN, Overview, pieces_of, place_of
from sat_lora.data.overview.html_page import LONGEST, Row, escaped, html_page, picture_tag, shortened
from sat_lora.data.samples import ImageTextDataset, Item
from sat_lora.errors import SatLoraError
from sat_lora.printable import printable

MARKS = ("«", "»")
"""What stands around texts that are trained on."""
GENERATOR = "sat-lora data"


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
    rows += [("", printable(shortened(reason, 300))) for reason in [*overview.broken.values()][:SHOWN]]
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
        blocks.append(f"{place_of(item)}\n  " + "".join(printable(shortened(text, LONGEST)) for text in texts))
    return "\n".join(blocks)


def page(title: str, rows: Sequence[Row], items: Sequence[Item], dataset: ImageTextDataset) -> str:
    """Return a page of HTML: the rows, and the items with their pictures; it holds all that it shows."""
    body = f"<p>Marked is what is trained on.</p>{''.join(_section(item, dataset) for item in items)}"
    return html_page(title, GENERATOR, rows, body)


def _section(item: Item, dataset: ImageTextDataset) -> str:
    tags = {"learnt": "mark", "image": "i", "given": "span", "broken": "b"}
    pieces = _pieces(item, dataset)
    text = "".join(f"<{tags[kind]}>{escaped(shortened(text, LONGEST))}</{tags[kind]}>" for kind, text in pieces)
    texts = "".join(text for _, text in pieces)
    pictures = "".join(
        picture_tag(image, texts, dataset.max_pixels, takes_frames=dataset.takes_frames) for image in item.images
    )
    return f"<section><div>{pictures}</div><div><h2>{escaped(place_of(item))}</h2><pre>{text}</pre></div></section>"


def _pieces(item: Item, dataset: ImageTextDataset) -> list[tuple[str, str]]:
    try:
        sample = dataset.lay_out(item)
    except SatLoraError as error:
        return [("broken", str(error))]
    decode = dataset.tokenizer.decode
    return pieces_of(sample, lambda tokens: decode(tokens, clean_up_tokenization_spaces=False))
