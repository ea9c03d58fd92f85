"""From the cells of a data set to pixels: pictures and label images, as they were stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from segformer_pl.data.labels import DataError

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

# What Pillow's readers raise on damaged files, each in its own way.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError)

cv2.setNumThreads(0)  # loader processes are the parallelism


def cell_bytes(
    cell: dict[str, Any] | bytes | None, where: str, read_file: Callable[[str], bytes]
) -> bytes:
    """The encoded picture of a cell: bytes, or what an ``Image`` column holds.

    Args:
        cell: The cell.
        where: Which it is, for messages.
        read_file: Reads a file that the cell names in place of bytes, or raises
            :class:`DataError`.

    Raises:
        DataError: there is none.
    """
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if not encoded and isinstance(cell, dict) and cell.get("path"):
        try:
            encoded = read_file(cell["path"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if not encoded:
        raise DataError(
            f"{where}: the row holds no picture; remove the row from the shards or fill it in"
        )
    return encoded


class EncodedImage:
    """A picture that is decoded when its pixels are asked for, at the size that is needed.

    Any file becomes three channels of 8 bits. Grey is repeated; of 16 bits per channel the upper 8
    are kept, so 0 to 65535 is the whole range, and what a camera of 12 bits stores without scaling
    it comes out dark. Transparency is dropped: what counts is the colour below it. Of several
    frames the first is read. A picture is turned as its EXIF orientation says, which is how
    viewers show it. Colour profiles are not applied.

    Args:
        encoded: The file.
        where: Which picture this is, for messages.

    Attributes:
        size: Height and width in pixels, upright.

    Raises:
        DataError: it is no picture, one whose values have no known range (32-bit integers,
            floating point), or one with more pixels than Pillow opens.
    """

    def __init__(self, encoded: bytes, where: str) -> None:
        self.encoded = encoded
        self.where = where
        header = _open(encoded, where)
        # Mode I holds the 16 bits of these formats, in others 32.
        self._is_deep = header.mode.startswith("I;16") or (
            header.mode == "I" and header.format in ("PNG", "PPM")
        )
        if header.mode.startswith(("I", "F")) and not self._is_deep:
            raise DataError(
                f"{where}: the image holds numbers without a known range (32-bit integers or "
                f"floating point, mode {header.mode}); store it with 8 or 16 bits per channel"
            )
        with _reading(encoded, where):
            orientation = _orientation(header)
        self.size = header.size if orientation in TRANSPOSED else header.size[::-1]
        self._is_jpeg = header.format == "JPEG"
        self._is_plain = (
            header.format in ("JPEG", "PNG") and header.mode in ("RGB", "L") and orientation == 1
        )

    def decode(self, reduce: int = 1) -> npt.NDArray[np.uint8]:
        """The pixels, (H, W, 3) RGB, upright.

        Args:
            reduce: 2, 4 or 8 for a JPEG of half the size and so on, rounded up, at a part of the
                cost: each pixel is the mean of a square. Other formats, and turned pictures, come
                in full size.
        """
        pixels = self._decode_fast(reduce)
        if pixels is None:
            image = _upright(_open(self.encoded, self.where), self.encoded, self.where)
            if self._is_deep:  # Pillow's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.array(image.convert("RGB"))
        return pixels

    def _decode_fast(self, reduce: int) -> npt.NDArray[np.uint8] | None:
        """By OpenCV, in less time than Pillow; None for what it does not know, or is damaged."""
        if not self._is_plain:
            return None
        size = REDUCED[reduce] if self._is_jpeg else REDUCED[1]
        flags = size | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(self.encoded, np.uint8), flags)  # type: ignore[return-value]


def decode_label(encoded: bytes, where: str) -> npt.NDArray[Any]:
    """The raw values of a label image, upright.

    Returns:
        (H, W) whole numbers, of palette images the indices; or (H, W, 3) uint8 where colours stand
        for classes.

    Raises:
        DataError: it is no picture, a damaged one, or one of a lossy format.
    """
    image = _open(encoded, where)
    if image.format == "JPEG":
        raise DataError(
            f"{where}: the label image is a JPEG, which changes values along every border; store "
            "labels as PNG"
        )
    return np.array(_upright(image, encoded, where))


def _open(encoded: bytes, where: str) -> Image.Image:
    with _reading(encoded, where):
        return Image.open(BytesIO(encoded))


def _orientation(image: Image.Image) -> int:
    # Asking a PNG for EXIF data that its header does not announce would decode it.
    announced = "exif" in image.info or image.format == "TIFF"
    return image.getexif().get(ExifTags.Base.Orientation, 1) if announced else 1


def _upright(image: Image.Image, encoded: bytes, where: str) -> Image.Image:
    with _reading(encoded, where):
        orientation = _orientation(image)
        image.load()
        return image if orientation == 1 else ImageOps.exif_transpose(image)


@contextmanager
def _reading(encoded: bytes, where: str) -> Iterator[None]:
    """One sentence for whatever Pillow raises."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{where}: the header announces more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} "
            "pixels; cut the picture into parts, or replace it if it is damaged"
        ) from error
    except DAMAGED as error:
        raise DataError(
            f"{where}: the {len(encoded)} bytes are no picture, or a damaged one; replace them"
        ) from error
