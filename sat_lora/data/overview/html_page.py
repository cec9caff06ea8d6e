"""A page of HTML that needs no other file and runs nothing, whatever texts and pictures of others it shows."""

import base64
import html
import io
from collections.abc import Sequence

from sat_lora.cogvlm.inputs.boxes import draw_boxes
from sat_lora.data.overview.examine import shown_picture
from sat_lora.errors import DataError
from sat_lora.printable import printable_lines

SIDE = 320  # pixels of a picture in a page
LONGEST = 2000  # characters of a piece that is shown

Row = tuple[str, str]


def html_page(title: str, generator: str, rows: Sequence[Row], body: str) -> str:
    """Return a page with a title, a table of (label, text), and a body of HTML. generator: the command that it is of,
    by which `is_page_of` knows it.
    """
    table = "".join(f"<tr><th>{escaped(label)}</th><td>{escaped(text)}</td></tr>" for label, text in rows)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{escaped(generator)}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escaped(title)}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}}
th{{text-align:left;vertical-align:top;padding-right:1.5rem;font-weight:600}}td{{overflow-wrap:anywhere}}
section{{display:flex;gap:1.2rem;border-top:1px solid #ccc;padding:1rem 0;flex-wrap:wrap}}
section>div:last-child{{flex:1;min-width:20rem}}td+td{{padding-right:1.5rem}}td,th{{vertical-align:top}}
img{{max-width:{SIDE}px;max-height:{SIDE}px;border:1px solid #ddd}}h2{{font-size:.9rem;color:#555;margin:0}}
pre,td.said{{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.6 ui-monospace,monospace}}pre{{margin:.4rem 0}}
mark{{background:#ffe08a}}i{{color:#06c}}.broken{{color:#b00}}.right{{background:#e2f5e2}}.wrong{{background:#fbe3e3}}
</style></head><body><h1>{escaped(title)}</h1><table>{table}</table>
{body}</body></html>
"""


def is_page_of(generator: str, beginning: bytes) -> bool:
    """Return whether a file that begins so is a page that `html_page` made for that command."""
    return f'content="{generator}"'.encode() in beginning


def picture_tag(image: object, texts: str, max_pixels: int, *, takes_frames: bool) -> str:
    """Return the tag of an image, with the boxes of the texts drawn on it; a sentence where it cannot be read.

    takes_frames: whether the base takes films, of which one frame is shown.
    """
    try:
        picture = shown_picture(image, max_pixels, "the picture", takes_frames=takes_frames)
    except (DataError, OSError, ValueError) as error:
        return f'<p class="broken">{escaped(str(error))}</p>'
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    draw_boxes(picture, texts).save(content, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'


def shortened(text: str, most: int = LONGEST) -> str:
    """Return a text of at most so many characters, and how many more there were."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} characters more)"


def escaped(text: str) -> str:
    """Return a text for HTML, in which nothing is a tag, and nothing turns what stands beside it around: control and
    format characters are shown by their escapes.
    """
    return html.escape(printable_lines(text))
