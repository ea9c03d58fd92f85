"""The bands of a TIFF: what its tags state, and how Pillow reads all four of them.

Pillow returns four bands of 8 bits as they are stored only if the tags say that they are RGB and
unassociated alpha. Otherwise it drops the fourth, divides the others by it, or opens the first
alone::

    PhotometricInterpretation   ExtraSamples        Pillow 13 reads
    2  RGB                      2  unassociated     four bands as stored
    2  RGB                      1  associated       RGB divided by the fourth band
    2  RGB                      0  unspecified      RGB
    1  black is zero            0 0 0               nothing, or the first band as grey

So :func:`readable_tiff` changes these two tags before Pillow sees the file.
"""

import struct
from io import BytesIO
from typing import NamedTuple

from PIL import TiffImagePlugin

from segformer_pl.errors import UserError, counted

CLASSIC, BIG = 42, 43  # the number after the byte order: offsets of 32 or of 64 bits
# Tags
NUM_BITS, PHOTOMETRIC, NUM_BANDS, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 277, 338, 339
STRIP_BYTES, TILE_BYTES = 279, 325  # in files of strips and of tiles
BLACK_IS_ZERO, RGB = 1, 2
UNASSOCIATED_ALPHA = 2
UNSIGNED = 1  # whole numbers of at least 0
SHORT = 3  # type of a tag of 16 bits


class _Bands(NamedTuple):
    """What the tags of a TIFF's first page state about its bands.

    Attributes:
        number: Number of bands.
        bits: Bits of a value; of the widest band if they differ.
        is_unsigned: Whether values are whole numbers of at least 0.
        photometric: PhotometricInterpretation, such as :data:`RGB`.
    """

    number: int
    bits: int
    is_unsigned: bool
    photometric: int


def readable_tiff(encoded: bytes, num_bands: int, where: str) -> tuple[bytes, int | None]:
    """Return an image file in the form in which Pillow reads its bands as they are meant.

    Args:
        encoded: Contents of the file.
        num_bands: Number of bands to read: 3, RGB, or 4.
        where: Name of the image in messages.

    Returns:
        The contents, with changed tags if four bands are to be read from a TIFF; and the number of
        bands that the file stores, None if it is no TIFF.

    Raises:
        UserError: Four bands are to be read, and the TIFF has another number, holds no 8 bits in
            each, or inks; or three are, and the TIFF does not say which of its bands are RGB.
    """
    order = _order(encoded)
    if order is None:
        return encoded, None
    bands = _read(encoded, order)
    if num_bands == 4:
        _check_four(bands, where)
        return _marked_as_rgba(encoded, order), bands.number
    if bands.number > 2 and bands.photometric == BLACK_IS_ZERO:
        raise UserError(
            f"{where}: the TIFF has {bands.number} bands and does not state that they are RGB "
            "(PhotometricInterpretation 1), so it is not known which are the colours; store it as "
            "RGB, or read all of 4 bands of 8 bits with data.num_bands 4"
        )
    return encoded, bands.number


def _read(encoded: bytes, order: str) -> _Bands:
    stream = BytesIO(encoded)
    header = stream.read(16 if _is_big(encoded, order) else 8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    stream.seek(tags.next)
    tags.load(stream)  # without the tags after a place where the file is cut short
    if STRIP_BYTES not in tags and TILE_BYTES not in tags:
        raise OSError("the file ends in its tags")
    return _Bands(
        tags.get(NUM_BANDS, 1),
        max(tags.get(NUM_BITS, (1,))),
        set(tags.get(SAMPLE_FORMAT, (UNSIGNED,))) == {UNSIGNED},
        tags.get(PHOTOMETRIC, RGB),
    )


def _check_four(bands: _Bands, where: str) -> None:
    if bands.number != 4:
        raise not_four_bands(counted(bands.number, "band"), where)
    if bands.photometric not in (BLACK_IS_ZERO, RGB):
        raise UserError(
            f"{where}: the four bands have PhotometricInterpretation {bands.photometric} (5 is "
            "CMYK), not that of RGB (2) or grey (1); store them as RGB and a fourth band"
        )
    if bands.bits != 8 or not bands.is_unsigned:
        raise deep_bands(bands.bits if bands.is_unsigned else None, where)


def not_four_bands(what: str, where: str) -> UserError:
    """Return the error of an image from which four bands are to be read and that has others."""
    return UserError(
        f"{where}: the image has {what}, and 4 are read (data.num_bands, or in_channels of the "
        "network); give images of 4 bands of 8 bits, as TIFF or as PNG with an alpha channel"
    )


def deep_bands(bits: int | None, where: str) -> UserError:
    """Return the error of four bands of other than 8 bits; None: not whole numbers from 0 up."""
    values = "signed or floating-point values" if bits is None else f"values of {bits} bits"
    return UserError(
        f"{where}: the four bands hold {values}, and four bands are read with 8 bits each; scale "
        "them to 8 bits over the range that occurs in your data, such as `gdal_translate -ot Byte "
        "-scale 0 10000 0 255`"
    )


def _marked_as_rgba(encoded: bytes, order: str) -> bytes:
    """Return a TIFF whose first page says that its bands are RGB and unassociated alpha.

    Only these tags change; the values of the pixels stay where they are.
    """
    if _is_big(encoded, order):
        (directory,) = struct.unpack_from(order + "Q", encoded, 8)
        (count,) = struct.unpack_from(order + "Q", encoded, directory)
        first, size, count_format, value_at = directory + 8, 20, "Q", 12
    else:
        (directory,) = struct.unpack_from(order + "I", encoded, 4)
        (count,) = struct.unpack_from(order + "H", encoded, directory)
        first, size, count_format, value_at = directory + 2, 12, "I", 8
    marked = bytearray(encoded)
    for entry in range(first, first + count * size, size):
        (tag,) = struct.unpack_from(order + "H", encoded, entry)
        value = {PHOTOMETRIC: RGB, EXTRA_SAMPLES: UNASSOCIATED_ALPHA}.get(tag)
        if value is not None:  # one value, which stands in the entry itself
            struct.pack_into(order + "HH" + count_format, marked, entry, tag, SHORT, 1)
            struct.pack_into(order + "H", marked, entry + value_at, value)
    return bytes(marked)


def _order(encoded: bytes) -> str | None:
    """Return the byte order of a TIFF as :mod:`struct` writes it; None for other files."""
    order = {b"II": "<", b"MM": ">"}.get(encoded[:2])
    if order is None or len(encoded) < 8:
        return None
    (number,) = struct.unpack_from(order + "H", encoded, 2)
    return order if number in (CLASSIC, BIG) else None


def _is_big(encoded: bytes, order: str) -> bool:
    return struct.unpack_from(order + "H", encoded, 2) == (BIG,)
