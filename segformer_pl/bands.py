"""Bands of rows: large maps that are computed piece by piece, so that a piece stays in the cache.

On a CPU there is a second reason. Memory blocks of more than 32 MB come fresh from the system each
time, which has to clear every page of them; smaller ones are used again.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements of a band: large enough that the overhead of calls is negligible, and on a CPU small
# enough for the cache.
BAND_ELEMENTS = {"cpu": 1_300_000, "cuda": 1 << 25}
# The same for layers. The rows around a band are computed twice, so it has some rows of its own,
# however wide the map is.
LAYER_ELEMENTS = 2_600_000
LEAST_ROWS = 8


def bands(
    batch: int, height: int, width: int, channels: int, device: str
) -> Iterator[tuple[slice, slice]]:
    """Split an output (batch, height, width, channels) into bands of rows.

    A band holds some rows of one image, or several whole images where these are small.

    Args:
        batch: Number of images.
        height: Height of the output.
        width: Width of the output.
        channels: Number of channels.
        device: Device type, ``"cpu"`` or ``"cuda"``, which determines the size of a band.

    Returns:
        Iterator over ``(images, rows)``, two slices.
    """
    elements = BAND_ELEMENTS.get(device, BAND_ELEMENTS["cuda"])
    return _bands(batch, height, width, channels, elements, least_rows=1)


def _bands(
    batch: int, height: int, width: int, channels: int, elements: int, least_rows: int
) -> Iterator[tuple[slice, slice]]:
    num_rows = min(max(elements // (width * channels), least_rows), height)
    num_images = max(elements // (height * width * channels), 1)
    for first in range(0, batch, num_images):
        for top in range(0, height, num_rows):
            yield (
                slice(first, min(first + num_images, batch)),
                slice(top, min(top + num_rows, height)),
            )


def map_bands(layers: Callable[[Tensor], Tensor], tokens: Tensor, widest: int, halo: int) -> Tensor:
    """Return ``layers(tokens)``, computed in bands of rows where that is faster.

    That is on a CPU with gradients switched off, for which the maps of all bands would have to be
    kept. A graph that is compiled or exported serves all sizes and has no bands. A band is computed
    with the rows around it that it depends on::

        rows                 0 1 2 3 4 5 6 7 8
        bands, halo 1       [0 1 2 3]4
                                   3[4 5 6 7]8
                                           7[8]

    Args:
        layers: Maps (B, H, W, C) to the same shape, for any H. Layers that look across rows pad
            them with zeros.
        tokens: Input (B, H, W, C).
        widest: Channels of the widest map between the layers.
        halo: Rows above and below that a row of the result depends on.
    """
    batch, height, width, _ = tokens.shape
    if (
        tokens.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or batch * height * width * widest <= LAYER_ELEMENTS
    ):
        return layers(tokens)
    results = []
    for images, rows in _bands(batch, height, width, widest, LAYER_ELEMENTS, LEAST_ROWS):
        first = max(rows.start - halo, 0)
        band = layers(tokens[images, first : rows.stop + halo])
        results.append(band[:, rows.start - first :][:, : rows.stop - rows.start].flatten(0, 1))
    return torch.cat(results).view_as(tokens)
