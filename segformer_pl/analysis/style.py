"""The look of every figure: colours, class palettes, axes, and text that is not ours."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by every kind of colour vision.
BLUE, SKY, ORANGE, GREEN, VERMILLION, PURPLE = (
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
)
INK, FAINT = "#333333", "#dddddd"
CHART_SIZE = (5.6, 4.1)  # inches, at 72 px an inch in the SVG

Palette = Sequence[Sequence[int]]  # RGB 0-255 by train id
UNLABELLED_COLOR = (255, 255, 255)


def colorize(train_ids: npt.NDArray[np.integer[Any]], palette: Palette) -> npt.NDArray[np.uint8]:
    """Train ids (H, W) -> (H, W, 3) RGB; white where the id has no colour (unlabelled).

    Args:
        train_ids: Class of every pixel, not negative.
        palette: RGB 0-255 by train id.
    """
    colors = np.array([*palette, UNLABELLED_COLOR], np.uint8)
    # numpy refuses a bound that the type of the ids cannot hold, which they never reach.
    last = min(len(palette), np.iinfo(train_ids.dtype).max)
    return colors[np.minimum(train_ids, last)]


def css_color(color: Sequence[int]) -> str:
    """RGB 0-255 -> ``#rrggbb``, which matplotlib reads too."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def printable(text: str, max_length: int = 200) -> str:
    """Text that is not ours, such as an id or a class name, for one line of a figure.

    What does not print (line breaks, control characters, those that turn the direction of writing,
    halves of surrogate pairs) becomes an escape, ``\\n``; a long text loses its middle. For
    matplotlib, which takes what stands between two ``$`` for mathematics, pass ``parse_math=False``
    along with it.
    """
    if len(text) > max_length:
        half = (max_length - 1) // 2
        text = f"{text[:half]}\u2026{text[-half:]}"
    return "".join(
        # The zero-width (non-)joiner belongs to the spelling of several languages.
        letter if letter.isprintable() or letter in "\u200c\u200d" else ascii(letter)[1:-1]
        for letter in text
    )


def style_axes(axes: Axes) -> None:
    """Give axes the look that all charts share: no box, a faint grid, dark labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def legend_above(axes: Axes, num_columns: int = 3) -> None:
    """Draw the legend above the axes, where it hides nothing."""
    drawn = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=num_columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.4,
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def inline_svg(figure: Figure) -> Markup:
    """The figure as an element of an HTML page, in the page's own font."""
    buffer = StringIO()
    # Text stays text: small, searchable, in the fonts of the page.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
