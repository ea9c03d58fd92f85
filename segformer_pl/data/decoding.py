"""From the cells of a data set to pixels: images and label images, as they were stored.

Images and labels are turned as their own EXIF orientation says, each by itself: a label without one
is taken to be drawn on the upright image, as annotation tools show it. Where image and label
differ, :func:`check_orientation` says so.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from segformer_pl.data.label_diagnosis import Coding
from segformer_pl.errors import UserError

LABEL_FORMATS = ("PNG", "TIFF", "GIF", "BMP")  # those whose stored values can be told for sure
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # compressions, as Pillow names them
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

# What Pillow's readers raise on damaged files, each in its own way.
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error)

cv2.setNumThreads(0)  # loader processes are the parallelism


def cell_bytes(
    cell: dict[str, Any] | bytes | None, where: str, read_file: Callable[[str], bytes]
) -> bytes:
    """The encoded picture of a cell: bytes, or what an ``Image`` column holds.

    Args:
        cell: The cell.
        where: Which it is, for messages.
        read_file: Reads a file that the cell names in place of bytes, or raises
            :class:`UserError`.

    Raises:
        UserError: There is none.
    """
    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
    if not encoded and isinstance(cell, dict) and cell.get("path"):
        try:
            encoded = read_file(cell["path"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if not encoded:
        raise UserError(
            f"{where}: the row holds no picture; remove the row from the shards or fill it in"
        )
    return encoded


class EncodedImage:
    """A picture that is decoded when its pixels are asked for, at the size that is needed.

    Any file becomes three channels of 8 bits. Grey is repeated; of 16 bits per channel the upper 8
    are kept, so 0 to 65535 is the whole range, and what a camera of 12 bits stores without scaling
    it comes out dark. Transparency is dropped: what counts is the colour below it. Of several
    frames or pages the first is read. A picture is turned as its EXIF orientation says, which is
    how viewers show it. Colour profiles are not applied.

    Args:
        encoded: The file.
        where: Which picture this is, for messages.

    Attributes:
        size: Height and width in pixels, upright.
        stored_size: The same before turning.
        orientation: EXIF orientation, 1 to 8; 1, upright, where the file states none.
        num_frames: Frames or pages in the file, of which the first is read.

    Raises:
        UserError: It is no picture, one whose values have no known range (32-bit integers,
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
        # Pillow turns these negatives into positives, but not those of 16 bits.
        self._is_negative = self._is_deep and _is_white_zero(header)
        self._is_jpeg = header.format == "JPEG"
        self._is_plain = (
            header.format in ("JPEG", "PNG")
            and header.mode in ("RGB", "L")
            and self.orientation == 1
        )

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read an image file.

        Raises:
            UserError: It cannot be read, or is no image; see the class.
        """
        try:
            encoded = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: it cannot be read ({error.strerror})") from error
        return cls(encoded, str(file))

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
                levels = (np.asarray(image) >> 8).astype(np.uint8)
                image = Image.fromarray(255 - levels if self._is_negative else levels)
            pixels = np.array(image.convert("RGB"))
        return pixels

    def frames_notice(self) -> str | None:
        """A sentence about what is not read, if the file holds more than one frame."""
        if self.num_frames == 1:
            return None
        return (
            f"{self.where}: the image file holds {self.num_frames} frames or pages, of which the "
            "first is read; store them one by one if the others count"
        )

    def _decode_fast(self, reduce: int) -> npt.NDArray[np.uint8] | None:
        """By OpenCV, in less time than Pillow; None for what it does not know, or is damaged."""
        if not self._is_plain:
            return None
        size = REDUCED[reduce] if self._is_jpeg else REDUCED[1]
        flags = size | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(self.encoded, np.uint8), flags)  # type: ignore[return-value]


@dataclass(frozen=True)
class RawLabel:
    """A label image as it was stored, upright.

    Attributes:
        values: (H, W) whole numbers, of palette images the indices; or (H, W, 3) uint8 RGB where
            the file holds colours, or colours were asked for.
        palette: RGB of every index, (N, 3) uint8; None where there is none, or it was applied.
        orientation: EXIF orientation, 1 to 8; 1, upright, where the file states none.
        stored_size: Height and width in pixels before turning.
    """

    values: npt.NDArray[Any]
    palette: npt.NDArray[np.uint8] | None
    orientation: int
    stored_size: tuple[int, int]


def decode_label(encoded: bytes, where: str, coding: Coding = "values") -> RawLabel:
    """A label image, with the very numbers that the file stores.

    Readers are made for images to look at: grey of 1, 2 and 4 bits is stretched to 0 to 255, 16
    bits per colour are cut to 8, signed numbers are taken for unsigned. Here the stored values come
    back, or the file is refused.

    Args:
        encoded: The file: PNG, TIFF, GIF or BMP.
        where: Which label image this is, for messages.
        coding: Whether its values or its colours stand for classes. With ``"colors"`` palettes are
            applied, and alpha is dropped where it is opaque.

    Raises:
        UserError: It is no image, a damaged one, of a lossy format or one that may rescale values,
            has several frames or pages, or stores what classes cannot be read from.
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


# Palette index: its colour, and the label where that occurred first.
FirstColors = dict[int, tuple[tuple[int, ...], str]]


class PaletteColors:
    """The colours that indices of palette labels stand for, to notice when two files disagree.

    Indices are counted as they are, whatever their colours. Files that a program wrote each with a
    palette of its own may use one index for different classes, and only the palettes tell.
    """

    def __init__(self) -> None:
        self._first: FirstColors = {}

    def compare(self, label: RawLabel, where: str) -> tuple[str | None, FirstColors]:
        """Compare a label with those before.

        Args:
            label: Of any kind; only one with a palette is looked at, and of that the indices that
                occur.
            where: Which sample this is.

        Returns:
            A sentence if an index has another colour than in a label before; and the indices that
            occur for the first time, which another object can :meth:`merge`.
        """
        if label.palette is None:
            return None, {}
        pixels = cv2.calcHist([label.values], [0], None, [256], [0, 256]).ravel()
        indices = np.flatnonzero(pixels[: len(label.palette)]).tolist()
        colors = {index: (tuple(label.palette[index].tolist()), where) for index in indices}
        new = {index: color for index, color in colors.items() if index not in self._first}
        return self._merge(colors), new

    def merge(self, colors: FirstColors, split: str) -> str | None:
        """Compare what other objects saw first, such as those of loader processes.

        Args:
            colors: What :meth:`compare` returned there.
            split: Of which split, for the sentence.

        Returns:
            A sentence if an index has another colour than in a label before.
        """
        return self._merge(
            {
                index: (tuple(color), f"{where} of the {split} split")
                for index, (color, where) in colors.items()
            }
        )

    def _merge(self, colors: FirstColors) -> str | None:
        for index, (color, where) in colors.items():
            first_color, first = self._first.setdefault(index, (color, where))
            if color != first_color:
                return (
                    f"{where}: index {index} of the label's palette is the colour {color}, but "
                    f"{first_color} in {first}; indices count as they are: if the colours stand "
                    "for the classes, set labels.coding: colors"
                )
        return None


def _check_format(image: Image.Image, encoded: bytes, where: str, coding: Coding) -> None:
    """Refuse label files whose values change on their way through a reader or a writer."""
    cause = None
    bits = _bits(image, encoded)
    if image.format in ("JPEG", "MPO"):
        cause = "is a JPEG, which changes values along every border"
    elif image.format not in LABEL_FORMATS:
        cause = f"is a {image.format} file, of a format that may change values"
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
            cause = f"has 16 bits in each channel (mode {image.mode}), and colours have 8"
        elif image.mode not in ("LA", "La", "RGB", "RGBA", "PA"):
            cause = f"stores {image.mode}, neither values nor RGB"
    if cause:
        raise UserError(f"{where}: the label image {cause}; store labels as PNG")


def _opaque_colors(image: Image.Image, where: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB of an image that hides nothing."""
    pixels = np.array(image.convert("RGBA"))
    num_clear = np.count_nonzero(pixels[..., 3] != 255)
    if num_clear:
        raise UserError(
            f"{where}: {num_clear} pixels of the label image are transparent or half transparent, "
            "and what colour they stand for is not certain; store labels as RGB without alpha"
        )
    return np.ascontiguousarray(pixels[..., :3])


def check_orientation(image: EncodedImage, label: RawLabel, where: str) -> str | None:
    """Whether image and label agree about which way is up.

    Returns:
        None if they do. A sentence to warn with if only the image has an EXIF orientation and the
        sizes do not tell whether the label was drawn on the upright image, as is assumed, or on
        the stored one.

    Raises:
        UserError: The label was drawn on the stored image, or has an orientation that the image
            does not have.
    """
    if label.orientation == image.orientation:
        return None
    stated = f"the image has the EXIF orientation {image.orientation}"
    remedy = "write both upright and without an EXIF orientation"
    if label.orientation != 1:
        raise UserError(
            f"{where}: {stated} and the label {label.orientation} (1 is upright), so they do not "
            f"lie on each other; {remedy}"
        )
    if label.stored_size == image.size != image.stored_size:
        return None
    if label.stored_size == image.stored_size != image.size:
        (height, width), (upright_height, upright_width) = image.stored_size, image.size
        raise UserError(
            f"{where}: {stated} and is {upright_height}x{upright_width} when upright, but the "
            f"label, which has none, is {height}x{width} (height x width): it was drawn on the "
            f"image as stored; {remedy}"
        )
    return (
        f"{where}: {stated} and the label has none: it is taken to be drawn on the upright image; "
        f"if it was drawn on the image as stored, {remedy}"
    )


def _open(encoded: bytes, where: str) -> Image.Image:
    with _reading(encoded, where):
        return Image.open(BytesIO(encoded))


def _orientation(image: Image.Image) -> int:
    # Asking a PNG for EXIF data that its header does not announce would decode it.
    announced = "exif" in image.info or image.format == "TIFF"
    stated = image.getexif().get(ExifTags.Base.Orientation, 1) if announced else 1
    return stated if stated in range(1, 9) else 1


def _num_frames(image: Image.Image) -> int:
    """Frames of an animation or pages of a TIFF; smaller copies of a page do not count."""
    num_frames = getattr(image, "n_frames", 1)
    # The images behind the first of a MPO, which cameras write, are previews and gain maps.
    if num_frames == 1 or image.format == "MPO":
        return 1
    if image.format == "TIFF":
        num_copies = 0
        for page in range(1, num_frames):
            image.seek(page)
            num_copies += image.tag_v2.get(254, 0) & 1  # type: ignore[attr-defined]
        image.seek(0)
        num_frames -= num_copies
    return num_frames


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels, before turning."""
    if image.format == "TIFF":  # Pillow's size of it is that after turning
        return image.tag_v2[257], image.tag_v2[256]  # type: ignore[attr-defined]
    return image.size[::-1]


def _bits(image: Image.Image, encoded: bytes) -> int:
    """Of a channel; of a pixel in BMP."""
    if image.format == "PNG":
        return encoded[24]  # of the header, which comes first
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
        is_turned = _orientation(image) != 1
        image.load()
        return ImageOps.exif_transpose(image) if is_turned else image


@contextmanager
def _reading(encoded: bytes, where: str) -> Iterator[None]:
    """One sentence for whatever Pillow raises."""
    try:
        yield
    except UserError:  # has a better sentence; DAMAGED includes ValueError
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where}: the header announces more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} "
            "pixels; cut the picture into parts, or replace it if it is damaged"
        ) from error
    except DAMAGED as error:
        raise UserError(
            f"{where}: the {len(encoded)} bytes are no picture, or a damaged one; replace them"
        ) from error
