"""Compute the test protocols of the paper (Sec. 4.1), in bands of output rows.

An image is segmented in one or several *views* (scales, mirrored or not), each view whole or in
sliding *windows*. The network returns class maps at its own stride; a pixel of a class map is
called a cell here. Every step from the class maps to the output is linear, and separable into rows
and columns. Along one axis the steps are matrices::

    U  (window, cells)  upsample the class map to the window; padding is cut off by leaving out rows
    S  (view, window)   weight the window and place it in the view
    R  (out, view)      resize the view to the output; a mirrored view reverses the rows of R

One small matrix ``R @ S @ U`` for the rows and one for the columns therefore describe everything
that happens to a window, and the output is the sum over windows of ``rows @ maps @ columns^T``. An
example along one axis: windows ``a`` and ``b`` of 4 pixels, a stride of 2 pixels, class maps of 2
cells, and an output of the view's size::

              rows_a          rows_b
    out 0   1     0     |               |   out = rows_a @ a + rows_b @ b
        1   .75   .25   |               |
        2   .125  .375  |  .5     0     |   a and b overlap in pixels 2 and 3 and share the weight
        3   0     .5    |  .375   .125  |   there: the weights of every output pixel sum to 1
        4               |  .25    .75   |
        5               |  0      1     |

The output is computed in bands of rows, from top to bottom. A row of windows runs through the
network when the first band overlaps it, and is freed after the last one. No map of all classes is
held at full size::

    out           0 1 2 3 4 5
    windows a     =======          computed for out 0, freed after out 3
    windows b         =======      computed for out 2, freed after out 5

The usual protocol, the whole image in one window of its own size, needs less on the CPU: see
``upsampled_argmax.py``.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from segformer_pl.bands import bands
from segformer_pl.inference.protocol import Inference
from segformer_pl.inference.upsampled_argmax import most_likely, upsampled_argmax
from segformer_pl.models.segmenter import Output
from segformer_pl.upsampling import SeparableMap, bilinear_matrix, bilinear_taps

Preprocess = Callable[[Tensor], Tensor]
Size = tuple[int, int]

WHOLE = Inference()


class ClassMaps(Protocol):
    """A network that returns class maps: the part of the contract that inference needs.

    A :class:`~segformer_pl.models.segmenter.Segmenter` is one.
    """

    num_classes: int
    output: Output

    def __call__(self, images: Tensor) -> Tensor: ...


class PixelPredictions(NamedTuple):
    """Prediction, confidence and loss of every pixel.

    Attributes:
        labels: Most likely class, (B, H, W) int64.
        confidence: Probability of that class, (B, H, W) float32 or float64.
        losses: Negative log-probability of the target in nats, (B, H, W); 0 where the target is
            ignored.
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
        images: Input of ``preprocess``, or of the network if that is None, (B, C, H, W).
        size: Height and width of the result in pixels.
        protocol: Resizing, windows, scales and flips.
        preprocess: Function from images to input of the network, such as a normalisation. It is
            applied to one window after the other, so that a large 8-bit image needs no
            floating-point copy. If a view is resized, it is applied to the whole image before.
        dtype: Type of the result.

    Returns:
        Class indices, (B, height, width).
    """
    if images.is_cpu and tuple(images.shape[2:]) == size and protocol.is_one_window(size):
        window = _Windows(network, preprocess, protocol.pad_to)
        height, width = (
            side + more for side, more in zip(images.shape[2:], window.missing(images))
        )
        maps = window.class_maps(images)
        with torch.autocast("cpu", enabled=False):
            return upsampled_argmax(maps, (height, width), size, dtype)
    labels = images.new_empty(len(images), *size, dtype=dtype)
    for rows, band, _ in _bands(network, images, size, protocol, preprocess):
        labels[:, rows] = most_likely(band)
    return labels


@torch.no_grad()
def predict_probabilities(
    network: ClassMaps,
    images: Tensor,
    size: Size,
    protocol: Inference = WHOLE,
    preprocess: Preprocess | None = None,
) -> Tensor:
    """Predict the probabilities of all classes for every pixel.

    The result holds all classes at full size; :func:`probability_bands` needs less memory. The
    arguments are those of :func:`predict_classes`.

    Returns:
        Probabilities, (B, num_classes, height, width).
    """
    probabilities: Tensor | None = None
    for rows, band in probability_bands(network, images, size, protocol, preprocess):
        if probabilities is None:
            probabilities = band.new_empty(len(band), *size, band.shape[3])
        probabilities[:, rows] = band
    assert probabilities is not None
    return probabilities.permute(0, 3, 1, 2)


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
        Slice of R output rows, and their probabilities, (B, R, width, num_classes).
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
        target: Class indices, (B, H', W') int64. H' and W' may differ from the images' size; the
            predictions have the target's.
        ignore_index: Class index of the pixels whose loss is 0.
        protocol: See :func:`predict_classes`.
        preprocess: See :func:`predict_classes`.
    """
    ignored = target == ignore_index
    targets = target.masked_fill(ignored, 0)
    pixels: PixelPredictions | None = None
    size: Any = tuple(target.shape[1:])
    for rows, band, kind in _bands(network, images, size, protocol, preprocess):
        if pixels is None:
            confidence, losses = (band.new_empty(target.shape) for _ in range(2))
            pixels = PixelPredictions(torch.empty_like(target), confidence, losses)
        probabilities = _probabilities(band, kind)
        highest = probabilities.amax(3)
        pixels.labels[:, rows] = most_likely(band)
        pixels.confidence[:, rows] = highest
        index = targets[:, rows, :, None]
        if kind == "logits":
            # log p_t = z_t - logsumexp(z), and logsumexp(z) = max z - log p_max. This is exact even
            # where p_t underflows to 0.
            own = band.gather(3, index).squeeze(3)
            pixels.losses[:, rows] = band.amax(3) - highest.log() - own
        else:
            own = probabilities.gather(3, index).squeeze(3)
            pixels.losses[:, rows] = -own.clamp(min=torch.finfo(own.dtype).tiny).log()
    assert pixels is not None
    pixels.losses.masked_fill_(ignored, 0)
    return pixels


Kind = Literal["logits", "scores", "probabilities"]


def _probabilities(band: Tensor, kind: Kind) -> Tensor:
    """Convert a band (B, R, width, num_classes) of logits or scores to probabilities."""
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
    """Yield slices of R output rows with their band (B, R, width, num_classes) and its kind.

    A band is the network's output if there is one view, and the mean of the views' probabilities if
    there are several.
    """
    views = []
    for scale in protocol.scales:
        # Both views of a scale share one resized image.
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
    """Return the images at the size of a view, and the network to apply to windows of them."""
    original: Any = tuple(images.shape[2:])
    sizes = [protocol.view_size(original, scale)]
    if protocol.resize_to is not None:
        height, width = (_multiple(side, protocol.resize_to) for side in sizes[0])
        sizes.append((height, width))
    if preprocess is None or all(size == original for size in sizes):
        process = preprocess
    else:  # preprocess first, because resizing 8-bit images would round
        images, process = preprocess(images), None
    is_antialiased = protocol.image_size is not None
    for size in sizes:
        images = _resize(images, size, is_antialiased)
    return images, _Windows(network, process, protocol.pad_to)


class _Axis(NamedTuple):
    """One window along one axis.

    Attributes:
        begin: First pixel of the window in the view.
        end: First pixel after the window.
        out: Output pixels that the window contributes to; empty if there are none.
        place: Function that returns ``R @ S``, (length of ``out``, end - begin). It is called when
            the window is computed, because the matrices of all windows together would be larger
            than the image.
    """

    begin: int
    end: int
    out: slice
    place: Callable[[], Tensor]


class _Windows(NamedTuple):
    """A network behind preprocessing and padding, to be applied to single windows."""

    network: ClassMaps
    preprocess: Preprocess | None
    pad_to: int | None

    def __call__(self, window: Tensor) -> Tensor:
        """Return class maps (B, num_classes, h, w) of a window (B, C, H, W), padding included."""
        if self.preprocess is not None:
            window = self.preprocess(window)
        missing = self.missing(window)
        return self.network(F.pad(window, (0, missing[1], 0, missing[0])))

    def class_maps(self, window: Tensor) -> Tensor:
        """Return class maps with the classes last, (B, h, w, num_classes), of at least 32 bits."""
        output = self(window)
        precise = output.float() if output.dtype.itemsize < 4 else output
        return precise.permute(0, 2, 3, 1).contiguous()

    def missing(self, window: Tensor) -> list[int]:
        """Return the number of rows and columns that padding adds to a window."""
        return [
            _multiple(side, self.pad_to) - side if self.pad_to else 0 for side in window.shape[2:]
        ]


class View:
    """One view of the images. A row of windows is computed when a band first overlaps it.

    Args:
        protocol: Windows, strides and weights.
        network: Network to apply to each window.
        images: Images at the size of the view, (B, C, H, W), not mirrored.
        flipped: Whether windows are mirrored for the network and their class maps mirrored back.
        size: Height and width of the output in pixels.
    """

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
        # Index of a row of windows -> output columns, class maps and resizing of its windows.
        self.opened: dict[int, list[tuple[slice, Tensor, SeparableMap]]] = {}

    def class_maps(self, rows: slice) -> Tensor:
        """Return a band of output rows, (B, R, width, num_classes).

        Bands must be requested from top to bottom: rows of windows above ``rows`` are freed.
        """
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
        """Run the network on one row of windows and keep its class maps in :attr:`opened`."""
        row, width = self.axes[0][index], self.images.shape[3]
        opened = []
        for column in self.axes[1]:
            if column.out.stop == 0:
                continue
            begin, end = column.begin, column.end
            if self.flipped:  # begin and end count from the right of the image
                begin, end = width - end, width - begin
            window = self.images[:, :, row.begin : row.end, begin:end]
            if self.flipped:
                window = window.flip(3)
            missing = self.network.missing(window)
            maps = self.network.class_maps(window)
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


def _resize(images: Tensor, size: Size, antialias: bool) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(
        images, size=size, mode="bilinear", align_corners=False, antialias=antialias
    )


def _multiple(side: int, divisor: int) -> int:
    return math.ceil(side / divisor) * divisor


def window_axes(length: int, window: int, stride: int, out: int, weighting: str) -> list[_Axis]:
    """Return the windows along one axis of a view, with their place in the output.

    As in the reference, there are ``max(length - window + stride - 1, 0) // stride + 1`` windows,
    and the last one is moved back into the image. ``length=10, window=4, stride=4``::

        pixels     0 1 2 3 4 5 6 7 8 9
        window 0   =======
        window 1           =======
        window 2               =======      moved back by 2

    Args:
        length: Length of the view in pixels.
        window: Length of the windows in pixels.
        stride: Step of the windows in pixels.
        out: Length of the output in pixels.
        weighting: ``"uniform"`` or ``"hann"``, see :class:`Inference`.
    """
    window = min(window, length)
    number = max(length - window + stride - 1, 0) // stride + 1
    begins = [min(step * stride, length - window) for step in range(number)]
    weights = torch.ones(window, dtype=torch.float64)
    if weighting == "hann":
        # Leave out the zeros at both ends, so that pixels at the image's border have a weight.
        weights = torch.hann_window(window + 2, periodic=False, dtype=torch.float64)[1:-1]
    total = torch.zeros(length, dtype=torch.float64)
    for begin in begins:
        total[begin : begin + window] += weights
    first, second, share = bilinear_taps(length, out)
    axes = []
    for begin in begins:
        end = begin + window
        # Keep only the output rows that the window contributes to: the matrix of the whole axis
        # would grow with the square of the image's side.
        used = _within(first, begin, end) & (share != 1) | _within(second, begin, end) & (
            share != 0
        )
        rows = used.nonzero().ravel()
        # A much smaller output can skip all pixels of a window.
        extent = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        share_of_window = weights / total[begin:end]
        axes.append(
            _Axis(begin, end, extent, partial(_place, length, out, extent, begin, share_of_window))
        )
    return axes


def _place(length: int, out: int, extent: slice, begin: int, weights: Tensor) -> Tensor:
    """Return ``R @ S`` of one window, the rows ``extent`` of the output only."""
    columns = slice(begin, begin + len(weights))
    return bilinear_matrix(length, out, extent, columns) * weights


def _within(values: Tensor, begin: int, end: int) -> Tensor:
    return (values >= begin) & (values < end)
