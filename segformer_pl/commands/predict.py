"""``predict``: masks, overlays and probabilities of image files."""

import ctypes
import glob
import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import Namespace
from PIL import Image
from tqdm import tqdm

from segformer_pl.analysis.overlays import Palette, Pixels, write_overlay
from segformer_pl.atomic import WriteError, atomic_write, make_writable_folder
from segformer_pl.checkpoints import Weights, read_weights
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.options.predict import predict_parser
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.data.files import check_readable
from segformer_pl.data.image_suffixes import IMAGE_SUFFIXES
from segformer_pl.errors import INTERRUPTED, UserError, counted
from segformer_pl.inference import Inference, Predictor
from segformer_pl.inference.predictor import check_takes_rgb

MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MMAP_THRESHOLD = 4 << 20  # bytes

TrainIds = npt.NDArray[np.uint8 | np.uint16]


def run(options: Namespace) -> None:
    """Run ``predict --weights SOURCE --input IMAGES --output FOLDER`` and write the predictions.

    The exit status is 1 if an image was skipped and 2 if an argument is wrong.

    Args:
        options: Options as ``options/predict.py`` parses them.

    Raises:
        WriteError: The output folder cannot be written to.
    """
    try:
        if (options.ckpt is None) == (options.weights is None):
            raise UserError("give one of --ckpt and --weights: the network that predicts")
        output = Path(options.output)
        images = find_images(options.input, output)
        device = resolve_device(options.device)
        _return_large_blocks()
        predictor = Predictor.from_weights(_weights(options), options.network).to(device)
        check_takes_rgb(predictor.network, "--weights" if options.ckpt is None else "--ckpt")
        predictor.protocol = changed_protocol(predictor.protocol, options.changes)
    except ValueError as error:
        predict_parser().error(str(error))
    kinds = (MASKS, OVERLAYS, *([PROBABILITIES] if options.probabilities else []))
    for folder in (output, *(output / kind for kind in kinds)):
        make_writable_folder(folder, "--output")
    palette = predictor.palette or distinct_colors(len(predictor.class_names))
    writer = PredictionFiles(output, predictor.class_names, palette)
    num_written = num_skipped = 0
    progress = tqdm(images.items(), "predicting", unit="image")
    try:
        for file, name in progress:
            try:
                pixels = EncodedImage.read(file).decode()
                labels, probabilities = _segment(
                    predictor, pixels, options.probabilities, str(file)
                )
            except UserError as error:
                num_skipped += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            try:
                writer.write(name, pixels, labels, probabilities)
            except WriteError as error:
                if not error.is_name_error:  # a full disk, for example, stops all other files too
                    raise
                num_skipped += 1
                tqdm.write(f"skipped: {file}: {error}", file=sys.stderr)
                continue
            num_written += 1
    except KeyboardInterrupt:
        progress.close()
        sys.stderr.write(
            f"interrupted after {counted(num_written, 'image')}; their files are complete\n"
        )
        sys.exit(INTERRUPTED)
    sys.stdout.write(
        f"{num_written} masks in {output / MASKS}, overlays in {output / OVERLAYS}; "
        f"skipped: {num_skipped}\n"
    )
    if num_skipped:
        sys.exit(1)


def _weights(options: Namespace) -> Weights:
    if options.ckpt is None:
        return read_weights(options.weights, options.state)
    if options.state is not None:
        raise UserError("--state is for --weights, as a run's checkpoint holds one network")
    return RunCheckpoint.read(options.ckpt).weights()


def find_images(pattern: str, output: Path, option: str = "--input") -> dict[Path, Path]:
    """Return the image files of a path or a pattern, sorted, with the names of their outputs.

    Hidden files, and files that an earlier call wrote to ``output``, are left out::

        in/a.jpg, in/b.jpg, in/b.png, in/sub/a.png    input "in"
        a         b.jpg     b.png     sub/a           names of the outputs

    Args:
        pattern: A file, a folder that is searched recursively, or a glob pattern.
        output: Folder of the outputs.
        option: Command-line option that gave the pattern, for messages.

    Returns:
        Input file -> relative path of its outputs, without the suffix that each of them gets. No
        two of these paths are equal.

    Raises:
        UserError: There is no such file or folder, or nothing matches the pattern.
    """
    if not pattern:
        raise UserError(f"{option} is empty; give an image, a folder or a pattern")
    path = Path(pattern).expanduser()
    remedy = "give an image, a folder of images, or a quoted pattern like 'photos/**/*.jpg'"
    if path.is_file():
        return _with_output_names([path], path.parent, option)
    if path.is_dir():
        check_readable(path, "--input")
        base, matches = path, glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)
        matches = [file for file in matches if Path(file).suffix.lower() in IMAGE_SUFFIXES]
        missing = f"folder {pattern!r} contains no image ({', '.join(IMAGE_SUFFIXES)})"
    elif glob.has_magic(pattern):
        fixed = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        base, matches = Path(*path.parts[:fixed]), glob.glob(str(path), recursive=True)
        missing = f"no file matches {pattern!r}"
    else:
        raise UserError(f"{option}: there is no file or folder {pattern!r}; {remedy}")
    own_folders = [(output / folder).resolve() for folder in (MASKS, OVERLAYS, PROBABILITIES)]
    files = [
        file
        for file in sorted(Path(os.path.normpath(file)) for file in matches)
        # A dangling link is kept, so that it is reported when it cannot be read.
        if (file.is_file() or not file.exists())
        and not any(file.resolve().is_relative_to(folder) for folder in own_folders)
    ]
    if not files:
        raise UserError(f"{option}: {missing}; {remedy}")
    return _with_output_names(files, Path(os.path.normpath(base)), option)


def _with_output_names(files: list[Path], base: Path, option: str) -> dict[Path, Path]:
    """Map files to their paths below ``base``, without suffix where that is unambiguous."""
    relative = {file: Path(os.path.relpath(file, base)) for file in files}
    outside = next((file for file, name in relative.items() if ".." in name.parts), None)
    if outside is not None:
        raise UserError(
            f"{option}: '{outside}' is not below '{base}', where the pattern starts; use '..' "
            "only before the first wildcard"
        )
    full_names = set(relative.values())
    count = Counter(name.with_suffix("") for name in full_names)
    return {
        file: name
        if count[stem := name.with_suffix("")] > 1 or stem in full_names - {name}
        else stem
        for file, name in relative.items()
    }


def changed_protocol(protocol: Inference, changes: dict[str, Any]) -> Inference:
    """Return an evaluation protocol with some arguments changed.

    If the window changes, stride and window weights return to their defaults unless given. Of the
    two sizes that exclude each other, the one given replaces the other.
    """
    arguments = {field.name: getattr(protocol, field.name) for field in fields(protocol)}
    for given, other in (("base_size", "image_size"), ("image_size", "base_size")):
        if given in changes:
            del arguments[other]
    if "window" in changes:
        del arguments["stride"], arguments["window_weights"]
    return Inference(**arguments | changes)


def _return_large_blocks() -> None:
    """Make the C library return freed blocks of 4 MiB and more to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB for reuse. The activations of one window
    after another fragment that memory, and the process grows to several times what it uses.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def _segment(
    predictor: Predictor, pixels: Pixels, with_probabilities: bool, file: str
) -> tuple[TrainIds, npt.NDArray[np.float16] | None]:
    """Return train ids (H, W), and probabilities (num_classes, H, W) or None."""
    height, width = pixels.shape[:2]
    try:
        if with_probabilities:
            return predictor.probabilities(pixels)
        return predictor(pixels), None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{file}: {height}x{width} pixels need more memory than the device has; give "
            "--inference.window and --inference.stride, or --device cpu"
        ) from error
    except ValueError as error:  # such as an image smaller than the network accepts
        raise UserError(f"{file}: {error}") from error


class PredictionFiles:
    """Writes the predictions of images, each file completely or not at all.

    Args:
        folder: Folder that contains the folders of masks, overlays and probabilities.
        class_names: Name of each class, in the order of train ids.
        palette: RGB colour of each class, 0 to 255, in the order of train ids.
    """

    def __init__(self, folder: Path, class_names: list[str], palette: Palette) -> None:
        self.folder = folder
        self.class_names = class_names
        self.palette = palette

    def write(
        self,
        name: Path,
        pixels: Pixels,
        labels: TrainIds,
        probabilities: npt.NDArray[np.float16] | None,
    ) -> None:
        """Write the overlay, the probabilities if given, and the mask of an image.

        The mask is written last, so an image with a mask is complete.

        Args:
            name: Relative path of the files, without their suffixes.
            pixels: Image, (H, W, 3) RGB.
            labels: Train ids (H, W): uint8 is written as palette indices, uint16 as 16-bit grey.
            probabilities: Probabilities (num_classes, H, W), or None.

        Raises:
            WriteError: A file cannot be written.
        """
        with atomic_write(self._file(OVERLAYS, name, ".png")) as stream:
            write_overlay(stream, pixels, labels, self.class_names, self.palette)
        if probabilities is not None:
            with atomic_write(self._file(PROBABILITIES, name, ".npz")) as stream:
                np.savez_compressed(
                    stream, probabilities=probabilities, class_names=self.class_names
                )
        mask = Image.fromarray(labels)
        if labels.dtype == np.uint8:
            mask.putpalette(np.asarray(self.palette, np.uint8).tobytes())
        with atomic_write(self._file(MASKS, name, ".png")) as stream:
            mask.save(stream, format="PNG")

    def _file(self, kind: str, name: Path, suffix: str) -> Path:
        return self.folder / kind / f"{name}{suffix}"
