"""Images and label images of every kind decode to what they mean, or are refused with a message."""

from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer_pl.data.decoding import EncodedImage, cell_bytes, decode_label
from segformer_pl.errors import UserError


def encode(image, format="PNG", **arguments):
    buffer = BytesIO()
    image.save(buffer, format=format, **arguments)
    return buffer.getvalue()


def photograph(height=90, width=121):
    """Smooth areas, edges and fine texture."""
    rows, columns = np.mgrid[:height, :width] / 30
    waves = [np.sin(rows * f + columns * g) for f, g in ((1, 2), (2, -1), (0.5, 3))]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def exif_with(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGB", (200, 100, 50)),
        ("RGBA", (200, 100, 50)),
        ("CMYK", (200, 100, 50)),
        ("L", (124, 124, 124)),
        ("LA", (124, 124, 124)),
        ("P", (200, 100, 50)),
        ("1", (0, 0, 0)),
    ],
)
def test_every_image_mode_becomes_rgb(mode, expected):
    image = Image.new("RGB", (3, 2), (200, 100, 50))
    image = image.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE)
    encoded = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    pixels = EncodedImage(encoded, "x").decode()
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_labels_are_rotated_upright(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {  # as a camera in this orientation stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    encoded = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif_with(orientation))
    image = EncodedImage(encoded, "x")
    assert image.size == (2, 3)
    assert np.array_equal(image.decode()[..., 0], upright)
    assert np.array_equal(decode_label(encoded, "x").values, upright)


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(90, 121), (97, 64)])
def test_a_jpeg_is_decoded_at_a_reduced_size(reduce, size):
    encoded = encode(Image.fromarray(photograph(*size)), "JPEG", quality=95)
    image = EncodedImage(encoded, "x")
    small = image.decode(reduce)
    assert small.shape[:2] == tuple(-(-side // reduce) for side in size)
    # every pixel is the mean of a square that lies within the image
    height, width = (side // reduce for side in size)
    whole = image.decode()[: height * reduce, : width * reduce].astype(float)
    means = whole.reshape(height, reduce, width, reduce, 3).mean(axis=(1, 3))
    assert np.abs(small[:height, :width] - means).mean() < 2


def test_other_formats_are_decoded_at_full_size():
    assert EncodedImage(encode(Image.new("RGB", (9, 7))), "x").decode(2).shape == (7, 9, 3)


def test_label_values_are_the_stored_values():
    indices = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([7, 7, 7] * 256)
    assert np.array_equal(decode_label(encode(palette), "x").values, indices)
    deep = np.array([[0, 300], [65535, 1]], np.uint16)
    assert np.array_equal(decode_label(encode(Image.fromarray(deep)), "x").values, deep)
    colors = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(decode_label(encode(Image.fromarray(colors)), "x").values, colors)
    binary = Image.fromarray(indices > 1)
    assert np.array_equal(decode_label(encode(binary), "x").values, indices > 1)


def test_a_lossy_label_is_refused():
    with pytest.raises(UserError, match=r"^here: the label image is a JPEG, which changes values"):
        decode_label(encode(Image.new("L", (8, 8)), "JPEG"), "here")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_truncated_file_is_refused(format):
    encoded = encode(Image.fromarray(photograph()), format)[:-400]
    with pytest.raises(UserError, match=r"^here: the \d+ bytes are not an image, or a damaged one"):
        EncodedImage(encoded, "here").decode()
    if format == "PNG":
        with pytest.raises(UserError, match=r"^here: the \d+ bytes are not an image, or a damaged"):
            decode_label(encoded, "here")


def test_bytes_that_are_not_an_image_are_refused():
    for read in (EncodedImage, decode_label):
        with pytest.raises(UserError, match=r"^here: the 4 bytes are not an image"):
            read(b"what", "here")


@pytest.mark.parametrize(
    ("format", "arguments"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"big_endian": True}), ("PPM", {}), ("JPEG2000", {})],
)
def test_the_upper_8_of_16_bits_of_grey_are_kept(format, arguments):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (40, 50), dtype=np.uint16)
    deep[0, :2] = 0, 65535
    pixels = EncodedImage(encode(Image.fromarray(deep), format, **arguments), "x").decode()
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.repeat(deep[..., None] // 256, 3, axis=2))


def test_16_bits_of_colour_equal_the_same_image_with_8():
    deep = np.random.default_rng(0).integers(0, 1 << 16, (40, 50, 3), dtype=np.uint16)
    encoded = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    assert np.array_equal(EncodedImage(encoded, "x").decode(), deep // 256)
    grey = photograph()[..., 0]
    doubled = encode(Image.fromarray(grey * np.uint16(257)))
    same = EncodedImage(encode(Image.fromarray(grey)), "x").decode()
    assert np.array_equal(EncodedImage(doubled, "x").decode(), same)


def test_images_of_16_bits_are_rotated_upright_too():
    deep = np.arange(6, dtype=np.uint16).reshape(2, 3) << 8
    image = EncodedImage(encode(Image.fromarray(deep), exif=exif_with(6)), "x")
    assert image.size == (3, 2)
    assert np.array_equal(image.decode()[..., 0], np.rot90(deep >> 8, -1))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_known_range_are_refused(dtype):
    encoded = encode(Image.fromarray(np.full((4, 4), 300, dtype)), "TIFF")
    with pytest.raises(UserError, match=r"^here: .*without a known range .*; store it with 8 or"):
        EncodedImage(encoded, "here")


@pytest.mark.parametrize("format", ["GIF", "TIFF"])
def test_the_first_of_several_frames_is_read(format):
    frames = [Image.new("L", (5, 4), grey) for grey in (200, 10, 90)]
    encoded = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert (EncodedImage(encoded, "x").decode() == 200).all()


def test_an_image_with_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"^here: the header announces more than 2,000 pixels; cut"):
        EncodedImage(encode(Image.new("L", (50, 50))), "here")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged files
def test_any_damage_raises_a_message_of_one_line():
    rng = np.random.default_rng(0)
    image = Image.fromarray(photograph(20, 31))
    files = [
        encode(image, format, **({} if format == "BMP" else {"exif": exif_with(6)}))
        for format in ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
    ]
    pages = [Image.new("L", (31, 20))] * 2
    files.append(encode(pages[0], "TIFF", save_all=True, append_images=pages))
    refused = []

    def decode_here(file):
        decode_label(file, "here", "colors")

    for number in range(600):
        damaged = bytearray(files[number % len(files)])
        if number % 2:
            del damaged[rng.integers(len(damaged)) :]
        for position in rng.integers(min(len(damaged), 200) or 1, size=5):
            damaged[position : position + 1] = rng.bytes(1)
        for read in (lambda file: EncodedImage(file, "here").decode(), decode_here):
            try:
                read(bytes(damaged))
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 600
    assert all(message.startswith("here: the ") for message in refused)


def test_cell_bytes_come_from_the_cell_or_its_file():
    def read_file(path):
        if path != "inside":
            raise UserError(f"the row names the file {path!r}, which is elsewhere")
        return b"y"

    assert cell_bytes(b"x", "here", read_file) == b"x"
    assert cell_bytes({"bytes": b"x", "path": "elsewhere"}, "here", read_file) == b"x"
    assert cell_bytes({"bytes": None, "path": "inside"}, "here", read_file) == b"y"
    for empty in (None, b"", {"bytes": None, "path": None}):
        with pytest.raises(UserError, match=r"^here: the row holds no image; remove the row"):
            cell_bytes(empty, "here", read_file)
    with pytest.raises(UserError, match=r"^here: the row names the file '/gone', which is else"):
        cell_bytes({"bytes": None, "path": "/gone"}, "here", read_file)


@pytest.mark.parametrize("cell", [5, 1.5, True, [1, 2], "images/a.png", {"bytes": "text"}])
def test_cells_without_an_encoded_image_are_refused(cell):
    value = cell["bytes"] if isinstance(cell, dict) else cell
    kind = type(value).__name__
    with pytest.raises(UserError, match=rf"^here: the row holds .*, of type {kind}, and no encod"):
        cell_bytes(cell, "here", None)
