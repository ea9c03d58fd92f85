"""Compute the test protocols of the paper (Sec. 4.1), in bands of output rows.

An image is segmented in one or several *views* (scales, flipped or not), each view whole or in
sliding *windows*. A network gives class maps at its own stride. Every step from there to the wanted
size is linear and separable, along the rows and along the columns alike::

    U  (window, cells)  upsample to the window; cutting off its padding leaves rows of U out
    S  (view, window)   weight the window and place it in the view
    R  (out, view)      resize the view to the wanted size; turning back a flip reverses its rows

So one small matrix ``R @ S @ U`` for the rows and one for the columns hold all that becomes of a
window, and the output is the sum over windows of ``rows @ maps @ columns^T``. An example of one
axis: windows ``a`` and ``b`` of 4 pixels, a step of 2 pixels, maps of 2 cells, and an output as
large as the view::

              rows_a          rows_b
    out 0   1     0     |               |   out = rows_a @ a + rows_b @ b
        1   .75   .25   |               |
        2   .125  .375  |  .5     0     |   a and b overlap here, and share the weight: every
        3   0     .5    |  .375   .125  |   row of the output still sums to 1
        4               |  .25    .75   |
        5               |  0      1     |

The output is read in bands of rows, from top to bottom. A row of windows is computed when the first
band meets it and dropped behind its last one, and no map of all classes is kept at full size::

    out      0 1 2 3 4 5
    row 1    =======          computed for out 0, dropped after out 3
    row 2        =======      computed for out 2
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from segformer_pl.inference.protocol import Inference
from segformer_pl.models.segmenter import Output
from segformer_pl.upsampling import SeparableMap, bands, bilinear_matrix, bilinear_taps

Preprocess = Callable[[Tensor], Tensor]
Size = tuple[int, int]

WHOLE = Inference()


class ClassMaps(Protocol):
    """The part of the :class:`~segformer_pl.models.segmenter.Segmenter` contract that is used."""

    num_classes: int
    output: Output

    def __call__(self, images: Tensor) -> Tensor: ...


class PixelPredictions(NamedTuple):
    """Prediction, confidence and loss of every pixel.

    Attributes:
        labels: (B, H, W) int64, the most likely class.
        confidence: (B, H, W) its probability, float32 (or float64).
        losses: (B, H, W) minus the logarithm of the target's probability, in nats; 0 where the
            target is ignored.
    """

    labels: Tensor
    confidence: Tensor
    losses: Tensor


@torch.no_grad()
def predict_classes(
    network: ClassMaps,
    images: Tensor,
    size: Size,
    protocol: Inference = WHOLE,
    preprocess: Preprocess | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Predict the most likely class of every pixel.

    Args:
        network: Segmenter in evaluation mode.
        images: (B, C, H, W), as the network or ``preprocess`` takes them.
        size: Height and width of the result in pixels.
        protocol: Resizing, windows, scales and flips.
        preprocess: Function that is applied to what the network is given: the image, or one window
            after the other, so that a large image of 8 bits needs no second one of floating point.
            Images that are resized to another size pass through it before that, whole.
        dtype: Type of the result.

    Returns:
        (B, height, width) class indices.
    """
    labels = images.new_empty(len(images), *size, dtype=dtype)
    for rows, band, _ in _bands(network, images, size, protocol, preprocess):
        labels[:, rows] = _most_likely(band)
    return labels


@torch.no_grad()
def predict_probabilities(
    network: ClassMaps,
    images: Tensor,
    size: Size,
    protocol: Inference = WHOLE,
    preprocess: Preprocess | None = None,
) -> Tensor:
    """Predict the probabilities of all classes at full size, which takes that much memory.

    The arguments are those of :func:`predict_classes`.

    Returns:
        (B, num_classes, height, width).
    """
    found: Tensor | None = None
    for rows, band in probability_bands(network, images, size, protocol, preprocess):
        if found is None:
            found = band.new_empty(len(band), *size, band.shape[3])
        found[:, rows] = band
    assert found is not None
    return found.permute(0, 3, 1, 2)


@torch.no_grad()
def probability_bands(
    network: ClassMaps,
    images: Tensor,
    size: Size,
    protocol: Inference = WHOLE,
    preprocess: Preprocess | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Predict the probabilities of all classes in bands of rows, from top to bottom.

    The arguments are those of :func:`predict_classes`.

    Yields:
        The rows, and their probabilities (B, R, width, num_classes).
    """
    for rows, band, kind in _bands(network, images, size, protocol, preprocess):
        yield rows, _probabilities(band, kind)


@torch.no_grad()
def predict_pixels(
    network: ClassMaps,
    images: Tensor,
    target: Tensor,
    ignore_index: int,
    protocol: Inference = WHOLE,
    preprocess: Preprocess | None = None,
) -> PixelPredictions:
    """Predict the class of every pixel of the target, with its confidence and loss.

    Args:
        network: See :func:`predict_classes`.
        images: See :func:`predict_classes`.
        target: (B, H', W') int64 class indices. Their size need not be that of the images.
        ignore_index: Class index of pixels whose loss is 0.
        protocol: See :func:`predict_classes`.
        preprocess: See :func:`predict_classes`.
    """
    ignored = target == ignore_index
    targets = target.masked_fill(ignored, 0)
    found: PixelPredictions | None = None
    size: Any = tuple(target.shape[1:])
    for rows, band, kind in _bands(network, images, size, protocol, preprocess):
        if found is None:
            confidence, losses = (band.new_empty(target.shape) for _ in range(2))
            found = PixelPredictions(torch.empty_like(target), confidence, losses)
        probabilities = _probabilities(band, kind)
        most = probabilities.amax(3)
        found.labels[:, rows] = _most_likely(band)
        found.confidence[:, rows] = most
        index = targets[:, rows, :, None]
        if kind == "logits":  # exact also where the probability is 0 in floating point
            own = band.gather(3, index).squeeze(3)
            found.losses[:, rows] = band.amax(3) - most.log() - own
        else:
            own = probabilities.gather(3, index).squeeze(3)
            found.losses[:, rows] = -own.clamp(min=torch.finfo(own.dtype).tiny).log()
    assert found is not None
    found.losses.masked_fill_(ignored, 0)
    return found


Kind = Literal["logits", "scores", "probabilities"]


def _probabilities(band: Tensor, kind: Kind) -> Tensor:
    """(..., num_classes) of a kind -> probabilities."""
    if kind == "logits":
        return band.softmax(3)
    if kind == "scores":
        return band / band.sum(3, keepdim=True).clamp(min=torch.finfo(band.dtype).tiny)
    return band


def _bands(
    network: ClassMaps,
    images: Tensor,
    size: Size,
    protocol: Inference,
    preprocess: Preprocess | None,
) -> Iterator[tuple[slice, Tensor, Kind]]:
    """Yield bands of rows (B, R, width, num_classes): the network's output, or if there are several
    views the mean of their probabilities."""
    views = []
    for scale in protocol.scales:
        # Both views of a scale share one image.
        scaled, windows = _scaled(network, images, scale, protocol, preprocess)
        views += [
            View(protocol, windows, scaled, flipped, size)
            for flipped in ((False, True) if protocol.flip else (False,))
        ]
    channels = len(images) * network.num_classes
    for _, rows in bands(1, *size, channels, images.device.type):
        if len(views) == 1:
            yield rows, views[0].class_maps(rows), network.output
            continue
        total = _probabilities(views[0].class_maps(rows), network.output)
        for view in views[1:]:
            total += _probabilities(view.class_maps(rows), network.output)
        yield rows, total / len(views), "probabilities"


def _scaled(
    network: ClassMaps,
    images: Tensor,
    scale: float,
    protocol: Inference,
    preprocess: Preprocess | None,
) -> tuple[Tensor, "_Windows"]:
    """Return the images at the size of a view, and the network of what is cut out of them."""
    stored: Any = tuple(images.shape[2:])
    sizes = [view_size(stored, scale, protocol.base_size)]
    if protocol.resize_to is not None:
        height, width = (_multiple(side, protocol.resize_to) for side in sizes[0])
        sizes.append((height, width))
    if preprocess is None or all(size == stored for size in sizes):
        process = preprocess
    else:  # resizing 8 bits would round
        images, process = preprocess(images), None
    for size in sizes:
        images = _resize(images, size)
    return images, _Windows(network, process, protocol.pad_to)


def view_size(size: Size, scale: float, base_size: Size | None) -> Size:
    """Return the size of a view: an image fitted into the base size, as mmcv rounds it."""
    if base_size is not None:
        long, short = (int(side * scale) for side in base_size)
        scale = min(long / max(size), short / min(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


class _Axis(NamedTuple):
    """One window along one axis.

    Attributes:
        begin: First pixel of the window in the view.
        end: Pixel past the last one.
        out: Output pixels that the window has a part in; empty if there are none.
        place: Function that returns ``R @ S``, (length of ``out``, end - begin). It is called when
            the window is computed: the matrices of all windows together would be larger than the
            image.
    """

    begin: int
    end: int
    out: slice
    place: Callable[[], Tensor]


class _Windows(NamedTuple):
    """A network that is applied to windows as they are cut out."""

    network: ClassMaps
    preprocess: Preprocess | None
    pad_to: int | None

    def __call__(self, window: Tensor) -> Tensor:
        if self.preprocess is not None:
            window = self.preprocess(window)
        missing = self.missing(window)
        return self.network(F.pad(window, (0, missing[1], 0, missing[0])))

    def missing(self, window: Tensor) -> list[int]:
        """Return the rows and columns of padding."""
        return [
            _multiple(side, self.pad_to) - side if self.pad_to else 0 for side in window.shape[2:]
        ]


class View:
    """One view of the images; its windows are computed when a band first lies in them."""

    def __init__(
        self,
        protocol: Inference,
        network: _Windows,
        images: Tensor,
        flipped: bool,
        size: Size,
    ) -> None:
        self.images = images
        self.flipped = flipped
        self.network = network
        height, width = self.images.shape[2:]
        window, stride = protocol.window or (height, width), protocol.stride or (height, width)
        self.axes = [
            window_axes(*numbers, protocol.window_weights)
            for numbers in zip((height, width), window, stride, size)
        ]
        if flipped:
            self.axes[1] = [
                axis._replace(
                    out=slice(size[1] - axis.out.stop, size[1] - axis.out.start)
                    if axis.out.stop
                    else axis.out,
                )
                for axis in self.axes[1]
            ]
        self.size = size
        self.opened: dict[int, list[tuple[slice, Tensor, SeparableMap]]] = {}

    def class_maps(self, rows: slice) -> Tensor:
        """Return output rows (B, R, width, num_classes). Bands must come from top to bottom."""
        total: Tensor | None = None
        for index, extent in enumerate(row.out for row in self.axes[0]):
            if extent.stop <= rows.start:
                self.opened.pop(index, None)
                continue
            inside = slice(max(rows.start, extent.start), min(rows.stop, extent.stop))
            if inside.start >= inside.stop:
                continue
            if index not in self.opened:
                self._open(index)
            for columns, maps, placing in self.opened[index]:
                local = slice(inside.start - extent.start, inside.stop - extent.start)
                with torch.autocast(maps.device.type, enabled=False):
                    part = placing.band(maps, local)
                if inside == rows and columns == slice(0, self.size[1]) and total is None:
                    total = part
                    continue
                if total is None:
                    shape = len(maps), rows.stop - rows.start, self.size[1], maps.shape[3]
                    total = maps.new_zeros(shape)
                here = slice(inside.start - rows.start, inside.stop - rows.start)
                total[:, here, columns] += part
        assert total is not None
        return total

    def _open(self, index: int) -> None:
        """Run the network on a row of windows."""
        row, width = self.axes[0][index], self.images.shape[3]
        opened = []
        for column in self.axes[1]:
            if column.out.stop == 0:
                continue
            begin, end = column.begin, column.end
            if self.flipped:  # counted from the right
                begin, end = width - end, width - begin
            window = self.images[:, :, row.begin : row.end, begin:end]
            if self.flipped:
                window = window.flip(3)
            missing = self.network.missing(window)
            given = self.network(window)
            precise = given.float() if given.dtype.itemsize < 4 else given
            maps = precise.permute(0, 2, 3, 1).contiguous()
            rows, across = (
                (axis.place().flip(0) if mirrored else axis.place())
                @ bilinear_matrix(cells, side + more)[:side]
                for axis, mirrored, cells, side, more in zip(
                    (row, column),
                    (False, self.flipped),
                    maps.shape[1:3],
                    window.shape[2:],
                    missing,
                )
            )
            opened.append((column.out, maps, SeparableMap(rows, across, like=maps)))
        self.opened[index] = opened


def _most_likely(band: Tensor) -> Tensor:
    """``band.argmax(3)``; on the CPU by numpy, which takes a quarter of torch's time for it."""
    return torch.from_numpy(band.numpy().argmax(3)) if band.is_cpu else band.argmax(3)


def _resize(images: Tensor, size: Size) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _multiple(side: int, divisor: int) -> int:
    return math.ceil(side / divisor) * divisor


def window_axes(length: int, window: int, stride: int, out: int, weighting: str) -> list[_Axis]:
    """Return the windows along one axis of the view, and where each goes in the output.

    As in the reference: ``max(length - window + stride - 1, 0) // stride + 1`` windows, the last
    moved back into the image.
    """
    window = min(window, length)
    number = max(length - window + stride - 1, 0) // stride + 1
    begins = [min(step * stride, length - window) for step in range(number)]
    weights = torch.ones(window, dtype=torch.float64)
    if weighting == "hann":
        # Without its zeros at both ends, so that pixels at the image's border count too.
        weights = torch.hann_window(window + 2, periodic=False, dtype=torch.float64)[1:-1]
    total = torch.zeros(length, dtype=torch.float64)
    for begin in begins:
        total[begin : begin + window] += weights
    first, second, share = bilinear_taps(length, out)
    axes = []
    for begin in begins:
        end = begin + window
        # The matrix of the whole axis would grow with the square of the image's side.
        used = _within(first, begin, end) & (share != 1) | _within(second, begin, end) & (
            share != 0
        )
        rows = used.nonzero().ravel()
        # A window between the pixels that a much smaller output samples has none.
        extent = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        share_of_window = weights / total[begin:end]
        axes.append(
            _Axis(begin, end, extent, partial(_place, length, out, extent, begin, share_of_window))
        )
    return axes


def _place(length: int, out: int, extent: slice, begin: int, weights: Tensor) -> Tensor:
    columns = slice(begin, begin + len(weights))
    return bilinear_matrix(length, out, extent, columns) * weights


def _within(values: Tensor, begin: int, end: int) -> Tensor:
    return (values >= begin) & (values < end)
