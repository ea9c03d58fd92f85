"""Export a predictor to a file that other runtimes open, and keep it only if it predicts alike."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segformer_pl.atomic import make_writable_folder
from segformer_pl.errors import UserError, brief
from segformer_pl.inference.engine import predict_classes
from segformer_pl.inference.graph import Size, describe, trace
from segformer_pl.inference.predictor import Mask, Predictor, num_bands_of
from segformer_pl.inference.targets import TARGETS, OpenedGraph
from segformer_pl.models.segmenter import Output

REQUIRED = 0.999  # share of equal pixels in every image

Pixels = npt.NDArray[np.uint8]


class ExportedNetwork:
    """A network that was exported alone, as the engine of this package calls it.

    Every test-time protocol can be computed around it, see
    :func:`~segformer_pl.inference.predict_classes`.

    Args:
        graph: The opened graph.
        num_classes: Number of classes.
        output: Kind of the class maps.
    """

    def __init__(self, graph: OpenedGraph, num_classes: int, output: Output) -> None:
        self.graph, self.num_classes, self.output = graph, num_classes, output

    def __call__(self, images: Tensor) -> Tensor:
        """Return the class maps (B, num_classes, h, w) of images (B, in_channels, H, W)."""
        return self.graph.run(images.contiguous())


@dataclass(frozen=True)
class Agreement:
    """How far two predictions of the same images agree.

    Attributes:
        num_images: Number of images.
        share: Share of the pixels with the same class, over all images.
        worst: Name of the image with the lowest share.
        worst_share: Its share.
        classes: Classes that were predicted.
    """

    num_images: int
    share: float
    worst: str
    worst_share: float
    classes: frozenset[int]


def agreement(
    expected: Callable[[Pixels], Mask],
    found: Callable[[Pixels], Mask],
    images: Iterable[tuple[str, Pixels]],
) -> Agreement:
    """Compare two predictions of images.

    Args:
        expected: Function from an image (H, W, C) to the class indices (H, W).
        found: Function to compare with it.
        images: Names and pixels.

    Raises:
        UserError: There is no image.
    """
    equal, total, shares, classes = 0, 0, dict[str, float](), set[int]()
    for name, pixels in images:
        mask = expected(pixels)
        same = found(pixels) == mask
        equal, total = equal + int(same.sum()), total + same.size
        shares[name] = float(same.mean())
        classes |= set(np.unique(mask).tolist())
    if not shares:
        raise UserError("there is no image to compare predictions on; give at least one")
    worst = min(shares, key=lambda name: shares[name])
    return Agreement(len(shares), equal / total, worst, shares[worst], frozenset(classes))


def check_target(file: str | Path, to: str, option: str = "to", file_option: str = "file") -> None:
    """Check the target and the file of an export. The command calls this before it reads weights.

    Args:
        file: Path of the main file to write.
        to: Name of the target.
        option: Option that gave it, for messages.
        file_option: Option that gives the file, for messages.

    Raises:
        UserError: There is no such target, a package is missing, or the file exists or has another
            suffix.
    """
    file = Path(file).expanduser()
    if to not in TARGETS:
        raise UserError(f"{option} {to!r}: choose one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    if file.suffix != target.suffixes[0]:
        raise UserError(
            f"{file_option}: '{file}' does not end in {target.suffixes[0]}, which {to} is; give "
            "such a file"
        )
    for other in (file.with_suffix(suffix) for suffix in target.suffixes):
        if other.exists():
            raise UserError(
                f"{file_option}: '{other}' exists already; remove it or give another path"
            )
    target.check_packages(f"{option} {to}")


def export_graph(
    predictor: Predictor,
    file: str | Path,
    to: str,
    images: Iterable[tuple[str, Pixels]],
    network_only: bool = False,
    size: Size | None = None,
    ignore_index: int | None = None,
) -> Agreement:
    """Export a predictor, run the file and keep it only if it predicts like the predictor.

    Args:
        predictor: Predictor on the CPU.
        file: Path of the main file to write.
        to: ``"torch-export"``, ``"onnx"``, ``"openvino"`` or ``"aoti"``; see ``targets.py``.
        images: Names and pixels (H, W, C) of the images to compare predictions on, of that size if
            it is fixed. At least 99.9 % of the pixels of each have to agree.
        network_only: Whether preprocessing, upsampling and argmax are left out.
        size: Fixed height and width of images in pixels. None: any size.
        ignore_index: Label that training ignored, for the file's description.

    Returns:
        The agreement of both predictions.

    Raises:
        UserError: See :func:`check_target` and :func:`~segformer_pl.inference.graph.trace`; the
            target cannot express the graph; or predictions differ. No file is left behind.
    """
    file = Path(file).expanduser()
    check_target(file, to)
    num_bands_of(predictor.network, "export")
    target = TARGETS[to]
    if not (network_only or target.antialiases or predictor.protocol.image_size is None):
        raise UserError(
            f"the test-time protocol resizes images to {list(predictor.protocol.image_size)} with "
            f"antialiasing (image_size), which {to} lacks; choose onnx or torch-export, or give "
            "--inference.image_size null and resize images before"
        )
    make_writable_folder(file.parent)
    program = trace(predictor, network_only, size, target.any_batch)
    stated = describe(predictor, network_only, size, target.any_batch, ignore_index)
    description = {name: json.dumps(value) for name, value in stated.items()}
    # Write beside the destination and rename at the end, so that files are verified or absent.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as work:
        draft = Path(work) / file.name
        try:
            target.write(program, draft, description)
            graph = target.open(draft)
        except OSError as error:
            raise UserError(
                f"'{file}' cannot be written ({error.strerror or error}); give another place"
            ) from error
        except Exception as error:  # any type: it depends on the target
            raise UserError(
                f"the graph cannot be written as {to} and opened again ({brief(error)}); choose "
                "another target"
            ) from error
        if graph.description != description:
            raise UserError(f"{to} does not return the description that was stored with the graph")
        found = agreement(predictor, _prediction(graph, predictor, network_only), images)
        if found.worst_share < REQUIRED:
            raise UserError(
                f"the exported file predicts other classes than the checkpoint: {found.worst} "
                f"agrees in {found.worst_share:.2%} of its pixels, all {found.num_images} images "
                f"in {found.share:.2%}, and {REQUIRED:.1%} are required; no file was kept"
            )
        del graph  # it may have mapped the file
        for suffix in reversed(target.suffixes):
            os.replace(draft.with_suffix(suffix), file.with_suffix(suffix))
    return found


def _prediction(
    graph: OpenedGraph, predictor: Predictor, network_only: bool
) -> Callable[[Pixels], Mask]:
    """Return the function from an image (H, W, C) to class indices (H, W) that a file computes."""
    if not network_only:
        return lambda pixels: graph.run(torch.from_numpy(pixels)[None])[0].numpy()
    network = ExportedNetwork(graph, predictor.network.num_classes, predictor.network.output)

    def predict(pixels: Pixels) -> Mask:
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        size, protocol = (pixels.shape[0], pixels.shape[1]), predictor.protocol
        return predict_classes(network, images, size, protocol, predictor.normalization)[0].numpy()

    return predict
