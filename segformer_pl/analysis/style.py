"""Style shared by all figures: colours, class palettes, axes, and display of foreign text."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
# Text on the cells of a colour map, which are the same on light and dark pages.
CELL_DARK, CELL_LIGHT = "#222222", "#fefefe"
# What takes the place of a colour on a dark page: as far from its dark ground as the colour is from
# white. A page defines a CSS variable for each; see inline_svg.
DARK = {
    "#0072b2": "#4ba3dc",  # blue
    "#56b4e9": "#87c9ee",  # sky
    "#e69f00": "#f0b73a",  # orange
    "#009e73": "#35c09a",  # green
    "#d55e00": "#f28a45",  # vermillion
    "#cc79a7": "#dd9fc1",  # purple
    "#000000": "#e6e9ec",
    "#333333": "#e6e9ec",  # ink
    "#666666": "#a3adb6",
    "#767676": "#99a3ac",
    "#999999": "#6d7882",  # spines of axes
    "#dddddd": "#363d44",  # faint: grids
    "#f4f6f8": "#232a31",  # every other row
    "#ffffff": "#1b2026",  # the ground
}
CHART_SIZE = (5.6, 4.1)  # inches; 72 px per inch in SVG

TAG, COLOR = re.compile("<[^>]+>"), re.compile(r"(?<=: )#[0-9a-f]{6}\b")
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


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Ignore that matplotlib's font lacks letters: the browser has fonts of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def execute_layout(figure: Figure) -> None:
    """Lay out a figure of a page now, which takes less time than to draw it."""
    layout = figure.get_layout_engine()
    if layout is not None:
        with _without_glyph_warnings():
            layout.execute(figure)


def inline_svg(figure: Figure) -> Markup:
    """Return a figure as an SVG element of an HTML page, in the font of the page.

    A colour of :data:`DARK` becomes a CSS variable with this colour as its default, so that a dark
    page can replace it: ``fill: var(--333333, #333333)``.
    """
    buffer = StringIO()
    # Keep text as text instead of outlines: smaller, searchable, in the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none"}), _without_glyph_warnings():
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    # Not in the text between tags, which can be that of a user.
    return Markup(TAG.sub(lambda tag: COLOR.sub(_variable, tag[0]), text[text.index("<svg") :]))


def _variable(color: re.Match[str]) -> str:
    return f"var(--{color[0][1:]}, {color[0]})" if color[0] in DARK else color[0]
