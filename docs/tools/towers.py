"""docs/pictures/towers.svg: the towers of CogVLM, and where the deltas enter.

    python docs/tools/towers.py                  # draws it anew, the same bytes each time

A disc is an adapted layer; what is written under a group of them is the preset that selects it.
"""

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "pictures" / "towers.svg"

WIDTH, HEIGHT = 960, 520
FROZEN, EDGE, DELTA, TEXT, PALE = "#dfe6ee", "#5b6b7c", "#e4572e", "#1d2733", "#5b6b7c"
STYLE = "\n".join(
    [
        f"text{{font-family:Helvetica,Arial,sans-serif;font-size:13px;fill:{TEXT}}}",
        ".t{font-weight:bold}",
        f".p{{font-family:monospace;font-size:12px;fill:{DELTA}}}",
        f".s{{font-size:11px;fill:{PALE}}}",
    ]
)


def picture() -> str:
    """The picture as SVG."""
    parts = [
        *_vision(x=20, y=60),
        *_projector(x=240, y=150),
        *_language(x=370, y=60),
        *_delta(x=690, y=60),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    title = "<title>The towers of CogVLM and the layers to which sat_lora adds a delta</title>"
    marker = (
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{EDGE}"/></marker></defs>'
    )
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, title, f"<style>{STYLE}</style>", marker, background, *parts, "</svg>"]) + "\n"


def _vision(x: int, y: int) -> list[str]:
    """The vision transformer: its input below, its layers, the presets of their linears."""
    return [
        _text(x, y - 20, "vision transformer", "t"),
        _text(x, y - 4, "63 layers of CogVLM-17B", "s"),
        _box(x, y, 180, 300),
        *_block(x + 15, y + 15, 150, "attention", ["query_key_value", "dense"], "vit-attention"),
        *_block(x + 15, y + 145, 150, "MLP", ["dense_h_to_4h", "dense_4h_to_h"], "vit-mlp"),
        *_arrow(x + 90, y + 330, x + 90, y + 302),
        _box(x + 15, y + 330, 150, 44),
        *_layer(x + 27, y + 348, "patches"),
        _text(x + 27, y + 366, "patch-embedding", "p"),
        *_arrow(x + 90, y + 405, x + 90, y + 376),
        _text(x + 20, y + 420, "image, 490 x 490 pixels"),
    ]


def _projector(x: int, y: int) -> list[str]:
    """What leads from the vision transformer to the language model."""
    return [
        *_arrow(x - 40, y + 40, x - 2, y + 40),
        _box(x, y, 90, 80),
        _text(x + 10, y + 20, "projector", "t"),
        *_layer(x + 12, y + 44, "linears"),
        _text(x + 10, y + 68, "projector", "p"),
        *_arrow(x + 92, y + 40, x + 128, y + 40),
    ]


def _language(x: int, y: int) -> list[str]:
    """The language model with its two experts, the head above the answer, the text below."""
    left, right = x + 15, x + 150
    return [
        _text(x, y - 20, "language model", "t"),
        _text(x, y - 4, "32 layers; one attention over all tokens", "s"),
        _box(x, y, 285, 300),
        *_block(left, y + 15, 122, "image tokens", ["q k v", "dense"], "vision-expert-", "attention"),
        *_block(right, y + 15, 122, "text tokens", ["q k v", "dense"], "language-", "attention"),
        *_block(left, y + 155, 122, "image tokens", ["gate", "up", "down"], "vision-expert-", "mlp"),
        *_block(right, y + 155, 122, "text tokens", ["gate", "up", "down"], "language-mlp"),
        *_arrow(x + 210, y + 405, x + 210, y + 302),
        _text(x + 175, y + 420, "prompt, answer"),
        *_arrow(x + 60, y + 302, x + 60, y + 330),
        _box(x + 15, y + 330, 122, 44),
        *_layer(x + 27, y + 348, "head"),
        _text(x + 27, y + 366, "lm-head", "p"),
        *_arrow(x + 75, y + 376, x + 75, y + 405),
        _text(x + 35, y + 420, "next token"),
    ]


def _delta(x: int, y: int) -> list[str]:
    """One adapted layer in large: the frozen product and the delta beside it."""
    return [
        _text(x, y - 20, "an adapted layer", "t"),
        _text(x, y - 4, "the base's weight stays as it is", "s"),
        _box(x, y, 250, 215, "white"),
        _text(x + 118, y + 203, "x"),
        *_arrow(x + 112, y + 190, x + 60, y + 158),
        *_arrow(x + 132, y + 190, x + 185, y + 172),
        _box(x + 20, y + 75, 80, 80),
        _text(x + 53, y + 112, "W", "t"),
        _text(x + 39, y + 130, "frozen", "s"),
        f'<path d="M{x + 150} {y + 170}L{x + 222} {y + 170}L{x + 200} {y + 128}L{x + 172} {y + 128}z" fill="{DELTA}"/>',
        f'<path d="M{x + 172} {y + 118}L{x + 200} {y + 118}L{x + 222} {y + 76}L{x + 150} {y + 76}z" fill="{DELTA}"/>',
        _text(x + 181, y + 157, "A"),
        _text(x + 181, y + 103, "B"),
        _text(x + 206, y + 126, "r", "s"),
        *_arrow(x + 60, y + 73, x + 112, y + 42),
        *_arrow(x + 186, y + 73, x + 134, y + 42),
        f'<circle cx="{x + 123}" cy="{y + 35}" r="11" fill="white" stroke="{EDGE}"/>',
        _text(x + 119, y + 40, "+", "t"),
        _text(x + 12, y + 24, "W x + s B A x"),
        f'<circle cx="{x + 8}" cy="{y + 245}" r="6" fill="{DELTA}"/>',
        _text(x + 22, y + 249, "a layer that can get a delta"),
        _text(x, y + 272, "vit-mlp", "p"),
        _text(x + 60, y + 272, "the preset that selects them"),
        _text(x, y + 296, "all-linear", "p"),
        _text(x + 78, y + 296, "every linear but the head"),
        _text(x, y + 326, "only in CogAgent, and in CogVLM2 the last", "s"),
        *(
            _text(x, y + 344 + 16 * row, preset, "p")
            for row, preset in enumerate(
                (
                    "cross-attention",
                    "cross-vision-patch-embedding",
                    "cross-vision-attention",
                    "cross-vision-mlp",
                    "vision-convolution",
                )
            )
        ),
    ]


def _block(x: int, y: int, width: int, title: str, layers: list[str], *preset: str) -> list[str]:
    """A group of layers under one preset, whose name may take several lines."""
    height = 34 + 18 * len(layers) + 16 * len(preset)
    return [
        _box(x, y, width, height, "white"),
        _text(x + 10, y + 18, title),
        *(part for row, name in enumerate(layers) for part in _layer(x + 12, y + 38 + 18 * row, name)),
        *(_text(x + 10, y + 42 + 18 * len(layers) + 14 * row, name, "p") for row, name in enumerate(preset)),
    ]


def _layer(x: int, y: int, name: str) -> list[str]:
    """A disc for the delta, and the name of the layer that it enters."""
    return [f'<circle cx="{x + 5}" cy="{y - 4}" r="5" fill="{DELTA}"/>', _text(x + 17, y, name)]


def _box(x: int, y: int, width: int, height: int, fill: str = FROZEN) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{EDGE}"/>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> list[str]:
    return [f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{EDGE}" stroke-width="1.5" fill="none" marker-end="url(#a)"/>']


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(picture(), encoding="utf-8")
    sys.exit(0)
