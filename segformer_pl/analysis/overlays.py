"""Images of predictions: overlays with a legend, and panels of image, label and prediction."""

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from segformer_pl.analysis.fonts import Piece, fit_text, split
from segformer_pl.analysis.style import (
    INK,
    UNLABELLED_COLOR,
    Palette,
    colorize,
    css_color,
    printable,
)

LISTED_CLASSES = 31  # entries in the legend of a panel
MAX_NAME_LENGTH = 40  # characters of a class name in a legend
MAX_TITLE_LENGTH = 24  # characters of a title above a panel
# Sizes of the panels of predictions in inches
PANEL_WIDTH, GAP = 1.8, 0.08
TITLE_HEIGHT, LETTER_WIDTH = 0.22, 0.085
OPACITY = 0.5  # of the class colours over the image
MIN_LONG_SIDE = 512  # pixels; smaller images are enlarged, so that outlines and text fit
TEXT_SIZE = 1 / 44  # height of the legend's text relative to the longer side
OUTLINE_WIDTH = 1 / 1600  # relative to the longer side
BAND_PIXELS = 1 << 20  # pixels of an overlay that are drawn at once
DARK = 90  # brightness, 0 to 255, below which outlines are white

Pixels = npt.NDArray[np.uint8]
TrainIds = npt.NDArray[np.integer[Any]]


def draw_overlay(
    image: Pixels,
    train_ids: TrainIds,
    class_names: Sequence[str],
    palette: Palette,
) -> Image.Image:
    """Draw an image under half-transparent class colours, with outlines and a legend below.

    The legend lists the classes that occur, the largest first, with their share of the pixels. Text
    and outlines scale with the image. An image whose longer side is below :data:`MIN_LONG_SIDE` is
    enlarged by an integer factor, without interpolation.

    Args:
        image: (H, W, 3) RGB.
        train_ids: (H, W), each below the number of classes.
        class_names: Class names by train id.
        palette: RGB 0-255 by train id.
    """
    return Image.fromarray(np.concatenate([*_Overlay(image, train_ids, class_names, palette)]))


def write_overlay(
    stream: BinaryIO,
    image: Pixels,
    train_ids: TrainIds,
    class_names: Sequence[str],
    palette: Palette,
) -> None:
    """Write the result of :func:`draw_overlay` as a PNG, in bands of rows to bound the memory.

    Args:
        stream: File open for writing in binary mode.
        image: (H, W, 3) RGB.
        train_ids: (H, W), each below the number of classes.
        class_names: Class names by train id.
        palette: RGB 0-255 by train id.
    """
    overlay = _Overlay(image, train_ids, class_names, palette)
    write_png(stream, overlay, overlay.height, overlay.width)


def draw_classes(image: Pixels, train_ids: TrainIds, palette: Palette) -> Pixels:
    """Draw an image under half-transparent class colours, with outlines, at its own size.

    This is :func:`draw_overlay` without the legend and without enlarging, for frames of a video.

    Args:
        image: (H, W, 3) RGB.
        train_ids: (H, W), each below the number of classes.
        palette: RGB 0-255 by train id.

    Returns:
        (H, W, 3) RGB.
    """
    return _blend(image, train_ids, palette, _outline_width(max(train_ids.shape)))


def draw_legend(
    counts: npt.NDArray[np.int64], class_names: Sequence[str], palette: Palette, width: int
) -> Image.Image:
    """Draw the legend of :func:`draw_overlay` alone.

    Args:
        counts: Number of pixels of each class, (num_classes,).
        class_names: Class names by train id.
        palette: RGB 0-255 by train id.
        width: Width in pixels; the legend is wider if a single entry needs more.
    """
    text_size = round(TEXT_SIZE * max(width, MIN_LONG_SIDE))
    return _draw_legend(_legend_entries(counts, class_names, palette), width, text_size)


def count_pixels(train_ids: TrainIds, num_classes: int) -> npt.NDArray[np.int64]:
    """Return the number of pixels of each class, (num_classes,).

    Args:
        train_ids: (H, W), each below the number of classes.
        num_classes: Number of classes.
    """
    num_rows = max(BAND_PIXELS // train_ids.shape[1], 1)  # bincount copies to 64 bits
    counts = [
        np.bincount(train_ids[top : top + num_rows].ravel(), minlength=num_classes)
        for top in range(0, len(train_ids), num_rows)
    ]
    return np.sum(counts, axis=0)


def enlargement(long_side: int) -> int:
    """Return the factor by which an image is enlarged, so that outlines and text fit.

    Args:
        long_side: Longer side of the image in pixels.
    """
    return -(-MIN_LONG_SIDE // long_side)


def share_text(share: float) -> str:
    """Return a share of the pixels, above 0 and at most 1, in percent."""
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


class _Overlay:
    """An overlay as bands of rows (R, width, 3) from top to bottom, the legend last.

    The outlines in a band depend on pixels beyond it, so a band is drawn with a margin of rows
    above and below, and the margin is cut off::

        rows     0 . . . . . . . 8 . . . . . . . 16 . . . . .
        band 0   [===============|~~~]                            = kept
        band 1               [~~~|===============|~~~]            ~ margin
    """

    def __init__(
        self, image: Pixels, train_ids: TrainIds, class_names: Sequence[str], palette: Palette
    ) -> None:
        factor = enlargement(max(train_ids.shape))
        counts = count_pixels(train_ids, len(class_names))
        entries = _legend_entries(counts, class_names, palette)
        if factor > 1:
            image = image.repeat(factor, axis=0).repeat(factor, axis=1)
            train_ids = train_ids.repeat(factor, axis=0).repeat(factor, axis=1)
        long_side = max(train_ids.shape)
        self.image, self.train_ids, self.palette = image, train_ids, palette
        self.outline_width = _outline_width(long_side)
        self.legend = _draw_legend(entries, train_ids.shape[1], round(TEXT_SIZE * long_side))
        self.width = self.legend.width
        self.height = train_ids.shape[0] + self.legend.height

    def __iter__(self) -> Iterator[Pixels]:
        height, width = self.train_ids.shape
        # Distance of the farthest pixel that an outline depends on.
        margin = _neighbourhood(self.outline_width) // 2 + self.outline_width + 1
        num_rows = max(BAND_PIXELS // width, 2 * margin)
        for top in range(0, height, num_rows):
            rows = slice(top, min(top + num_rows, height))
            wide = slice(max(rows.start - margin, 0), min(rows.stop + margin, height))
            blended = _blend(
                self.image[wide], self.train_ids[wide], self.palette, self.outline_width
            )
            band = np.full((rows.stop - rows.start, self.width, 3), 255, np.uint8)
            band[:, :width] = blended[rows.start - wide.start : rows.stop - wide.start]
            yield band
        yield np.asarray(self.legend)


def write_png(stream: BinaryIO, bands: Iterable[Pixels], height: int, width: int) -> None:
    """Write an 8-bit RGB image as a PNG (ISO 15948), band by band.

    Args:
        stream: File open for writing in binary mode.
        bands: Bands (R, width, 3) from top to bottom, ``height`` rows in total.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """

    def write_chunk(kind: bytes, content: bytes) -> None:
        checksum = zlib.crc32(content, zlib.crc32(kind))
        stream.write(struct.pack(">I", len(content)) + kind + content)
        stream.write(struct.pack(">I", checksum))

    stream.write(b"\x89PNG\r\n\x1a\n")
    # 8 bits per channel, RGB, standard compression and filter methods, not interlaced.
    write_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    # Level 1: higher levels take three times as long and hardly make photographs smaller.
    compressor = zlib.compressobj(1)
    for band in bands:
        # Each row starts with its filter type: 1, every pixel minus the pixel to its left.
        rows = np.ones((len(band), 1 + 3 * width), np.uint8)
        flat = band.reshape(len(band), -1)
        rows[:, 1:4] = flat[:, :3]
        np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
        if content := compressor.compress(rows.tobytes()):
            write_chunk(b"IDAT", content)
    write_chunk(b"IDAT", compressor.flush())
    write_chunk(b"IEND", b"")


class _Entry(NamedTuple):
    pieces: list[Piece]
    color: tuple[int, ...]


def _legend_entries(
    counts: npt.NDArray[np.int64], class_names: Sequence[str], palette: Palette
) -> list[_Entry]:
    entries = []
    for train_id in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        share = share_text(counts[train_id] / counts.sum())
        name = printable(class_names[train_id], MAX_NAME_LENGTH)
        entries.append(_Entry(split(f"{name}  {share}"), tuple(palette[train_id])))
    return entries


def _blend(image: Pixels, train_ids: TrainIds, palette: Palette, outline_width: int) -> Pixels:
    colors = colorize(train_ids, palette)
    blended = np.asarray(cv2.addWeighted(image, 1 - OPACITY, colors, OPACITY, 0), np.uint8)
    _outline(blended, train_ids, outline_width)
    return blended


def _outline_width(long_side: int) -> int:
    return max(1, round(OUTLINE_WIDTH * long_side))


def _outline(blended: Pixels, train_ids: TrainIds, width: int) -> None:
    """Draw the borders between classes, ``width`` pixels wide: black, or white on dark ground."""
    edges = np.zeros(train_ids.shape, np.uint8)
    edges[:, :-1] |= train_ids[:, :-1] != train_ids[:, 1:]
    edges[:-1] |= train_ids[:-1] != train_ids[1:]
    borders = cv2.dilate(edges, np.ones((width, width), np.uint8)) > 0
    # Decide by the mean brightness of a neighbourhood: single pixels would make a line on textured
    # ground flicker between black and white.
    side = _neighbourhood(width)
    brightness = cv2.blur(cv2.cvtColor(blended, cv2.COLOR_RGB2GRAY), (side, side))
    blended[borders] = np.where(brightness[borders] < DARK, 255, 0)[:, None]


def _neighbourhood(width: int) -> int:
    """Return the side in pixels of the square whose brightness decides the colour of an outline."""
    return 16 * width + 1


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def _length(piece: Piece, text_size: int) -> float:
    return _font(piece.file, text_size).getlength(piece.text)


def _draw_legend(entries: Sequence[_Entry], width: int, text_size: int) -> Image.Image:
    """Draw a legend of as many columns as fit; wider than ``width`` if not even one fits."""
    swatch = text_size
    gap = round(0.6 * text_size)
    lengths = [sum(_length(piece, text_size) for piece in entry.pieces) for entry in entries]
    column_width = swatch + gap + round(max(lengths))
    num_columns = max(1, min(len(entries), (width - gap) // (column_width + 2 * gap)))
    num_rows = -(-len(entries) // num_columns)
    row_height = round(1.5 * text_size)
    size = (max(width, column_width + 2 * gap), num_rows * row_height + gap)
    legend = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(legend)
    for index, entry in enumerate(entries):
        row, column = divmod(index, num_columns)
        left = gap + column * (column_width + 2 * gap)
        middle = gap // 2 + row * row_height + row_height // 2
        box = (left, middle - swatch // 2, left + swatch, middle + swatch // 2)
        draw.rectangle(box, entry.color, INK, width=max(1, text_size // 14))
        x: float = left + swatch + gap
        for piece in entry.pieces:
            font = _font(piece.file, text_size)
            draw.text((x, middle), piece.text, INK, font, anchor="lm")
            x += _length(piece, text_size)
    return legend


def plot_predictions(
    samples: Sequence[tuple[str, Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    palette: Palette,
    losses: Sequence[float] | None = None,
) -> Figure:
    """Plot image, label and prediction of several samples, two samples per row, with a legend.

    Args:
        samples: Tuples of id, image (C, H, W) in 0 to 1, label (H, W) and prediction (H, W). The
            first three channels are shown, as RGB.
        class_names: Class names by train id.
        palette: RGB 0-255 by train id.
        losses: Loss of every sample in nats, written above its prediction.
    """
    handles = [
        Patch(
            facecolor=css_color(color),
            edgecolor="0.5",
            label=printable(name, MAX_NAME_LENGTH),
        )
        for name, color in _panel_legend(samples, class_names, palette)
    ]
    num_columns = 2 if len(samples) > 1 else 1
    rows = [samples[first : first + num_columns] for first in range(0, len(samples), num_columns)]
    # All panels are equally wide, and those of a row are as high as its narrowest image needs.
    heights = [PANEL_WIDTH * max(map(_aspect, row)) for row in rows]
    width = 3 * num_columns * (PANEL_WIDTH + GAP) + GAP
    longest = max(len(str(handle.get_label())) for handle in handles)
    legend_columns = min(len(handles), max(1, int(width / (0.5 + LETTER_WIDTH * longest))))
    legend_height = 0.2 + 0.2 * -(-len(handles) // legend_columns)
    height = sum(heights) + len(rows) * (TITLE_HEIGHT + GAP) + legend_height
    figure = Figure(figsize=(width, height))
    top = height
    notes = [""] * len(samples) if losses is None else [f": {loss:.2f} nats" for loss in losses]
    remaining = iter(notes)
    for row, row_height in zip(rows, heights, strict=True):
        top -= TITLE_HEIGHT + row_height
        for column, (name, image, label, prediction) in enumerate(row):
            panels: list[tuple[str, npt.NDArray[Any]]] = [
                (printable(name, MAX_TITLE_LENGTH), image[:3].permute(1, 2, 0).clamp(0, 1).numpy()),
                ("label", colorize(label.numpy(), palette)),
                (f"prediction{next(remaining)}", colorize(prediction.numpy(), palette)),
            ]
            for offset, (title, panel) in enumerate(panels):
                left = GAP + (3 * column + offset) * (PANEL_WIDTH + GAP)
                box = (left / width, top / height, PANEL_WIDTH / width, row_height / height)
                axis = figure.add_axes(box, anchor="N")
                axis.set_axis_off()
                axis.imshow(panel, interpolation="nearest")
                axis.set_title(title, fontsize=9, pad=3, parse_math=False)
        top -= GAP
    legend = figure.legend(handles=handles, loc="lower center", ncols=legend_columns, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return fit_text(figure)


def _aspect(sample: tuple[str, Tensor, Tensor, Tensor]) -> float:
    height, width = sample[2].shape
    return height / width


def _panel_legend(
    samples: Sequence[tuple[str, Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    palette: Palette,
) -> list[tuple[str, Sequence[int]]]:
    """Return legend entries of all classes, or of those with the most pixels if there are many.

    The entry of unlabelled pixels is listed if there are any.
    """
    entries: list[tuple[str, Sequence[int]]] = list(zip(class_names, palette, strict=True))
    ids = np.concatenate([maps.numpy().ravel() for _, _, *pair in samples for maps in pair])
    is_class = (ids >= 0) & (ids < len(entries))
    unlabelled = [] if is_class.all() else [("unlabelled", UNLABELLED_COLOR)]
    if len(entries) <= LISTED_CLASSES:
        return [*entries, *unlabelled]
    counts = np.bincount(ids[is_class], minlength=len(entries))
    present = np.flatnonzero(counts)
    listed = sorted(present[np.argsort(-counts[present], kind="stable")][:LISTED_CLASSES])
    return [*(entries[train_id] for train_id in listed), *unlabelled]
