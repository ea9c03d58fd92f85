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
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from segformer_pl.upsampling import SeparableMap, bands, bilinear_matrix

Network = Callable[[Tensor], Tensor]
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
    def labels(self, network: Network, images: Tensor, size: Size) -> Tensor:
        """The most likely class of every pixel.

        Args:
            network: ``images -> logits`` at any stride, in evaluation mode.
            images: (B, C, H, W), normalised.
            size: Height and width of the result in pixels.

        Returns:
            (B, height, width) int64 train ids.
        """
        labels = images.new_empty(len(images), *size, dtype=torch.int64)
        for rows, band, _ in self._bands(network, images, size):
            labels[:, rows] = _most_likely(band)
        return labels

    @torch.no_grad()
    def probabilities(self, network: Network, images: Tensor, size: Size) -> Tensor:
        """Probabilities of all classes, (B, num_classes, height, width); full size, so large.

        Arguments are those of :meth:`labels`.
        """
        parts = [
            band if normalised else band.softmax(3)
            for _, band, normalised in self._bands(network, images, size)
        ]
        return torch.cat(parts, dim=1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def pixels(self, network: Network, images: Tensor, labels: Tensor, ignore_index: int) -> Pixels:
        """Predictions, confidence and losses at the size of the labels.

        Args:
            network: See :meth:`labels`.
            images: (B, C, H, W), normalised.
            labels: (B, H', W') int64 train ids; their size need not be that of the images.
            ignore_index: The label that does not count.
        """
        ignored = labels == ignore_index
        targets = labels.masked_fill(ignored, 0)
        found: Pixels | None = None
        for rows, band, normalised in self._bands(network, images, (*labels.shape[1:],)):
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
        self, network: Network, images: Tensor, size: Size
    ) -> Iterator[tuple[slice, Tensor, bool]]:
        """Bands of rows (B, R, width, num_classes): logits (False), or probabilities (True)."""
        views = [
            _View(self, network, images, scale, flipped, size)
            for scale in self.scales
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
        place: (output size, end - begin), what of it goes where.
    """

    begin: int
    end: int
    place: Tensor


class _View:
    """One view of the pictures; its windows are computed when a band first lies in them."""

    def __init__(
        self,
        settings: Inference,
        network: Network,
        images: Tensor,
        scale: float,
        flipped: bool,
        size: Size,
    ) -> None:
        stored: Any = tuple(images.shape[2:])
        view_size = settings._view_size(stored, scale)
        views = _resize(images, view_size)
        if settings.resize_to is not None:
            height, width = (_multiple(side, settings.resize_to) for side in view_size)
            views = _resize(views, (height, width))
        self.images = views.flip(3) if flipped else views
        self.network = network
        self.pad_to = settings.pad_to
        height, width = self.images.shape[2:]
        window, stride = settings.window or (height, width), settings.stride or (height, width)
        self.axes = [
            _windows(*numbers, settings.window_weights)
            for numbers in zip((height, width), window, stride, size)
        ]
        if flipped:
            self.axes[1] = [axis._replace(place=axis.place.flip(0)) for axis in self.axes[1]]
        self.size = size
        self.opened: dict[int, list[tuple[slice, Tensor, SeparableMap]]] = {}
        # Output rows and columns that a window has a part in.
        self.rows = [_extent(axis.place) for axis in self.axes[0]]
        self.columns = [_extent(axis.place) for axis in self.axes[1]]
        first = next(index for index, extent in enumerate(self.rows) if extent.stop)
        self._open(first)
        self.num_classes = self.opened[first][0][1].shape[3]

    def logits(self, rows: slice) -> Tensor:
        """(B, R, width, num_classes) at the wanted size; bands must come from top to bottom."""
        total: Tensor | None = None
        for index, extent in enumerate(self.rows):
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
        row, extent = self.axes[0][index], self.rows[index]
        opened = []
        for column, columns in zip(self.axes[1], self.columns):
            if columns.stop == 0:
                continue
            window = self.images[:, :, row.begin : row.end, column.begin : column.end]
            missing = [
                _multiple(side, self.pad_to) - side if self.pad_to else 0
                for side in window.shape[2:]
            ]
            logits = self.network(F.pad(window, (0, missing[1], 0, missing[0])))
            precise = logits.float() if logits.dtype.itemsize < 4 else logits
            maps = precise.permute(0, 2, 3, 1).contiguous()
            rows, across = (
                axis.place[out] @ bilinear_matrix(cells, side + more)[:side]
                for axis, out, cells, side, more in zip(
                    (row, column), (extent, columns), maps.shape[1:3], window.shape[2:], missing
                )
            )
            opened.append((columns, maps, SeparableMap(rows, across, like=maps)))
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


def _extent(place: Tensor) -> slice:
    used = place.any(dim=1).nonzero().ravel().tolist()
    # A window between the pixels that a much smaller output samples has none.
    return slice(used[0], used[-1] + 1) if used else slice(0, 0)


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
    resize = bilinear_matrix(length, out)
    return [
        _Axis(
            begin,
            begin + window,
            resize[:, begin : begin + window] * (weights / total[begin : begin + window]),
        )
        for begin in begins
    ]
