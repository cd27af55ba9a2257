"""Shared by all pictures: matplotlib, fonts for any class name, and PNG files that are small and always the same.

`cnnpipe.plot.plots` takes matplotlib from here, where it is imported without the settings of a user.
"""

from __future__ import annotations

import io
import os
from contextlib import chdir, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Final

from PIL import Image

from cnnpipe.storage import write_bytes

# A user's style would need what is not installed here, such as LaTeX, or give other pictures of the same run.
os.environ["MATPLOTLIBRC"] = os.devnull
os.environ.pop("MPLBACKEND", None)
# A file in the working folder comes before that.
with chdir(Path(os.__file__).parent) if Path("matplotlibrc").exists() else nullcontext():
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import MaxNLocator
matplotlib.rcdefaults()  # for a program that had imported it before

__all__ = [
    "Axes",
    "AxesImage",
    "Figure",
    "MaxNLocator",
    "PowerNorm",
    "save_figure",
    "shorten_name",
    "text_style",
]

_RESOLUTIONS: Final = (120, 96, 76, 60)  # dots an inch
_FALLBACK_FONTS: Final = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei",
                          "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai")  # fmt: skip


def shorten_name(name: str, index: int, length: int) -> str:
    """Return a class name as it can be drawn: one line, its middle left out if it is too long.

    A name that no installed font can draw becomes the number of the class, as in the order of the matrix.
    """
    name = " ".join(name.split())
    if any(ord(character) not in _drawable_characters() for character in name):
        return f"class {index}"
    if len(name) <= length:
        return name
    head = (length - 1) * 2 // 3
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


@cache
def _fonts() -> tuple[str, ...]:
    """Return matplotlib's own font and those installed that cover other scripts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed))


@cache
def _drawable_characters() -> frozenset[int]:
    return frozenset(
        code for name in _fonts() for code in font_manager.get_font(font_manager.findfont(name)).get_charmap()
    )


def text_style() -> dict[str, Any]:
    """Return how text with a class name is drawn: `$` is a dollar, not mathematics."""
    return {"family": list(_fonts()), "parse_math": False}


def save_figure(figure: Figure, path: Path, max_bytes: int) -> None:
    """Write a figure as PNG, as sharp as fits in `max_bytes`: fewer colours first, then fewer pixels.

    Written by Pillow without metadata, so the same figure gives the same bytes whenever it is drawn.

    Raises:
        StorageError: it cannot be written.
    """
    content = _encode_png(_render(figure, _RESOLUTIONS[0]))
    for dpi in _RESOLUTIONS:
        if len(content) <= max_bytes:
            break
        content = _encode_png(_render(figure, dpi).quantize(256))
    write_bytes(path, content)


def _render(figure: Figure, dpi: int) -> Image.Image:
    """Draw everything that belongs to the figure, also what reaches out of it: labels are never cut."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pil_kwargs={"compress_level": 1})
    return Image.open(buffer).convert("RGB")


def _encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
