"""Label files of every kind decode to the values that they store, or are refused with a message.

The files are written byte by byte from the format specifications (PNG, ISO/IEC 15948; TIFF 6.0), so
that an error in a library's writer cannot hide the same error in its reader.
"""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.decoding import EncodedImage, check_orientation, decode_label
from segformer_pl.data.labels import LabelSpec
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.streaming import Samples, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def packed(row, bits):
    """Pack integers as big-endian bit strings, padded to whole bytes."""
    string = "".join(f"{int(value) % (1 << bits):0{bits}b}" for value in row)
    string += "0" * (-len(string) % 8)
    return bytes(int(string[start : start + 8], 2) for start in range(0, len(string), 8))


def png(values, bits, color_type, palette=None, transparency=None, chunks=()):
    values = np.asarray(values)
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + packed(row, bits) for row in values.reshape(height, -1))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)), *chunks]
    if palette is not None:
        parts.append((b"PLTE", bytes(list(palette))))
    if transparency is not None:
        parts.append((b"tRNS", bytes(transparency)))
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF's sample formats


def tiff(values, bits, sample_format=UNSIGNED, order="<", photometric=1, copies=(), **others):
    """Write an uncompressed TIFF.

    ``copies`` lists the NewSubfileType of further pages; ``others`` are tags such as ``t338=[2]``.
    """
    values = np.asarray(values)
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    rows = values.reshape(height, -1)
    if bits % 8 or bits > 32:
        pixels = b"".join(packed(row, bits) for row in rows)
    else:
        pixels = rows.astype(f"{order}{' uif'[sample_format]}{bits // 8}").tobytes()
    pixels += b"\0" * (len(pixels) % 2)
    file = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    pages = [None, *copies]
    for number, subfile in enumerate(pages):
        tags = {
            256: [width],
            257: [height],
            258: [bits] * channels,
            259: [1],
            262: [photometric],
            273: [len(file) + 4096],
            277: [channels],
            278: [height],
            279: [len(pixels)],
            339: [sample_format] * channels,
        }
        tags |= {int(name[1:]): content for name, content in others.items()}
        if subfile is not None:
            tags[254] = [subfile]
        extra_offset = len(file) + 2 + 12 * len(tags) + 4
        entries, extra = b"", b""
        for tag, items in sorted(tags.items()):
            long = tag in (254, 256, 257, 273, 278, 279)
            body = struct.pack(order + ("I" if long else "H") * len(items), *items)
            if len(body) > 4:
                body, extra = struct.pack(order + "I", extra_offset + len(extra)), extra + body
            entries += struct.pack(order + "HHI", tag, 4 if long else 3, len(items))
            entries += body.ljust(4, b"\0")
        next_page = len(file) + 4096 + len(pixels) if number + 1 < len(pages) else 0
        page = struct.pack(order + "H", len(tags)) + entries
        page += struct.pack(order + "I", next_page) + extra
        file += page.ljust(4096, b"\0") + pixels
    return file


def written(array, format, **arguments):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, format=format, **arguments)
    return buffer.getvalue()


def random_values(bits, signed=False):
    """Random integers of ``bits`` bits, (3, 149), including the smallest and the largest.

    The width exceeds vector registers, and a row of less than 8 bits is not a whole number of
    bytes.
    """
    low = -(1 << bits - 1) if signed else 0
    limits = [low, low + (1 << bits) - 1, 0, 1]
    values = np.random.default_rng(bits).integers(low, low + (1 << bits), (3, 149))
    values[0, : len(limits)] = limits
    return values


STORED = {
    **{
        f"PNG, {bits} bits of grey": (png, random_values(bits), bits, GREY)
        for bits in (1, 2, 4, 8, 16)
    },
    **{
        f"PNG, palette of {bits} bits": (
            png,
            random_values(bits),
            bits,
            PALETTE,
            [c % 256 for c in range(3 << bits)],
        )
        for bits in (1, 2, 4, 8)
    },
    **{
        f"TIFF, {bits} bits": (tiff, random_values(bits), bits) for bits in (1, 2, 4, 8, 12, 16, 32)
    },
    **{
        f"TIFF, {bits} bits, signed": (tiff, random_values(bits, True), bits, SIGNED)
        for bits in (8, 16, 32)
    },
    **{
        f"TIFF, {bits} bits, MM": (tiff, random_values(bits), bits, UNSIGNED, ">")
        for bits in (4, 8, 16)
    },
    **{
        f"TIFF, {bits} bits, signed, MM": (tiff, random_values(bits, True), bits, SIGNED, ">")
        for bits in (16, 32)
    },
}


@pytest.mark.parametrize("kind", STORED)
def test_values_are_the_stored_values(kind):
    write, values, *arguments = STORED[kind]
    label = decode_label(write(values, *arguments), "x")
    assert label.values.dtype.kind in "iu"
    np.testing.assert_array_equal(label.values, values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_tiff_with_a_palette_gives_its_indices(bits):
    encoded = tiff(random_values(bits), bits, photometric=3, t320=[257 * 9] * (3 << bits))
    label = decode_label(encoded, "x")
    np.testing.assert_array_equal(label.values, random_values(bits))
    np.testing.assert_array_equal(label.palette[: 1 << bits], [[9, 9, 9]] * (1 << bits))


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF", "PNG"])
def test_8_bit_values_written_by_pillow_are_read_back(format):
    values = np.arange(512).reshape(16, 32).astype(np.uint8)
    np.testing.assert_array_equal(decode_label(written(values, format), "x").values, values)


def test_a_gif_with_a_renumbered_palette_is_read_by_color_only():
    values = np.array([[0, 255, 7]], np.uint8)
    encoded = written(values, "GIF")  # Pillow stores the indices 0, 2 and 1
    with pytest.raises(UserError, match=r"^here: the label image is a GIF, whose writers renumber"):
        decode_label(encoded, "here")
    stored = decode_label(encoded, "here", "colors").values
    np.testing.assert_array_equal(stored, values[..., None].repeat(3, 2))


def test_one_bit_masks_hold_0_and_1_and_no_ignored_value():
    labels = LabelSpec(("ground", "house"), ((0, 0, 0), (1, 1, 1)), ignored=frozenset({255}))
    for encoded in (png(random_values(1), 1, GREY), tiff(random_values(1), 1)):
        train_ids = labels.to_train_ids(decode_label(encoded, "x").values, "x")
        np.testing.assert_array_equal(train_ids, random_values(1))
    # every non-zero byte of a boolean array means True
    booleans = np.array([[0, 255, 1, 0] * 40], np.uint8).view(bool)
    np.testing.assert_array_equal(labels.to_train_ids(booleans, "x"), [[0, 1, 1, 0] * 40])


def colors(channels):
    """Random opaque colours, (4, 7, channels)."""
    values = np.random.default_rng(0).integers(0, 256, (4, 7, 4))
    values[..., 3] = 255
    return values[..., :channels]


COLORED = {
    "PNG": png(colors(3), 8, RGB),
    "PNG with alpha": png(colors(4), 8, RGBA),
    "TIFF": tiff(colors(3), 8, photometric=2),
    "TIFF with alpha": tiff(colors(4), 8, photometric=2, t338=[2]),
    "BMP": written(colors(3).astype(np.uint8), "BMP"),
    "PNG, palette": png(
        np.arange(28).reshape(4, 7), 8, PALETTE, colors(3).ravel(), transparency=[255] * 5
    ),
    "PNG, palette of 4 bits": png([[0, 1, 2, 1]], 4, PALETTE, colors(3)[0, :3].ravel()),
}


@pytest.mark.parametrize("kind", COLORED)
def test_colors_are_the_stored_colors(kind):
    expected = colors(3) if "4 bits" not in kind else colors(3)[:1, [0, 1, 2, 1]]
    label = decode_label(COLORED[kind], "x", "colors")
    assert label.values.dtype == np.uint8
    np.testing.assert_array_equal(label.values, expected)
    assert label.palette is None


REFUSED = {
    "PNG, grey and alpha": (
        png(random_values(8).reshape(3, 149, 1).repeat(2, 2), 8, GREY_ALPHA),
        r"shape \(3, 149, 2\).*store class numbers in one channel",
    ),
    "PNG, 16 bits of grey and alpha": (
        png(np.zeros((2, 2, 2)), 16, GREY_ALPHA),
        r"has 16 bits in each channel \(mode RGBA\), but colours need 8; store labels as PNG",
    ),
    "PNG, 16 bits of colour": (png(np.zeros((2, 2, 3)), 16, RGB), "has 16 bits in each channel"),
    "PNG, 16 bits of colour and alpha": (
        png(np.zeros((2, 2, 4)), 16, RGBA),
        "has 16 bits in each channel",
    ),
    "TIFF, 16 bits of colour": (
        tiff(np.zeros((2, 2, 3)), 16, photometric=2),
        "has 16 bits in each channel",
    ),
    "TIFF, floating point": (tiff([[0, 1]], 32, FLOAT), "array of float32.*not one integer"),
    **{
        f"TIFF, white is zero, {bits} bits": (
            tiff([[0, 1]], bits, photometric=0),
            r"TIFF whose 0 means white .* others their negative; store labels as PNG",
        )
        for bits in (1, 2, 4, 8, 16)
    },
    "TIFF, Lab": (tiff(colors(3), 8, photometric=8), "stores LAB, neither values nor RGB"),
    "TIFF, CMYK": (tiff(colors(4), 8, photometric=5), "stores CMYK, neither values nor RGB"),
    "TIFF, YCbCr": (tiff(colors(3), 8, photometric=6), "stores YCbCr, neither values nor RGB"),
    "TIFF, signed, MM, which Pillow cannot read": (
        tiff([[0, 1]], 64, SIGNED, ">"),
        "are not an image, or a damaged one",
    ),
    "TIFF with JPEG inside": (
        written(colors(3).astype(np.uint8), "TIFF", compression="jpeg"),
        "is a TIFF with lossy compression, which changes values along every border",
    ),
    "BMP of 1 bit": (written(random_values(1) > 0, "BMP"), "is a BMP of 1 bits per pixel"),
    "WebP": (
        written(colors(3).astype(np.uint8), "WEBP"),
        "is a WEBP file, a format that may change values; store labels as PNG",
    ),
    "JPEG 2000": (written(colors(3).astype(np.uint8), "JPEG2000"), "is a JPEG2000 file"),
    "PGM, 4 bits of grey": (b"P5 2 1 15 \x01\x02", "is a PPM file"),
    "JPEG": (written(random_values(8).astype(np.uint8), "JPEG"), "is a JPEG, which changes values"),
}


@pytest.mark.parametrize("coding", ["values", "colors"])
@pytest.mark.parametrize("kind", REFUSED)
def test_files_with_ambiguous_values_are_refused(kind, coding):
    encoded, message = REFUSED[kind]
    if coding == "colors" and ("float" in kind or kind == "PNG, grey and alpha"):
        message = "is an array of .*three channels of 8 bits"
    labels = LabelSpec(("a", "b"), ((0, 0, 0), (1, 1, 1)), coding=coding)
    with pytest.raises(UserError, match=f"^here: .*{message}") as raised:
        labels.to_train_ids(decode_label(encoded, "here", coding).values, "here")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "encoded",
    [
        png([[[9, 9, 9, 255], [8, 8, 8, 128]]], 8, RGBA),
        png([[0, 1]], 8, PALETTE, [9, 9, 9, 8, 8, 8], transparency=[255, 0]),
        png([[[9, 9, 9], [8, 8, 8]]], 8, RGB, transparency=[0, 8, 0, 8, 0, 8]),
    ],
    ids=["alpha", "palette", "transparent colour"],
)
def test_colors_that_are_not_opaque_are_refused(encoded):
    with pytest.raises(UserError, match=r"^here: 1 pixels of the label image are transparent or"):
        decode_label(encoded, "here", "colors")


def animated(format):
    frames = [Image.fromarray(colors(3)[..., n].astype(np.uint8)) for n in range(3)]
    buffer = BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["TIFF", "PNG", "GIF"])
def test_several_pages_are_refused_in_a_label_and_reported_for_an_image(format):
    with pytest.raises(UserError, match=r"^here: the label file holds 3 frames or pages, of which"):
        decode_label(animated(format), "here", "colors")
    image = EncodedImage(animated(format), "here")
    assert image.num_frames == 3
    assert image.frames_notice().startswith("here: the image file holds 3 frames or pages, of w")
    assert (
        EncodedImage(written(random_values(8).astype(np.uint8), format), "x").frames_notice()
        is None
    )


def test_reduced_copies_of_a_page_do_not_count_as_pages():
    overviews = tiff(random_values(8), 8, copies=[1, 1])
    np.testing.assert_array_equal(decode_label(overviews, "x").values, random_values(8))
    assert EncodedImage(overviews, "x").num_frames == 1
    with pytest.raises(UserError, match="holds 2 frames or pages"):
        decode_label(tiff(random_values(8), 8, copies=[1, 0]), "here")


def test_a_white_is_zero_image_of_16_bits_is_inverted_like_one_of_8():
    deep = EncodedImage(tiff([[0, 65535, 0x1234]], 16, photometric=0), "x").decode()
    shallow = EncodedImage(tiff([[0, 255, 0x12]], 8, photometric=0), "x").decode()
    np.testing.assert_array_equal(deep, shallow)
    np.testing.assert_array_equal(deep[0, :, 0], [255, 0, 255 - 0x12])


# EXIF orientation of an image and its label.


def oriented(array, orientation, format="PNG"):
    if orientation is None:
        return written(array, format)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return written(array, format, exif=exif)


def pair(image_orientation, label_orientation, label_size=(6, 9), format="PNG", size=(6, 9)):
    image = np.zeros((*size, 3), np.uint8)
    image = EncodedImage(oriented(image, image_orientation, format), "x")
    label = decode_label(oriented(np.zeros(label_size, np.uint8), label_orientation), "x")
    return check_orientation(image, label, "here")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_sizes_are_those_of_the_upright_image(format):
    for orientation in (1, 3, 6, 8):
        image = EncodedImage(oriented(np.zeros((6, 9, 3), np.uint8), orientation, format), "x")
        assert image.size == image.decode().shape[:2]
        assert image.stored_size == (6, 9)
        assert image.orientation == orientation


@pytest.mark.parametrize("orientation", [None, 0, 1, 9])
def test_an_upright_pair_raises_no_warning(orientation):
    assert pair(orientation, None) is None
    assert pair(orientation, 1) is None


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_pair_of_the_same_orientation_raises_no_warning(orientation):
    assert pair(orientation, orientation) is None


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_orientation_of_the_image_alone_is_warned_of_or_refused(orientation, format):
    swaps_sides = orientation > 4
    warning = (
        f"here: the image has the EXIF orientation {orientation} and the label has none: the label "
        "is assumed to be drawn on the upright image; if it was drawn on the image as stored, "
        "write both upright and without an EXIF orientation"
    )
    if not swaps_sides:  # rotation by 180 degrees and mirroring keep the size
        assert pair(orientation, None, format=format) == warning
        assert pair(orientation, 1, format=format) == warning
        return
    # the sizes show which of the two the label was drawn on
    assert pair(orientation, None, (9, 6), format) is None
    with pytest.raises(UserError, match=r"^here: .*EXIF orientation .* is 9x6 when upright, but t"):
        pair(orientation, None, (6, 9), format)
    # the sizes of a square do not
    assert pair(orientation, None, (6, 6), format, (6, 6)) == warning


@pytest.mark.parametrize(("image", "label"), [(None, 3), (1, 6), (6, 8), (3, 2)])
def test_a_label_of_another_orientation_is_refused(image, label):
    with pytest.raises(UserError, match=r"^here: the image has the EXIF orientation \d and the la"):
        pair(image, label)


def test_an_error_about_sizes_names_the_orientations():
    image = oriented(np.zeros((6, 9, 3), np.uint8), 6)
    label = oriented(np.zeros((9, 6), np.uint8), 6)
    message = (
        r"is 6x9 but the image is 9x6 .*after applying their EXIF orientations \(image 6, label 6\)"
    )
    with pytest.raises(UserError, match=message):
        samples([(image, label)])[0]


# Label files in a stream of samples.


class Rows:
    """One row group in memory."""

    def __init__(self, rows):
        self.group_rows = [len(rows)]
        self.rows = rows

    def read(self, group):
        return self.rows

    def name(self, group, row):
        return f"s{row}"


def samples(pairs, **labels):
    spec = LabelSpec(("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), **labels)
    rows = Rows([{"image": image, "label": label} for image, label in pairs])
    return Samples(DatasetEntry("mine", spec), rows, StoredOrder(rows.group_rows), to_tensors)


IMAGE = written(np.zeros((1, 3, 3), np.uint8), "PNG")


def paletted(*palette, indices=(0, 1, 2)):
    return png([indices], 8, PALETTE, np.array(palette).ravel())


A, B, C = (1, 1, 1), (2, 2, 2), (3, 3, 3)


def test_different_palettes_are_reported_if_indices_stand_for_classes():
    same = samples([(IMAGE, paletted(A, B, C))] * 2)
    assert same[0]["notices"] == same[1]["notices"] == {}
    mixed = samples([(IMAGE, paletted(A, B, C)), (IMAGE, paletted(A, C, B))])
    assert mixed[0]["notices"] == {}
    assert mixed[1]["notices"]["palette"] == (
        "data set 'mine', sample 's1': index 1 of the label's palette is the colour (3, 3, 3), but "
        "(2, 2, 2) in data set 'mine', sample 's0'; classes are read from the indices: if the "
        "colours stand for the classes, set labels.coding: colors"
    )
    assert collate([mixed[0], mixed[1]])["notices"] == mixed[1]["notices"]
    # colours of unused indices are not compared
    unused = samples(
        [
            (IMAGE, paletted(A, B, C, indices=(0, 0, 1))),
            (IMAGE, paletted(A, B, A)),
            (IMAGE, paletted(A, B, indices=(0, 1, 1))),
        ]
    )
    assert [unused[n]["notices"] for n in range(3)] == [{}, {}, {}]
    # indices do not matter if classes are coded by colour
    by_color = samples([(IMAGE, paletted(A, B, C)), (IMAGE, paletted(A, C, B))], coding="colors")
    assert [by_color[n]["notices"] for n in range(2)] == [{}, {}]
    assert by_color[1]["label"].tolist() == [[0, 2, 1]]


def test_notices_are_part_of_the_sample_and_the_batch():
    grey = np.zeros((1, 3), np.uint8)
    upside_down = oriented(grey, 3)
    pages = tiff(grey, 8, copies=[0])
    both = samples([(upside_down, png(grey, 8, GREY)), (pages, png(grey, 8, GREY))])
    assert list(both[0]["notices"]) == ["orientation"]
    assert both[0]["notices"]["orientation"].startswith("data set 'mine', sample 's0': the image h")
    assert list(both[1]["notices"]) == ["frames"]
    assert set(collate([both[0], both[1]])["notices"]) == {"orientation", "frames"}
