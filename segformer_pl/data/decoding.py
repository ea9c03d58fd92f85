"""Decoding of the cells of a data set: images to RGB or four bands, labels to stored values.

An image and its label are each rotated by their own EXIF orientation. A label without an
orientation is assumed to be drawn on the upright image, as annotation tools show it.
:func:`check_orientation` reports pairs whose orientations differ.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Self

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from segformer_pl.data.label_diagnosis import Coding
from segformer_pl.data.tiff import deep_bands, not_four_bands, readable_tiff
from segformer_pl.errors import UserError, counted

LABEL_FORMATS = ("PNG", "TIFF", "GIF", "BMP")  # formats whose stored values can be recovered
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # Pillow's names of lossy compressions
NumBands = Literal[3, 4]  # that images are read with
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

# Pillow's readers raise any of these on damaged files.
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error)

cv2.setNumThreads(0)  # samples are decoded in parallel by data-loader workers instead


def cell_bytes(cell: Any, where: str, read_file: Callable[[str], bytes]) -> bytes:
    """Return the encoded image of a cell.

    Args:
        cell: Encoded bytes, or the dict of a ``datasets.Image`` column with ``bytes`` or ``path``.
        where: Name of the cell in error messages.
        read_file: Function that reads a file by its path; used if the cell holds a path and no
            bytes. Raises :class:`UserError` if the file cannot be read.

    Raises:
        UserError: The cell is empty or holds another type, or its file cannot be read.
    """
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if encoded is not None and not isinstance(encoded, bytes):
        raise UserError(
            f"{where}: the row holds {str(encoded)[:40]!r}, of type {type(encoded).__name__}, and "
            "no encoded image; store the bytes of the image file, or give the folder of the files "
            "as images/ and labels/ to data.path"
        )
    if not encoded and isinstance(cell, dict) and cell.get("path"):
        try:
            encoded = read_file(cell["path"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not encoded:
        raise UserError(
            f"{where}: the row holds no image; remove the row from the shards or fill it in"
        )
    return encoded


class EncodedImage:
    """An encoded image, decoded on request and, for a JPEG, at a reduced size.

    With three bands, every file is decoded to RGB of 8 bits:

    - Grey is repeated over the channels.
    - Of 16 bits per channel, the upper 8 are kept: the range is taken to be 0 to 65535. A 12-bit
      camera image that was stored without scaling is therefore dark.
    - Alpha and every other further band is dropped; the colour below alpha is kept.

    With four bands, the file has to store four bands of 8 bits: a TIFF, whose fourth band may be
    alpha or anything else, or a PNG or the like with an alpha channel. Their values are those that
    the file stores. Other files are refused.

    In either case:

    - Only the first of several frames or pages is read.
    - The image is rotated by its EXIF orientation, as image viewers do.
    - Colour profiles are not applied.

    Args:
        encoded: Contents of the image file.
        where: Name of the image in error messages.
        num_bands: Number of bands to read: 3, RGB, or 4.

    Attributes:
        size: Height and width in pixels of the upright image.
        stored_size: Height and width in pixels before rotation.
        orientation: EXIF orientation, 1 to 8; 1 (upright) if the file states none.
        num_frames: Number of frames or pages in the file.
        num_stored_bands: Number of bands in the file.

    Raises:
        UserError: The file is not an image, its values have no known range (32-bit integers,
            floating point), its bands are not those that are to be read, or it has more pixels than
            Pillow opens.
    """

    def __init__(self, encoded: bytes, where: str, num_bands: NumBands = 3) -> None:
        with _reading(encoded, where):
            encoded, num_tiff_bands = readable_tiff(encoded, num_bands, where)
        self.encoded = encoded
        self.where = where
        self.num_bands = num_bands
        header = _open(encoded, where)
        self.num_stored_bands = num_tiff_bands or len(header.getbands())
        if num_bands == 4 and header.mode != "RGBA":
            what = f"{counted(self.num_stored_bands, 'band')} (mode {header.mode})"
            raise not_four_bands(what, where)
        if num_bands == 4 and _bits(header, encoded) != 8:
            raise deep_bands(_bits(header, encoded), where)
        # Pillow opens 16-bit PNG and PPM in mode I, which holds 32 bits in other formats.
        self._is_deep = header.mode.startswith("I;16") or (
            header.mode == "I" and header.format in ("PNG", "PPM")
        )
        if header.mode.startswith(("I", "F")) and not self._is_deep:
            raise UserError(
                f"{where}: the image holds numbers without a known range (32-bit integers or "
                f"floating point, mode {header.mode}); store it with 8 or 16 bits per channel"
            )
        with _reading(encoded, where):
            self.orientation = _orientation(header)
            self.num_frames = _num_frames(header)
            self.stored_size = _stored_size(header)
        is_transposed = self.orientation in TRANSPOSED
        self.size = self.stored_size[::-1] if is_transposed else self.stored_size
        # Pillow inverts white-is-zero images of 8 bits but not of 16, so decode() inverts those.
        self._is_negative = self._is_deep and _is_white_zero(header)
        self._is_jpeg = header.format == "JPEG"
        self._has_rgb = header.mode in ("RGB", "RGBA")
        self._is_plain = (
            header.format in ("JPEG", "PNG")
            and header.mode in ("RGB", "L")
            and self.orientation == 1
        )

    @classmethod
    def read(cls, file: Path, num_bands: NumBands = 3) -> Self:
        """Read an image file.

        Args:
            file: Path of the file, also its name in error messages.
            num_bands: Number of bands to read: 3, RGB, or 4.

        Raises:
            UserError: The file cannot be read, or the class refuses it.
        """
        try:
            encoded = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{file}: it cannot be read ({error.strerror}); check its access rights"
            ) from error
        return cls(encoded, str(file), num_bands)

    def decode(self, reduce: int = 1) -> npt.NDArray[np.uint8]:
        """Decode the image.

        Args:
            reduce: Divisor of height and width: 1, 2, 4 or 8. It applies to upright JPEG images,
                which take less time to decode at a reduced size: each pixel is the mean of a
                square of ``reduce`` pixels, and sizes are rounded up. Other images are decoded at
                full size.

        Returns:
            The upright image, (H, W, num_bands) uint8; the first three bands are RGB.

        Raises:
            UserError: The file is damaged.
        """
        pixels = self._decode_fast(reduce)
        if pixels is None:
            image = _upright(_open(self.encoded, self.where), self.encoded, self.where)
            if self._is_deep:  # Pillow's own conversion would clip at 255
                levels = (np.asarray(image) >> 8).astype(np.uint8)
                image = Image.fromarray(255 - levels if self._is_negative else levels)
            pixels = np.array(image if self.num_bands == 4 else image.convert("RGB"))
        return pixels

    def frames_notice(self) -> str | None:
        """Return a warning if the file holds several frames or pages, else None."""
        if self.num_frames == 1:
            return None
        return (
            f"{self.where}: the image file holds {self.num_frames} frames or pages, of which only "
            "the first is read; if the others matter, store each as its own image"
        )

    def bands_notice(self) -> str | None:
        """Return a warning if the file holds RGB and further bands that are not read, else None."""
        if self.num_stored_bands <= self.num_bands or not self._has_rgb:
            return None
        return (
            f"{self.where}: the image file holds {self.num_stored_bands} bands, of which the first "
            "3 are read as RGB; data.num_bands 4 reads all of 4 bands, alpha too"
        )

    def _decode_fast(self, reduce: int) -> npt.NDArray[np.uint8] | None:
        """Decode with OpenCV, faster than Pillow; None for other kinds of file and damaged ones."""
        if not self._is_plain:
            return None
        size = REDUCED[reduce] if self._is_jpeg else REDUCED[1]
        flags = size | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(self.encoded, np.uint8), flags)  # type: ignore[return-value]


@dataclass(frozen=True)
class RawLabel:
    """The stored values of a label image, rotated upright.

    Attributes:
        values: (H, W) integers, for palette images the indices; or (H, W, 3) uint8 RGB if the file
            holds colours or was decoded with ``coding="colors"``.
        palette: (N, 3) uint8 RGB of every index; None if the file has no palette or the palette
            was applied.
        orientation: EXIF orientation, 1 to 8; 1 (upright) if the file states none.
        stored_size: Height and width in pixels before rotation.
    """

    values: npt.NDArray[Any]
    palette: npt.NDArray[np.uint8] | None
    orientation: int
    stored_size: tuple[int, int]


def decode_label(encoded: bytes, where: str, coding: Coding = "values") -> RawLabel:
    """Decode a label image to exactly the values that the file stores.

    Image readers convert values for display: they stretch grey of 1, 2 and 4 bits to 0 to 255, cut
    16 bits per colour to 8, and read signed integers as unsigned. This function undoes such a
    conversion, or refuses the file if it cannot be undone.

    Args:
        encoded: Contents of a PNG, TIFF, GIF or BMP file.
        where: Name of the label image in error messages.
        coding: Whether the values (``"values"``) or the colours (``"colors"``) stand for classes.
            With ``"colors"``, palettes are applied and opaque alpha is dropped.

    Raises:
        UserError: The file is not an image or is damaged, its format is lossy or may rescale
            values, it has several frames or pages, or it stores values that cannot stand for
            classes.
    """
    image = _open(encoded, where)
    with _reading(encoded, where):
        _check_format(image, encoded, where, coding)
        stored_size, bits, is_signed = _stored_size(image), _bits(image, encoded), _is_signed(image)
        orientation = _orientation(image)
        num_frames = _num_frames(image)
    if num_frames > 1:
        raise UserError(
            f"{where}: the label file holds {num_frames} frames or pages, of which only the first "
            "would be read; store each label as one image, with a value for every class"
        )
    image = _upright(image, encoded, where)
    palette = None
    if coding == "colors" and image.mode in ("RGB", "RGBA", "P", "PA"):
        values = _opaque_colors(image, where)
    else:
        values = np.array(image)
        if image.mode == "1":
            values = values.astype(np.uint8)
        elif image.mode == "L" and bits in (2, 4):
            values //= 255 // ((1 << bits) - 1)
        elif image.mode == "L" and is_signed:
            values = values.view(np.int8)
        elif image.mode == "I" and bits == 32 and not is_signed:
            values = values.view(np.uint32)
        elif image.mode == "P":
            palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return RawLabel(values, palette, orientation, stored_size)


def _check_format(image: Image.Image, encoded: bytes, where: str, coding: Coding) -> None:
    """Refuse label files whose values may change when they are written or read."""
    cause = None
    bits = _bits(image, encoded)
    if image.format in ("JPEG", "MPO"):
        cause = "is a JPEG, which changes values along every border"
    elif image.format not in LABEL_FORMATS:
        cause = f"is a {image.format} file, a format that may change values"
    elif image.format == "TIFF" and image.info.get("compression") in LOSSY_TIFF:
        cause = "is a TIFF with lossy compression, which changes values along every border"
    elif _is_white_zero(image):
        cause = (
            "is a TIFF whose 0 means white (PhotometricInterpretation 0); some programs read the "
            "stored values from it and others their negative"
        )
    elif image.format == "GIF" and image.mode == "P" and coding == "values":
        cause = (
            "is a GIF, whose writers renumber the palette, so that indices differ from file to file"
        )
    elif image.format == "BMP" and bits not in (8, 24):
        cause = f"is a BMP of {bits} bits per pixel, which programs read in different ways"
    elif image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;"):
        if bits == 16:
            cause = f"has 16 bits in each channel (mode {image.mode}), but colours need 8"
        elif image.mode not in ("LA", "La", "RGB", "RGBA", "PA"):
            cause = f"stores {image.mode}, neither values nor RGB"
    if cause:
        raise UserError(f"{where}: the label image {cause}; store labels as PNG")


def _opaque_colors(image: Image.Image, where: str) -> npt.NDArray[np.uint8]:
    """Return the (H, W, 3) RGB of an opaque image; refuse transparent pixels."""
    pixels = np.array(image.convert("RGBA"))
    num_transparent = np.count_nonzero(pixels[..., 3] != 255)
    if num_transparent:
        raise UserError(
            f"{where}: {num_transparent} pixels of the label image are transparent or half "
            "transparent, so their colour is ambiguous; store labels as RGB without alpha"
        )
    return np.ascontiguousarray(pixels[..., :3])


def check_orientation(image: EncodedImage, label: RawLabel, where: str) -> str | None:
    """Check that an image and its label have the same EXIF orientation.

    If only the image has one, the label may be drawn on the upright image (assumed) or on the
    image as stored. Orientations that swap height and width show which, unless the image is
    square::

        image stored 4x6, orientation 6 (upright 6x4)    label 6x4: drawn on the upright image
                                                         label 4x6: drawn on the stored one, refused

    Args:
        image: The image.
        label: Its label image.
        where: Name of the sample in messages.

    Returns:
        None if the two agree; a warning if the sizes do not show what the label was drawn on.

    Raises:
        UserError: The label was drawn on the image as stored, or its orientation is not that of
            the image.
    """
    if label.orientation == image.orientation:
        return None
    stated = f"the image has the EXIF orientation {image.orientation}"
    remedy = "write both upright and without an EXIF orientation"
    if label.orientation != 1:
        raise UserError(
            f"{where}: {stated} and the label {label.orientation} (1 is upright), so they are not "
            f"aligned; {remedy}"
        )
    if label.stored_size == image.size != image.stored_size:
        return None
    if label.stored_size == image.stored_size != image.size:
        (height, width), (upright_height, upright_width) = image.stored_size, image.size
        raise UserError(
            f"{where}: {stated} and is {upright_height}x{upright_width} when upright, but the "
            f"label, which has no orientation, is {height}x{width} (height x width): it was drawn "
            f"on the image as stored; {remedy}"
        )
    return (
        f"{where}: {stated} and the label has none: the label is assumed to be drawn on the "
        f"upright image; if it was drawn on the image as stored, {remedy}"
    )


def _open(encoded: bytes, where: str) -> Image.Image:
    with _reading(encoded, where):
        return Image.open(BytesIO(encoded))


def _orientation(image: Image.Image) -> int:
    # For a PNG without EXIF data in its header, getexif() would decode the whole file.
    has_exif = "exif" in image.info or image.format == "TIFF"
    stated = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
    return stated if stated in range(1, 9) else 1


def _num_frames(image: Image.Image) -> int:
    """Count the frames of an animation or the pages of a TIFF, without reduced copies of a page."""
    num_frames = getattr(image, "n_frames", 1)
    # In the MPO files of cameras, images after the first are previews and gain maps.
    if num_frames == 1 or image.format == "MPO":
        return 1
    if image.format == "TIFF":
        num_copies = 0
        for page in range(1, num_frames):
            image.seek(page)
            # Bit 0 of NewSubfileType (tag 254) marks a reduced-resolution copy.
            num_copies += image.tag_v2.get(254, 0) & 1  # type: ignore[attr-defined]
        image.seek(0)
        num_frames -= num_copies
    return num_frames


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width in pixels before rotation."""
    if image.format == "TIFF":  # Pillow reports the size after rotation
        return image.tag_v2[257], image.tag_v2[256]  # type: ignore[attr-defined]
    return image.size[::-1]


def _bits(image: Image.Image, encoded: bytes) -> int:
    """Return the bits per channel, for BMP the bits per pixel."""
    if image.format == "PNG":
        return encoded[24]  # bit depth in the IHDR chunk, which always comes first
    if image.format == "TIFF":
        return image.tag_v2.get(258, (1,))[0]  # type: ignore[attr-defined]
    if image.format == "BMP":
        return int.from_bytes(encoded[28:30], "little")
    return 8


def _is_signed(image: Image.Image) -> bool:
    return image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 2  # type: ignore[attr-defined]


def _is_white_zero(image: Image.Image) -> bool:
    return image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]


def _upright(image: Image.Image, encoded: bytes, where: str) -> Image.Image:
    with _reading(encoded, where):
        is_rotated = _orientation(image) != 1
        image.load()
        return ImageOps.exif_transpose(image) if is_rotated else image


@contextmanager
def _reading(encoded: bytes, where: str) -> Iterator[None]:
    """Turn every exception of Pillow into a :class:`UserError`."""
    try:
        yield
    except UserError:  # a ValueError, which DAMAGED would catch
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where}: the header announces more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} "
            "pixels; cut the image into parts, or replace the file if it is damaged"
        ) from error
    except DAMAGED as error:
        raise UserError(
            f"{where}: the {len(encoded)} bytes are not an image, or a damaged one; replace the "
            "file"
        ) from error
