"""From an encoded picture and its train ids to tensors: the paper's training pipeline.

The steps and their order are those of the reference configurations (paper Sec. 4.1): random scale,
random crop, horizontal flip, photometric distortion, normalisation, padding. Normalisation is the
task's, so padding here is the colour that it maps to 0. The arithmetic is OpenCV's, which the
reference uses: bilinear without antialiasing, nearest labels, HSV of 8 bits with hue in 0 to 179.

The crop is drawn first and resampled straight from the stored picture, unless scaling all of it is
the cheaper way to the same pixels; a JPEG that is to become small is decoded small.
"""

import cv2
import numpy as np
import numpy.typing as npt
import torch

from segformer_pl.data.decoding import EncodedImage
from segformer_pl.errors import UserError
from segformer_pl.normalization import IMAGENET_MEAN

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB
TrainIds = npt.NDArray[np.integer]  # (H, W)
ImageAndLabel = tuple[torch.Tensor, torch.Tensor]  # (3, H, W), (H, W)

PADDING = IMAGENET_MEAN  # the colour that the task normalises to 0
CAT_MAX_RATIO = 0.75
CROP_TRIES = 10  # crops that are checked; the one after them is taken as it is
WARP_COST = 6  # measured: time per pixel of warpAffine over that of resize


def to_tensors(image: EncodedImage, label: TrainIds, rng: np.random.Generator) -> ImageAndLabel:
    """The whole picture as it is; nothing is drawn.

    Returns:
        Image (3, H, W) float32 RGB in 0 to 1, label (H, W) int64.
    """
    return to_image_and_label(image.decode(), label)


def to_image_and_label(pixels: Pixels, label: TrainIds) -> ImageAndLabel:
    """Pixels and train ids as tensors, see :func:`to_tensors`."""
    return _to_float(pixels), torch.from_numpy(label.astype(np.int64))


class TrainTransforms:
    """Random scale, crop, flip and photometric distortion, padded to the crop size.

    Args:
        crop_size: Height and width of the crop in pixels; None for the whole picture.
        scale_range: Limits of the random scale, drawn uniformly, the upper one excluded; None for
            no scaling.
        base_size: Long and short side in pixels that the picture is fitted into at scale 1, such
            as (2048, 512) for ADE20K; None for its own size.
        photometric: Whether to distort brightness, contrast, saturation and hue.
        ignore_index: Label of the padding; it does not count for the crop either.

    Raises:
        UserError: The limits of the scale are not positive or not in order.
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
                f"data.scale_range {list(scale_range)}: give two factors above 0, the smaller one "
                "first"
            )
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.base_size = base_size
        self.photometric = photometric
        self.ignore_index = ignore_index

    def __call__(
        self, image: EncodedImage, label: TrainIds, rng: np.random.Generator
    ) -> ImageAndLabel:
        """Draw a sample.

        Args:
            image: The picture.
            label: (H, W) train ids, of the picture's size.
            rng: Where every random number comes from.

        Returns:
            Image (3, h, w) float32 RGB in 0 to 1, label (h, w) int64, both of the crop size, or
            without one of the scaled size.
        """
        height, width = self._draw_size(image.size, rng)
        top, left, rows, columns, kept = self._draw_crop(label, height, width, rng)
        pixels = _resample(image, height, width, top, left, rows, columns)
        if rng.random() < 0.5:
            pixels, kept = cv2.flip(pixels, 1), kept[:, ::-1]  # type: ignore[assignment]
        if self.photometric:
            pixels = distort(pixels, rng)
        return self._pad(pixels, kept)

    def _draw_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        scale = 1.0 if self.scale_range is None else rng.uniform(*self.scale_range)
        if self.base_size is not None:
            long, short = (int(side * scale) for side in self.base_size)
            scale = min(long / max(size), short / min(size))
        height, width = (max(int(side * scale + 0.5), 1) for side in size)
        return height, width

    def _draw_crop(
        self, label: TrainIds, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int, TrainIds]:
        """A crop that no class fills to more than :data:`CAT_MAX_RATIO`, if tries find one.

        As in the reference, the crop that is drawn after the last one that was checked is taken
        whatever it holds.
        """
        rows, columns = (height, width) if self.crop_size is None else self.crop_size
        rows, columns = min(rows, height), min(columns, width)
        for tries in range(CROP_TRIES + 1):
            top = int(rng.integers(height - rows + 1))
            left = int(rng.integers(width - columns + 1))
            kept = _nearest(label, height, width, top, left, rows, columns)
            if self.crop_size is None or (tries < CROP_TRIES and self._is_mixed(kept)):
                break
        return top, left, rows, columns, kept

    def _is_mixed(self, kept: TrainIds) -> bool:
        if kept.dtype == np.uint8:  # several times as fast as bincount
            counts = cv2.calcHist([kept], [0], None, [256], [0, 256]).ravel()
        else:
            counts = np.bincount(kept.ravel())
        counts[self.ignore_index : self.ignore_index + 1] = 0
        return bool(np.count_nonzero(counts) > 1 and counts.max() < CAT_MAX_RATIO * counts.sum())

    def _pad(self, pixels: Pixels, kept: TrainIds) -> ImageAndLabel:
        """On the right and at the bottom, after the conversion to float: exactly the mean."""
        rows, columns = kept.shape
        padded_size = self.crop_size or kept.shape
        if padded_size == kept.shape:
            return to_image_and_label(pixels, kept)
        image = torch.tensor(PADDING).view(3, 1, 1).expand(3, *padded_size).clone()
        image[:, :rows, :columns] = _to_float(pixels)
        label = torch.full(padded_size, self.ignore_index)
        label[:rows, :columns] = torch.from_numpy(kept.astype(np.int64))
        return image, label


def _resample(
    image: EncodedImage, height: int, width: int, top: int, left: int, rows: int, columns: int
) -> Pixels:
    """The crop of the picture scaled to (height, width), by the cheaper of two equal ways.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where it is scaled down at least as far. Its pixels are
    then means of squares, which plain bilinear sampling would pick single pixels from: the same
    picture with less aliasing.
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
    # Pixel centres, as in the plain order: output pixel x lies at (x + 0.5) * scale - 0.5.
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
    if (height, width) == label.shape:
        return label[top : top + rows, left : left + columns]
    down = _nearest_indices(label.shape[0], height)[top : top + rows]
    right = _nearest_indices(label.shape[1], width)[left : left + columns]
    return label[down].take(right, axis=1)


def _nearest_indices(old: int, new: int) -> npt.NDArray[np.int64]:
    """(new,) which of ``old`` pixels each takes its value from, as ``cv2.INTER_NEAREST`` has it.

    OpenCV multiplies by the rounded inverse of the rounded factor. Where ``i * old / new`` is a
    whole number it can so come to the pixel before: in a few rows, for one pair of sizes in 25.
    """
    indices = (np.arange(new) * (1 / (new / old))).astype(np.int64)
    return np.minimum(indices, old - 1)


def distort(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """The reference's photometric distortion, on (H, W, 3) uint8 RGB.

    Each with probability 1/2: brightness plus U(-32, 32); contrast times U(0.5, 1.5), before or
    after the next two; saturation times U(0.5, 1.5); hue plus an integer of -18 to 17 of 180.
    Every step clips to 0 to 255 and truncates. The reference does not exchange channels, though
    its documentation says so.
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
    return np.trunc(np.clip(levels, 0, 255))


def _in_hsv(pixels: Pixels, channel: int, table: npt.NDArray[np.float32]) -> Pixels:
    """Map hue (channel 0, 0 to 179) or saturation (channel 1) by a table."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    mapped = cv2.LUT(cv2.extractChannel(hsv, channel), table.astype(np.uint8))
    cv2.insertChannel(mapped, hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)  # type: ignore[return-value]


def _to_float(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
