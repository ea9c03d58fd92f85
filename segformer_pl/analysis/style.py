"""Style shared by all figures: colours, class palettes, axes, and display of foreign text."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito, distinguishable with every kind of colour vision.
BLUE, SKY, ORANGE, GREEN, VERMILLION, PURPLE = (
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
)
INK, FAINT = "#333333", "#dddddd"
CHART_SIZE = (5.6, 4.1)  # inches; 72 px per inch in SVG

Palette = Sequence[Sequence[int]]  # RGB 0-255 by train id
UNLABELLED_COLOR = (255, 255, 255)


def colorize(train_ids: npt.NDArray[np.integer[Any]], palette: Palette) -> npt.NDArray[np.uint8]:
    """Train ids (H, W) -> RGB image (H, W, 3); white where the id has no colour (unlabelled).

    Args:
        train_ids: Class of every pixel, not negative.
        palette: RGB 0-255 by train id.
    """
    colors = np.array([*palette, UNLABELLED_COLOR], np.uint8)
    # numpy refuses to compare with a number that the dtype cannot hold.
    last = min(len(palette), np.iinfo(train_ids.dtype).max)
    return colors[np.minimum(train_ids, last)]


def css_color(color: Sequence[int]) -> str:
    """RGB 0-255 -> ``#rrggbb``, for CSS and for matplotlib."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def printable(text: str, max_length: int = 200) -> str:
    """Make foreign text, such as an id or a class name, fit for one line of a figure.

    Characters that do not print (line breaks, control characters, changes of writing direction,
    unpaired surrogates) become escapes such as ``\\n``, and long text is shortened in the middle.
    Matplotlib typesets text between two ``$`` as mathematics: pass ``parse_math=False`` as well.
    """
    if len(text) > max_length:
        half = (max_length - 1) // 2
        text = f"{text[:half]}\u2026{text[-half:]}"
    return "".join(
        # Several languages need the zero-width joiner and non-joiner for correct spelling.
        letter if letter.isprintable() or letter in "\u200c\u200d" else ascii(letter)[1:-1]
        for letter in text
    )


def style_axes(axes: Axes) -> None:
    """Apply the common style of charts to axes: no box, a faint grid, dark labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def legend_above(axes: Axes, num_columns: int = 3) -> None:
    """Draw the legend above the axes, where it covers no data."""
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
    """Return a figure as an SVG element of an HTML page, in the font of the page."""
    buffer = StringIO()
    # Keep text as text instead of outlines: smaller, searchable, in the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
