"""Names of others in pictures: on one line, no formulas, and in characters that a font of this machine has."""

import functools

from sat_lora.printable import printable

# What fonts with Chinese, Japanese and Korean characters are called on common systems.
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip


def plot_text(text: object) -> str:
    """Return `text` for matplotlib: what it would read as a formula is escaped, and so is what no font has."""
    fonts = _fonts()
    return "".join(
        r"\$" if c == "$" else c if any(font.get_char_index(ord(c)) for font in fonts) else _escaped(c)
        for c in printable(text)
    )


@functools.cache
def families() -> list[str]:
    """Return the names of the fonts that a text is set in: matplotlib's own, then installed ones of FALLBACKS."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [font_manager.FontProperties().get_name(), *(name for name in FALLBACKS if name in installed)]


@functools.cache
def _fonts() -> list:
    from matplotlib import font_manager

    return [font_manager.get_font(font_manager.findfont(name)) for name in families()]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
