"""From the cells of a data set to pixels: pictures and label images, as they were stored."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from segformer_pl.data.labels import DataError

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def cell_bytes(cell: dict[str, Any] | bytes | None, where: str) -> bytes:
    """The encoded picture of a cell: bytes, or what an ``Image`` column holds.

    Raises:
        DataError: there is none.
    """
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if not encoded and isinstance(cell, dict) and cell.get("path"):
        try:
            encoded = Path(cell["path"]).read_bytes()
        except OSError as error:
            raise DataError(
                f"{where}: the row names the file {cell['path']!r}, which cannot be read; store "
                "the pictures in the shards"
            ) from error
    if not encoded:
        raise DataError(
            f"{where}: the row holds no picture; remove the row from the shards or fill it in"
        )
    return encoded


class EncodedImage:
    """A picture that is decoded when its pixels are asked for, at the size that is needed.

    Args:
        encoded: The file.
        where: Which picture this is, for messages.

    Attributes:
        size: Height and width in pixels, upright.

    Raises:
        DataError: it is no picture, or one with more than 8 bits per channel.
    """

    def __init__(self, encoded: bytes, where: str) -> None:
        self.encoded = encoded
        self.where = where
        header = _open(encoded, where)
        if header.mode.startswith(("I", "F")):  # converting would clip them to white
            raise DataError(
                f"{where}: the image has more than 8 bits per channel (mode {header.mode}); store "
                "it with 8"
            )
        self.size = header.size if _orientation(header) in TRANSPOSED else header.size[::-1]
        self._header: Image.Image | None = header

    def decode(self, reduce: int = 1) -> npt.NDArray[np.uint8]:
        """The pixels, (H, W, 3) RGB, upright.

        Args:
            reduce: 2, 4 or 8 for a JPEG of half the size and so on, rounded up, at a part of the
                cost: each pixel is the mean of a square. Other formats come in full size.
        """
        image, self._header = self._header or _open(self.encoded, self.where), None
        if reduce > 1 and image.format == "JPEG":
            image.draft(None, (image.width // reduce, image.height // reduce))
        return np.array(_upright(image, self.encoded, self.where).convert("RGB"))


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
    try:
        return Image.open(BytesIO(encoded))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _damaged(encoded, where) from error


def _orientation(image: Image.Image) -> int:
    # Asking a PNG for EXIF data that its header does not announce would decode it.
    announced = "exif" in image.info or image.format == "TIFF"
    return image.getexif().get(ExifTags.Base.Orientation, 1) if announced else 1


def _upright(image: Image.Image, encoded: bytes, where: str) -> Image.Image:
    try:
        orientation = _orientation(image)
        image.load()
    except (OSError, SyntaxError) as error:  # PIL's SyntaxError for a broken PNG
        raise _damaged(encoded, where) from error
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _damaged(encoded: bytes, where: str) -> DataError:
    return DataError(
        f"{where}: the {len(encoded)} bytes are no picture, or a damaged one; replace them"
    )
