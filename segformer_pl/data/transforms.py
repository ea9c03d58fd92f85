"""Transforms from an encoded image and its train ids to tensors: the paper's training pipeline.

Steps and order are those of the reference configurations (paper Sec. 4.1): random scale, random
crop, horizontal flip, photometric distortion, normalisation, padding. The task normalises, so the
padding here has the colour that normalisation maps to 0. Arithmetic is OpenCV's, as in the
reference: bilinear interpolation without antialiasing, nearest neighbour for labels, and 8-bit HSV
with hue in 0 to 179.

The reference scales the whole image and then crops. Here the crop is drawn first, so that its
pixels can be computed alone wherever that is faster than scaling the whole image::

    reference   decode -> resize whole image -> crop -> flip -> ...
    here        draw scale and crop -> decode (a JPEG at 1/2, 1/4 or 1/8 if it is scaled down)
                -> resample the crop, or resize and crop -> flip -> ...

Both give the same pixels up to rounding, except that JPEG images decoded at a reduced size have
less aliasing.
"""

import cv2
import numpy as np
import numpy.typing as npt
import torch

from segformer_pl.data.decoding import EncodedImage
from segformer_pl.errors import UserError
from segformer_pl.normalization import IMAGENET_MEAN

RGBImage = npt.NDArray[np.uint8]  # (H, W, 3)
BandImage = npt.NDArray[np.uint8]  # (H, W, num_bands); the first three bands are RGB
TrainIds = npt.NDArray[np.integer]  # (H, W)
ImageAndLabel = tuple[torch.Tensor, torch.Tensor]  # (num_bands, H, W), (H, W)

# Of each band. RGB is normalised to 0 by the task; in a fourth band, 0 is transparent or no data.
PADDING = (*IMAGENET_MEAN, 0.0)
CAT_MAX_RATIO = 0.75  # upper limit of the share of one class in a crop
CROP_TRIES = 10  # crops that are checked; the one after them is used unchecked
WARP_COST = 6  # time per pixel of warpAffine divided by that of resize, measured


def to_tensors(image: EncodedImage, label: TrainIds, rng: np.random.Generator) -> ImageAndLabel:
    """Convert the whole image and its label to tensors, without augmentation.

    Args:
        image: The encoded image.
        label: (H, W) train ids.
        rng: Not used; part of the signature that all transforms share.

    Returns:
        Image (num_bands, H, W) float32 in 0 to 1, label (H, W) int64.
    """
    return to_image_and_label(image.decode(), label)


def to_image_and_label(pixels: BandImage, label: TrainIds) -> ImageAndLabel:
    """Convert a decoded image and its train ids to tensors, see :func:`to_tensors`."""
    return _to_float(pixels), torch.from_numpy(label.astype(np.int64))


class TrainTransforms:
    """Training transforms: random scale, crop, flip, photometric distortion and padding.

    Args:
        crop_size: Height and width of the crop in pixels; None for the whole image.
        scale_range: Lower and upper (excluded) limit of the uniformly distributed random scale;
            None for no scaling.
        base_size: Long and short side in pixels of the box that the image is fitted into at scale
            1, such as (2048, 512) for ADE20K; None for the image's own size.
        photometric: Whether to distort brightness, contrast, saturation and hue of the first three
            bands, RGB. A further band is no colour and keeps its values.
        ignore_index: Label of the padding, and of pixels that do not count when a crop is checked
            for the share of one class.

    Raises:
        UserError: The limits of ``scale_range`` are not positive or not in ascending order.
    """

    def __init__(
        self,
        crop_size: tuple[int, int] | None,
        scale_range: tuple[float, float] | None,
        base_size: tuple[int, int] | None,
        photometric: bool,
        ignore_index: int,
    ) -> None:
        if scale_range is not None and not 0 < scale_range[0] <= scale_range[1]:
            raise UserError(
                f"data.scale_range {list(scale_range)}: give two factors above 0 in ascending order"
            )
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.base_size = base_size
        self.photometric = photometric
        self.ignore_index = ignore_index

    def __call__(
        self, image: EncodedImage, label: TrainIds, rng: np.random.Generator
    ) -> ImageAndLabel:
        """Augment an image and its label.

        Args:
            image: The encoded image.
            label: (H, W) train ids of the image's size.
            rng: Source of all random numbers.

        Returns:
            Image (num_bands, h, w) float32 in 0 to 1 and label (h, w) int64, where (h, w) is
            ``crop_size``, or the scaled size without a crop.
        """
        height, width = self._draw_size(image.size, rng)
        top, left, rows, columns, cropped = self._draw_crop(label, height, width, rng)
        pixels = _resample(image, height, width, top, left, rows, columns)
        if rng.random() < 0.5:
            pixels, cropped = cv2.flip(pixels, 1), cropped[:, ::-1]  # type: ignore[assignment]
        if self.photometric:
            pixels = _distort_rgb(pixels, rng)
        return self._pad(pixels, cropped)

    def _draw_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """Draw the height and width that the whole image is scaled to."""
        scale = 1.0 if self.scale_range is None else rng.uniform(*self.scale_range)
        if self.base_size is not None:
            long, short = (int(side * scale) for side in self.base_size)
            scale = min(long / max(size), short / min(size))
        height, width = (max(int(side * scale + 0.5), 1) for side in size)
        return height, width

    def _draw_crop(
        self, label: TrainIds, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int, TrainIds]:
        """Draw a crop in which no class reaches a share of :data:`CAT_MAX_RATIO`.

        As in the reference, :data:`CROP_TRIES` crops are checked. If none passes, the next one is
        used unchecked.

        Args:
            label: (H, W) train ids of the stored image.
            height: Height in pixels of the scaled image.
            width: Width in pixels of the scaled image.
            rng: Source of the random numbers.

        Returns:
            Top and left corner in the scaled image, height and width of the crop, and its train
            ids.
        """
        rows, columns = (height, width) if self.crop_size is None else self.crop_size
        rows, columns = min(rows, height), min(columns, width)
        for tries in range(CROP_TRIES + 1):
            top = int(rng.integers(height - rows + 1))
            left = int(rng.integers(width - columns + 1))
            cropped = _nearest(label, height, width, top, left, rows, columns)
            if self.crop_size is None or (tries < CROP_TRIES and self._is_mixed(cropped)):
                break
        return top, left, rows, columns, cropped

    def _is_mixed(self, cropped: TrainIds) -> bool:
        """Return whether every class covers less than ``CAT_MAX_RATIO`` of the labelled pixels."""
        if cropped.dtype == np.uint8:  # calcHist is several times as fast as bincount
            counts = cv2.calcHist([cropped], [0], None, [256], [0, 256]).ravel()
        else:
            counts = np.bincount(cropped.ravel())
        counts[self.ignore_index : self.ignore_index + 1] = 0
        return bool(np.count_nonzero(counts) > 1 and counts.max() < CAT_MAX_RATIO * counts.sum())

    def _pad(self, pixels: BandImage, cropped: TrainIds) -> ImageAndLabel:
        """Convert to tensors, then pad on the right and at the bottom.

        The padding is added in float, since the mean is not a whole number of 8-bit levels.
        """
        rows, columns = cropped.shape
        padded_size = self.crop_size or cropped.shape
        if padded_size == cropped.shape:
            return to_image_and_label(pixels, cropped)
        padding = torch.tensor(PADDING[: pixels.shape[2]])
        image = padding.view(-1, 1, 1).expand(-1, *padded_size).clone()
        image[:, :rows, :columns] = _to_float(pixels)
        label = torch.full(padded_size, self.ignore_index)
        label[:rows, :columns] = torch.from_numpy(cropped.astype(np.int64))
        return image, label


def _resample(
    image: EncodedImage, height: int, width: int, top: int, left: int, rows: int, columns: int
) -> BandImage:
    """Scale the image to (height, width) and return a crop of it.

    Two equivalent ways exist, and the cheaper one is used: resize the whole image and crop, or
    sample the pixels of the crop alone with an affine transform.

    A JPEG is decoded at 1/2, 1/4 or 1/8 if it is scaled down at least that much. Its pixels are
    then means of squares, of which plain bilinear sampling would pick single pixels, so the result
    has less aliasing.

    Args:
        image: The encoded image.
        height: Height in pixels of the scaled image.
        width: Width in pixels of the scaled image.
        top: First row of the crop in the scaled image.
        left: First column of the crop in the scaled image.
        rows: Height in pixels of the crop.
        columns: Width in pixels of the crop.

    Returns:
        (rows, columns, num_bands) uint8.
    """
    stored = image.size
    if (height, width) == stored:
        return image.decode()[top : top + rows, left : left + columns]
    reduce = max(r for r in (1, 2, 4, 8) if r == 1 or max(height, width) * r <= max(stored))
    pixels = image.decode(reduce)
    if pixels.shape[:2] == stored:
        if height * width < WARP_COST * rows * columns:
            scaled = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
            return scaled[top : top + rows, left : left + columns]  # type: ignore[return-value]
        reduce = 1
    # Align pixel centres, as cv2.resize does: output pixel x samples input (x + 0.5) * scale - 0.5.
    down, right = (old / new / reduce for old, new in zip(stored, (height, width)))
    matrix = np.array(
        [
            [right, 0, (left + 0.5) * right - 0.5],
            [0, down, (top + 0.5) * down - 0.5],
        ]
    )
    return cv2.warpAffine(  # type: ignore[return-value]
        pixels,
        matrix,
        (columns, rows),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _nearest(
    label: TrainIds, height: int, width: int, top: int, left: int, rows: int, columns: int
) -> TrainIds:
    """Scale a label to (height, width) by nearest neighbour and return a crop of it."""
    if (height, width) == label.shape:
        return label[top : top + rows, left : left + columns]
    down = _nearest_indices(label.shape[0], height)[top : top + rows]
    right = _nearest_indices(label.shape[1], width)[left : left + columns]
    return label[down].take(right, axis=1)


def _nearest_indices(old: int, new: int) -> npt.NDArray[np.int64]:
    """Return the source index of each of ``new`` pixels, as ``cv2.INTER_NEAREST`` computes it.

    OpenCV multiplies by the rounded inverse of the rounded scale factor. If ``i * old / new`` is a
    whole number, rounding may give the index before it. This happens in a few rows, for one pair
    of sizes in 25.

    Args:
        old: Number of source pixels along the axis.
        new: Number of target pixels along the axis.

    Returns:
        (new,) indices in 0 to ``old - 1``.
    """
    indices = (np.arange(new) * (1 / (new / old))).astype(np.int64)
    return np.minimum(indices, old - 1)


def _distort_rgb(pixels: BandImage, rng: np.random.Generator) -> BandImage:
    """Apply :func:`distort` to the first three bands and leave the others as they are."""
    if pixels.shape[2] == 3:
        return distort(pixels, rng)
    rgb = distort(np.ascontiguousarray(pixels[..., :3]), rng)
    return np.concatenate([rgb, pixels[..., 3:]], axis=2)


def distort(pixels: RGBImage, rng: np.random.Generator) -> RGBImage:
    """Apply the photometric distortion of the reference.

    Each step is applied with probability 1/2::

        brightness    + U(-32, 32)
        contrast      * U(0.5, 1.5)   here or after hue, with equal probability
        saturation    * U(0.5, 1.5)
        hue           + integer in -18 to 17, modulo 180

    Every step clips to 0 to 255 and truncates. The reference documents a random swap of channels
    but does not apply one.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        rng: Source of the random numbers.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    levels = np.arange(256, dtype=np.float32)
    table = levels
    if rng.random() < 0.5:
        table = _truncate(table + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        table = _truncate(table * np.float32(rng.uniform(0.5, 1.5)))
    if table is not levels:
        pixels = cv2.LUT(pixels, table.astype(np.uint8))  # type: ignore[assignment]
    if rng.random() < 0.5:
        pixels = _in_hsv(pixels, 1, _truncate(levels * np.float32(rng.uniform(0.5, 1.5))))
    if rng.random() < 0.5:
        pixels = _in_hsv(pixels, 0, (levels + int(rng.integers(-18, 18))) % 180)
    if not contrast_first and rng.random() < 0.5:
        table = _truncate(levels * np.float32(rng.uniform(0.5, 1.5)))
        pixels = cv2.LUT(pixels, table.astype(np.uint8))  # type: ignore[assignment]
    return pixels


def _truncate(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Clip to 0 to 255 and drop the decimals, as the reference's conversion to uint8 does."""
    return np.trunc(np.clip(levels, 0, 255))


def _in_hsv(pixels: RGBImage, channel: int, table: npt.NDArray[np.float32]) -> RGBImage:
    """Map hue (channel 0, values 0 to 179) or saturation (channel 1) by a lookup table."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    mapped = cv2.LUT(cv2.extractChannel(hsv, channel), table.astype(np.uint8))
    cv2.insertChannel(mapped, hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)  # type: ignore[return-value]


def _to_float(pixels: BandImage) -> torch.Tensor:
    """Convert (H, W, num_bands) uint8 to (num_bands, H, W) float32 in 0 to 1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
