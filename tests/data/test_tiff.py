"""Images of four bands decode to the values that the file stores, or are refused."""

from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer_pl.data import tiff
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.errors import UserError
from tests.tiff_writer import DEFLATE, write_tiff

UNASSOCIATED, ASSOCIATED, UNSPECIFIED = [2], [1], [0]
BLACK_IS_ZERO, CMYK = 1, 5


def bands(height=7, width=5, count=4, dtype=np.uint8):
    """Random values, in which a fourth band of 0 would hide what is stored below."""
    limit = 256 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max + 1
    values = np.random.default_rng(0).integers(0, limit, (height, width, count)).astype(dtype)
    values[0, :3, 3:] = 0
    return values


def written(values, format, **arguments):
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    buffer = BytesIO()
    image.save(buffer, format=format, **arguments)
    return buffer.getvalue()


STORED = {
    "alpha": {"extra": UNASSOCIATED},
    "premultiplied alpha": {"extra": ASSOCIATED},
    "another band": {"extra": UNSPECIFIED},
    "no ExtraSamples": {},
    "no colours": {"photometric": BLACK_IS_ZERO, "extra": [0, 0, 0]},
    "no colours, no ExtraSamples": {"photometric": BLACK_IS_ZERO},
    "planes": {"extra": UNSPECIFIED, "planes": 2},
    "planes of no colours": {"photometric": BLACK_IS_ZERO, "extra": [0, 0, 0], "planes": 2},
    "big-endian": {"extra": UNSPECIFIED, "order": ">"},
    "BigTIFF": {"photometric": BLACK_IS_ZERO, "extra": [0, 0, 0], "is_big": True},
}


@pytest.mark.parametrize("compression", [1, DEFLATE])
@pytest.mark.parametrize("tags", STORED.values(), ids=STORED)
def test_four_bands_of_a_tiff_are_read_as_stored(tags, compression):
    image = EncodedImage(write_tiff(bands(), **tags, compression=compression), "x", 4)
    assert image.size == (7, 5)
    np.testing.assert_array_equal(image.decode(), bands())
    assert (image.num_stored_bands, image.bands_notice()) == (4, None)


@pytest.mark.parametrize("tags", ["premultiplied alpha", "another band", "planes of no colours"])
def test_tags_that_are_left_as_they_are_would_be_noticed(monkeypatch, tags):
    monkeypatch.setattr(tiff, "_marked_as_rgba", lambda encoded, order: encoded)
    with pytest.raises((AssertionError, UserError)):
        test_four_bands_of_a_tiff_are_read_as_stored(STORED[tags], DEFLATE)


@pytest.mark.parametrize(
    ("format", "arguments"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"big_tiff": True}),
        ("WEBP", {"lossless": True, "exact": True}),
    ],
)
def test_four_bands_that_pillow_wrote_are_read_as_stored(format, arguments):
    encoded = written(bands(), format, **arguments)
    np.testing.assert_array_equal(EncodedImage(encoded, "x", 4).decode(), bands())


@pytest.mark.parametrize("tags", [{"extra": UNSPECIFIED}, {"photometric": BLACK_IS_ZERO}])
def test_four_bands_are_rotated_upright(tags):
    upright = bands()
    stored = np.ascontiguousarray(upright.transpose(1, 0, 2)[::-1])
    image = EncodedImage(write_tiff(stored, **tags, orientation=6), "x", 4)
    assert image.size == (7, 5)
    np.testing.assert_array_equal(image.decode(), upright)


REFUSED = {
    "RGB": (written(bands()[..., :3], "PNG"), "the image has 3 bands (mode RGB), and 4 are read"),
    "grey": (written(bands()[..., 0], "PNG"), "the image has 1 band (mode L), and 4 are read"),
    "JPEG": (written(bands()[..., :3], "JPEG"), "the image has 3 bands (mode RGB), and 4 are read"),
    "RGB TIFF": (write_tiff(bands(count=3)), "the image has 3 bands, and 4 are read"),
    "13 bands": (
        write_tiff(bands(count=13), photometric=BLACK_IS_ZERO),
        "the image has 13 bands, and 4 are read (data.num_bands, or in_channels of the network)",
    ),
    "16 bits": (
        write_tiff(bands(dtype=np.uint16), extra=UNSPECIFIED),
        "the four bands hold values of 16 bits, and four bands are read with 8 bits each; scale",
    ),
    "floating point": (
        write_tiff(bands(dtype=np.float32), extra=UNSPECIFIED, sample_format=3),
        "the four bands hold signed or floating-point values",
    ),
    "signed": (
        write_tiff(bands(dtype=np.int8), photometric=BLACK_IS_ZERO, sample_format=2),
        "the four bands hold signed or floating-point values",
    ),
    "CMYK": (write_tiff(bands(), photometric=CMYK), "PhotometricInterpretation 5 (5 is CMYK)"),
    "CMYK JPEG": (
        written(Image.new("CMYK", (4, 4)), "JPEG"),
        "the image has 4 bands (mode CMYK), and 4 are read",
    ),
    "no image": (b"II*\0what", "the 8 bytes are not an image"),
}


@pytest.mark.parametrize(("encoded", "sentence"), REFUSED.values(), ids=REFUSED)
def test_other_images_are_refused_where_four_bands_are_read(encoded, sentence):
    with pytest.raises(UserError) as raised:
        EncodedImage(encoded, "here", 4)
    assert str(raised.value).startswith("here: ")
    assert sentence in str(raised.value)


def test_16_bits_of_a_png_are_refused_where_four_bands_are_read():
    encoded = cv2.imencode(".png", bands(dtype=np.uint16))[1].tobytes()
    with pytest.raises(UserError, match=r"^here: the four bands hold values of 16 bits"):
        EncodedImage(encoded, "here", 4)


@pytest.mark.parametrize("tags", ["alpha", "another band", "no ExtraSamples"])
def test_rgb_of_a_file_of_four_bands_is_read_with_a_notice(tags):
    for encoded in (write_tiff(bands(), **STORED[tags]), written(bands(), "PNG")):
        image = EncodedImage(encoded, "here")
        np.testing.assert_array_equal(image.decode(), bands()[..., :3])
        assert image.bands_notice() == (
            "here: the image file holds 4 bands, of which the first 3 are read as RGB; "
            "data.num_bands 4 reads all of 4 bands, alpha too"
        )
    assert EncodedImage(written(bands()[..., :3], "PNG"), "here").bands_notice() is None
    assert EncodedImage(written(bands()[..., 0], "PNG"), "here").bands_notice() is None


@pytest.mark.parametrize("planes", [1, 2])
def test_bands_that_are_no_colours_are_not_taken_for_rgb(planes):
    encoded = write_tiff(bands(), BLACK_IS_ZERO, [0, 0, 0], planes, DEFLATE)
    sentence = r"^here: the TIFF has 4 bands and does not state that they are RGB \(Photometric"
    with pytest.raises(UserError, match=sentence):
        EncodedImage(encoded, "here")


def test_a_truncated_tiff_of_four_bands_is_refused():
    encoded = write_tiff(bands(40, 50), extra=UNSPECIFIED)
    for length in (6, 40, len(encoded) // 2, len(encoded) - 100):
        with pytest.raises(UserError, match="bytes are not an image, or a damaged one"):
            EncodedImage(encoded[:length], "here", 4)
