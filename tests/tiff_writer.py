"""A writer of TIFFs whose tags Pillow does not write."""

import struct
import zlib

import numpy as np

SHORT, LONG, LONG8 = 3, 4, 16
CODES = {SHORT: "H", LONG: "I", LONG8: "Q"}  # of types, for `struct`
DEFLATE = 8  # compression


def write_tiff(
    values,
    photometric=2,
    extra=(),
    planes=1,
    compression=1,
    order="<",
    is_big=False,
    orientation=1,
    sample_format=1,
):
    """Return a TIFF of one page with values (H, W, bands), in one strip for each plane.

    Args:
        photometric: PhotometricInterpretation: 1, black is zero; 2, RGB; 5, CMYK.
        extra: ExtraSamples, one for each band that is no colour; no such tag if it is empty.
        planes: PlanarConfiguration: 1, band by band in each pixel; 2, plane by plane.
        is_big: Whether it is a BigTIFF.
        sample_format: 1, unsigned; 2, signed; 3, floating-point.
    """
    height, width, bands = values.shape
    stored = values.astype(values.dtype.newbyteorder(order))
    strips = [stored.tobytes()]
    if planes == 2:
        strips = [np.ascontiguousarray(band).tobytes() for band in np.moveaxis(stored, 2, 0)]
    if compression == DEFLATE:
        strips = [zlib.compress(strip) for strip in strips]
    offset = LONG8 if is_big else LONG
    start = 16 if is_big else 8
    places = np.cumsum([start, *map(len, strips)]).tolist()
    tags = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [8 * values.dtype.itemsize] * bands),
        259: (SHORT, [compression]),
        262: (SHORT, [photometric]),
        273: (offset, places[:-1]),
        274: (SHORT, [orientation]),
        277: (SHORT, [bands]),
        278: (LONG, [height]),
        279: (LONG, list(map(len, strips))),
        284: (SHORT, [planes]),
        338: (SHORT, list(extra)),
        339: (SHORT, [sample_format] * bands),
    }
    tags = {tag: entry for tag, entry in tags.items() if entry[1]}
    room, count = (8, "Q") if is_big else (4, "I")
    directory = places[-1] + places[-1] % 2
    number = struct.pack(order + ("Q" if is_big else "H"), len(tags))
    after = directory + len(number) + len(tags) * (12 if not is_big else 20) + room
    entries, outside = b"", b""
    for tag, (kind, content) in tags.items():
        packed = struct.pack(f"{order}{len(content)}{CODES[kind]}", *content)
        if len(packed) > room:
            place = struct.pack(order + count, after + len(outside))
            outside, packed = outside + packed, place
        entries += struct.pack(order + "HH" + count, tag, kind, len(content))
        entries += packed.ljust(room, b"\0")
    header = {"<": b"II", ">": b"MM"}[order]
    if is_big:
        header += struct.pack(order + "HHHQ", 43, 8, 0, directory)
    else:
        header += struct.pack(order + "HI", 42, directory)
    pixels = b"".join(strips)
    pixels += b"\0" * (directory - start - len(pixels))
    return header + pixels + number + entries + b"\0" * room + outside
