"""``export CKPT --to TARGET``: a checkpoint as a graph that other runtimes open."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import Image
from torch import Tensor

from segformer_pl.checkpoints import read_weights
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.commands.input_files import find_files
from segformer_pl.commands.options.export import SPLIT
from segformer_pl.commands.predict import MASKS, OVERLAYS, changed_protocol
from segformer_pl.commands.validation_split import ValidationSplit
from segformer_pl.data import shapes
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.errors import counted
from segformer_pl.inference import Predictor
from segformer_pl.inference.exporting import Pixels, check_target, export_graph
from segformer_pl.inference.graph import Size
from segformer_pl.inference.predictor import num_bands_of
from segformer_pl.inference.targets import TARGETS
from segformer_pl.models.segmenter import Network

Item = TypeVar("Item")

# Sides of generated images, at least; odd ones and both orientations
GENERATED_SIZES = ((128, 128), (97, 161), (192, 96), (131, 65))


def run(options: Namespace) -> None:
    """Run ``export CKPT --to TARGET`` and print how far the file agrees with the checkpoint.

    Args:
        options: Options as ``options/export.py`` parses them.

    Raises:
        UserError: The checkpoint or an image cannot be read, the network cannot be exported, or
            the file predicts other classes.
    """
    suffix = TARGETS[options.to].suffixes[0]
    file = Path(options.output or Path(options.ckpt).with_suffix(suffix)).expanduser()
    check_target(file, options.to, "--to", "--output")
    weights = read_weights(options.ckpt, options.state)
    predictor = Predictor.from_weights(weights, options.network)
    predictor.protocol = changed_protocol(predictor.protocol, options.changes)
    size = None if options.size is None else (options.size[0], options.size[1])
    images = _images(options, predictor.network)
    found = export_graph(
        predictor,
        file,
        options.to,
        ((name, _resized(pixels, size)) for name, pixels in images),
        options.network_only,
        size,
        weights.task.get("ignore_index"),
    )
    sys.stdout.write(
        f"written to '{file}': {found.share:.3%} of the pixels of "
        f"{counted(found.num_images, 'image')} get "
        f"the checkpoint's class (worst image: {found.worst_share:.3%}, {found.worst}); "
        f"{len(found.classes)} of {len(predictor.class_names)} classes occur in them\n"
    )
    if len(found.classes) == 1:
        sys.stdout.write("with a single class this shows little; --verify images with more\n")


def _images(options: Namespace, network: Network) -> Iterator[tuple[str, Pixels]]:
    """Return names and pixels of the images to compare predictions on, read one by one.

    Raises:
        UserError: There is no such image or split, or images cannot have the network's channels.
    """
    given, num_images = options.verify, options.num_images
    num_bands = num_bands_of(network, "CKPT")
    if given is None:
        return _generated(network.min_size, num_bands)
    if given == SPLIT and not Path(given).exists():
        split = ValidationSplit(load_data(RunCheckpoint.read(options.ckpt, "CKPT")), None)
        samples = (split.samples[position] for position in _spread(split.positions, num_images))
        return ((f"image {sample['id']}", _to_bytes(sample["image"])) for sample in samples)
    # Where `predict` has written into the folder, the images are not among its outputs.
    outputs = [Path(given).expanduser() / kind for kind in (MASKS, OVERLAYS)]
    outputs = outputs if all(folder.is_dir() for folder in outputs) else []
    files = _spread(list(find_files(given, "--verify", outputs=outputs)), num_images)
    return ((f"'{file}'", EncodedImage.read(file, num_bands).decode()) for file in files)


def _to_bytes(image: Tensor) -> Pixels:
    """Return an image (C, H, W) in 0 to 1 as it was decoded, (H, W, C)."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _generated(min_size: int, num_bands: int) -> Iterator[tuple[str, Pixels]]:
    """Yield images of `shapes`, enlarged to different sizes; a fourth band repeats the first."""
    for number, sides in enumerate(GENERATED_SIZES):
        height, width = (max(side, min_size) for side in sides)
        pixels = shapes.draw(np.random.default_rng(number)).image
        pixels = pixels[..., [0, 1, 2, 0][:num_bands]]
        yield f"generated image {number + 1}", _resized(pixels, (height, width))


def _resized(pixels: Pixels, size: Size | None) -> Pixels:
    if size is None or pixels.shape[:2] == size:
        return pixels
    # Band by band, because Pillow would weight RGB by a fourth band.
    bands = (Image.fromarray(band) for band in np.moveaxis(pixels, 2, 0))
    return np.stack([np.asarray(band.resize((size[1], size[0]))) for band in bands], axis=2)


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return at most this number of items, evenly spaced."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]
