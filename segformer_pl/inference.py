"""From a picture to one class per pixel: the test protocols of the paper (Sec. 4.1).

A picture is looked at in one or several views (scales, flipped or not), each view whole or in
windows. The logits of a view are at the network's stride; every step from there to the wanted
size is linear and separable: upsampling to the view's size, weighting and adding up overlapping
windows, cutting off padding, turning a flip back, resizing to the wanted size. So one small matrix
for the rows and one for the columns of each window hold all of it, and the result is read band by
band. Nothing of full size is kept for all classes at once, and of the windows only those that the
band at hand lies in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from segformer_pl.upsampling import SeparableMap, bands, bilinear_matrix, bilinear_taps

Network = Callable[[Tensor], Tensor]
Preprocess = Callable[[Tensor], Tensor]
Size = tuple[int, int]


class Pixels(NamedTuple):
    """What is known of every pixel.

    Attributes:
        labels: (B, H, W) int64, the most likely train id.
        confidence: (B, H, W) its probability, float32 (or float64).
        losses: (B, H, W) minus the logarithm of the probability of the true label, in nats; 0
            where it is ignored.
    """

    labels: Tensor
    confidence: Tensor
    losses: Tensor


class Inference:
    """How pictures are looked at. By default whole, once, at their own size.

    The paper's protocols: for ADE20K ``base_size=(2048, 512), resize_to=32``; for Cityscapes
    ``window=(1024, 1024), stride=(768, 768)``; "multi-scale" is ``scales=(0.75, 0.875, 1, 1.125,
    1.25), flip=True`` for ADE20K and ``(0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)`` for Cityscapes.

    Args:
        base_size: Long and short side in pixels that pictures are fitted into at scale 1, keeping
            their ratio; their own size by default.
        resize_to: Stretch both sides up to multiples of this, by a second bilinear resize (the
            reference's AlignedResize, with 32), so that no key or value is lost at the border.
        pad_to: Pad every view or window at the bottom and on the right up to multiples of this,
            with the mean colour, for the same purpose; the padding is cut off again.
        window: Height and width of sliding windows; a smaller picture is looked at whole.
        stride: Step of the windows, down and to the right; the last of them is moved back into
            the picture. Default: two thirds of the window.
        window_weights: How overlapping windows are averaged: alike (``"uniform"``, the paper's),
            or with weights that fall to the windows' borders like a raised cosine (``"hann"``).
        scales: Factors of the views' sizes; probabilities are averaged over the views.
        flip: Whether to add the mirrored picture to every scale.

    Raises:
        ValueError: the settings contradict each other; the message says which.
    """

    def __init__(
        self,
        base_size: tuple[PositiveInt, PositiveInt] | None = None,
        resize_to: PositiveInt | None = None,
        pad_to: PositiveInt | None = None,
        window: tuple[PositiveInt, PositiveInt] | None = None,
        stride: tuple[PositiveInt, PositiveInt] | None = None,
        window_weights: Literal["uniform", "hann"] = "uniform",
        scales: Sequence[PositiveFloat] = (1.0,),
        flip: bool = False,
    ) -> None:
        if resize_to is not None and pad_to is not None:
            raise ValueError(
                f"inference: resize_to {resize_to} and pad_to {pad_to} are two ways to the same "
                "end; give one of them"
            )
        if window is None and (stride is not None or window_weights != "uniform"):
            raise ValueError(
                "inference: stride and window_weights are about sliding windows, but there is no "
                "window; give its height and width too"
            )
        if not scales:
            raise ValueError("inference: scales is empty; give at least one, such as [1.0]")
        if window is not None and stride is None:
            stride = (max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1))
        if (
            window is not None
            and stride is not None
            and any(step > side for step, side in zip(stride, window))
        ):
            raise ValueError(
                f"inference: a stride of {list(stride)} leaves gaps between windows of "
                f"{list(window)}; give at most the window's size"
            )
        self.base_size = base_size
        self.resize_to = resize_to
        self.pad_to = pad_to
        self.window = window
        self.stride = stride
        self.window_weights = window_weights
        self.scales = scales
        self.flip = flip

    @torch.no_grad()
    def labels(
        self,
        network: Network,
        images: Tensor,
        size: Size,
        preprocess: Preprocess | None = None,
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """The most likely class of every pixel.

        Args:
            network: ``images -> logits`` at any stride, in evaluation mode.
            images: (B, C, H, W), as the network or ``preprocess`` takes them.
            size: Height and width of the result in pixels.
            preprocess: Function of what the network is given: the image, or one window after the
                other, so that a large image of 8 bits needs no second one of floating point.
                Images that are resized to another size pass through it before that, whole.
            dtype: Of the result.

        Returns:
            (B, height, width) train ids.
        """
        labels = images.new_empty(len(images), *size, dtype=dtype)
        for rows, band, _ in self._bands(network, images, size, preprocess):
            labels[:, rows] = _most_likely(band)
        return labels

    @torch.no_grad()
    def probabilities(
        self,
        network: Network,
        images: Tensor,
        size: Size,
        preprocess: Preprocess | None = None,
    ) -> Tensor:
        """Probabilities of all classes, (B, num_classes, height, width); full size, so large.

        Arguments are those of :meth:`labels`.
        """
        found: Tensor | None = None
        for rows, band in self.probability_bands(network, images, size, preprocess):
            if found is None:
                found = band.new_empty(len(band), *size, band.shape[3])
            found[:, rows] = band
        assert found is not None
        return found.permute(0, 3, 1, 2)

    @torch.no_grad()
    def probability_bands(
        self,
        network: Network,
        images: Tensor,
        size: Size,
        preprocess: Preprocess | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Probabilities of all classes in bands of rows, from top to bottom.

        Arguments are those of :meth:`labels`.

        Yields:
            The rows, and their probabilities (B, R, width, num_classes).
        """
        for rows, band, normalised in self._bands(network, images, size, preprocess):
            yield rows, band if normalised else band.softmax(3)

    @torch.no_grad()
    def pixels(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        ignore_index: int,
        preprocess: Preprocess | None = None,
    ) -> Pixels:
        """Predictions, confidence and losses at the size of the labels.

        Args:
            network: See :meth:`labels`.
            images: Likewise.
            labels: (B, H', W') int64 train ids; their size need not be that of the images.
            ignore_index: The label that does not count.
            preprocess: See :meth:`labels`.
        """
        ignored = labels == ignore_index
        targets = labels.masked_fill(ignored, 0)
        found: Pixels | None = None
        size: Any = tuple(labels.shape[1:])
        for rows, band, normalised in self._bands(network, images, size, preprocess):
            if found is None:
                confidence, losses = (band.new_empty(labels.shape) for _ in range(2))
                found = Pixels(torch.empty_like(labels), confidence, losses)
            probabilities = band if normalised else band.softmax(3)
            own = band.gather(3, targets[:, rows, :, None]).squeeze(3)
            most = probabilities.amax(3)
            found.labels[:, rows] = _most_likely(band)
            found.confidence[:, rows] = most
            found.losses[:, rows] = (
                -own.clamp(min=torch.finfo(own.dtype).tiny).log()
                if normalised
                else band.amax(3) - most.log() - own
            )
        assert found is not None
        found.losses.masked_fill_(ignored, 0)
        return found

    def _bands(
        self, network: Network, images: Tensor, size: Size, preprocess: Preprocess | None
    ) -> Iterator[tuple[slice, Tensor, bool]]:
        """Bands of rows (B, R, width, num_classes): logits (False), or probabilities (True)."""
        views = []
        for scale in self.scales:
            # Both views of a scale share one image.
            scaled, windows = self._scaled(network, images, scale, preprocess)
            views += [
                _View(self, windows, scaled, flipped, size)
                for flipped in ((False, True) if self.flip else (False,))
            ]
        channels = len(images) * views[0].num_classes
        for _, rows in bands(1, *size, channels, images.device.type):
            if len(views) == 1:
                yield rows, views[0].logits(rows), False
                continue
            total = views[0].logits(rows).softmax(3)
            for view in views[1:]:
                total += view.logits(rows).softmax(3)
            yield rows, total / len(views), True

    def _scaled(
        self, network: Network, images: Tensor, scale: float, preprocess: Preprocess | None
    ) -> tuple[Tensor, "_Windows"]:
        """The images at the size of a view, and the network of what is cut out of them."""
        stored: Any = tuple(images.shape[2:])
        sizes = [self._view_size(stored, scale)]
        if self.resize_to is not None:
            height, width = (_multiple(side, self.resize_to) for side in sizes[0])
            sizes.append((height, width))
        if preprocess is None or all(size == stored for size in sizes):
            process = preprocess
        else:  # resizing 8 bits would round
            images, process = preprocess(images), None
        for size in sizes:
            images = _resize(images, size)
        return images, _Windows(network, process, self.pad_to)

    def _view_size(self, size: Size, scale: float) -> Size:
        """Size of a view: fitted into the base size, as mmcv rounds it."""
        if self.base_size is not None:
            long, short = (int(side * scale) for side in self.base_size)
            scale = min(long / max(size), short / min(size))
        height, width = (max(int(side * scale + 0.5), 1) for side in size)
        return height, width


class _Axis(NamedTuple):
    """One window along one axis.

    Attributes:
        begin, end: The window in the view, in pixels.
        out: Where in the output it has a part; empty if nowhere.
        place: Function that makes the matrix (length of ``out``, end - begin) of what of it goes
            where. Those of all windows together would weigh more than the image.
    """

    begin: int
    end: int
    out: slice
    place: Callable[[], Tensor]


class _Windows(NamedTuple):
    """A network that is given windows as they are cut out."""

    network: Network
    preprocess: Preprocess | None
    pad_to: int | None

    def __call__(self, window: Tensor) -> Tensor:
        if self.preprocess is not None:
            window = self.preprocess(window)
        missing = self.missing(window)
        return self.network(F.pad(window, (0, missing[1], 0, missing[0])))

    def missing(self, window: Tensor) -> list[int]:
        """Rows and columns of padding."""
        return [
            _multiple(side, self.pad_to) - side if self.pad_to else 0 for side in window.shape[2:]
        ]


class _View:
    """One view of the pictures; its windows are computed when a band first lies in them."""

    def __init__(
        self,
        settings: Inference,
        network: _Windows,
        images: Tensor,
        flipped: bool,
        size: Size,
    ) -> None:
        self.images = images
        self.flipped = flipped
        self.network = network
        height, width = self.images.shape[2:]
        window, stride = settings.window or (height, width), settings.stride or (height, width)
        self.axes = [
            _windows(*numbers, settings.window_weights)
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
        first = next(index for index, row in enumerate(self.axes[0]) if row.out.stop)
        self._open(first)
        self.num_classes = self.opened[first][0][1].shape[3]

    def logits(self, rows: slice) -> Tensor:
        """(B, R, width, num_classes) at the wanted size; bands must come from top to bottom."""
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
            logits = self.network(window)
            precise = logits.float() if logits.dtype.itemsize < 4 else logits
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


def _windows(length: int, window: int, stride: int, out: int, weighting: str) -> list[_Axis]:
    """The windows along one axis of the view, and where each goes in the output.

    As in the reference: ``max(length - window + stride - 1, 0) // stride + 1`` windows, the last
    moved back into the picture.
    """
    window = min(window, length)
    number = max(length - window + stride - 1, 0) // stride + 1
    begins = [min(step * stride, length - window) for step in range(number)]
    weights = torch.ones(window, dtype=torch.float64)
    if weighting == "hann":
        # Without its zeros at both ends, so that pixels at the picture's border count too.
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
