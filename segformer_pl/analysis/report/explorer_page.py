"""The page on which one points at an image and sees the receptive fields of the unit there.

The page is one file without any other resource, and its content security policy forbids the browser
to load one. Its script reads the fields from the JSON of :func:`_network`: one stream of bytes for
each layer, the maps of all units one after the other, compressed with zlib.
"""

import base64
import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from segformer_pl.analysis import style
from segformer_pl.analysis.erf.captions import describe_settings
from segformer_pl.analysis.erf.exploration import DECADES, NEAR, Exploration, LayerFields
from segformer_pl.analysis.report.templates import render
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

COLOR_MAP = "magma"  # as in the figures; its lightness rises evenly, which needs no colour vision
IMAGE_SIDE = 1024  # pixels; a larger image is shrunk to this


def write_explorer(
    file: Path, image: Tensor, image_id: str, explorations: Mapping[str, Exploration]
) -> None:
    """Write the page of :func:`explorer_html` to a file.

    Raises:
        UserError: See :func:`explorer_html`.
        WriteError: The page cannot be written.
    """
    atomic_write_text(file, explorer_html(image, image_id, explorations))


def explorer_html(image: Tensor, image_id: str, explorations: Mapping[str, Exploration]) -> str:
    """Return the page of one image and one or several networks.

    Args:
        image: (3, H, W), RGB in 0 to 1.
        image_id: Name of the image.
        explorations: Receptive fields by name of the network, all of this image and one grid.

    Raises:
        UserError: There is no network, or they have different images, grids or settings.
    """
    first = _check(explorations, image)
    settings = {"units": "unit at the chosen pixel", **first.settings}
    height, width = first.size
    return render(
        "explorer.html.j2",
        image_id=style.printable(image_id),
        image_url=_image_url(image),
        explorations=explorations,
        height=height,
        width=width,
        num_rows=len(first.rows),
        num_columns=len(first.columns),
        settings=describe_settings(settings),
        near=NEAR,
        decades=DECADES,
        data={
            "size": first.size,
            "rows": first.rows,
            "columns": first.columns,
            "colors": _encode(_colors()),
            "networks": [_network(name, one) for name, one in explorations.items()],
        },
    )


def _check(explorations: Mapping[str, Exploration], image: Tensor) -> Exploration:
    facts = [(e.size, e.rows, e.columns, e.settings) for e in explorations.values()]
    if not facts:
        raise UserError("explorer: there is no network to show")
    if any(fact != facts[0] for fact in facts):
        raise UserError(
            "explorer: the networks were measured on images of other sizes, on other grids "
            "or with other settings; measure all with the same"
        )
    if tuple(image.shape) != (3, *facts[0][0]):
        height, width = facts[0][0]
        raise UserError(
            f"explorer: image: give the image that was measured, (3, {height}, {width}), not "
            f"shape {tuple(image.shape)}"
        )
    return next(iter(explorations.values()))


def _network(name: str, exploration: Exploration) -> dict[str, Any]:
    return {"name": name, "layers": [_layer(layer) for layer in exploration.layers]}


def _layer(layer: LayerFields) -> dict[str, Any]:
    return {
        "name": layer.name,
        "grid": layer.grid,
        "block": layer.block,
        "shape": layer.values.shape[1:],
        "values": _encode(layer.values, compress=True),
        "radius": _numbers(layer.radius, 2),
        "share": _numbers(layer.share, 4),
        "positions": layer.positions,
    }


def _numbers(values: npt.NDArray[np.float64], digits: int) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), digits) for value in values]


def _encode(values: npt.NDArray[np.uint8], compress: bool = False) -> str:
    content = values.tobytes()
    return base64.b64encode(zlib.compress(content, 9) if compress else content).decode()


def _colors() -> npt.NDArray[np.uint8]:
    """Return the RGB (256, 3) of every byte."""
    colors = matplotlib.colormaps[COLOR_MAP](np.arange(256))[:, :3]
    return np.rint(255 * colors).astype(np.uint8)


def _image_url(image: Tensor) -> Markup:
    array = (255 * image.permute(1, 2, 0).clamp(0, 1)).round().byte().cpu().numpy()
    resized = Image.fromarray(array)
    resized.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    stream = io.BytesIO()
    resized.save(stream, "jpeg", quality=90)
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}")
