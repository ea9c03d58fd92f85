"""``predict``: masks, overlays and probabilities for pictures of your own."""

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
from PIL import Image
from tqdm import tqdm

from segformer_pl.analysis.overlays import Palette, Pixels, write_overlay
from segformer_pl.atomic import WriteError, atomic_write, make_writable_folder
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.parser import PROG, SegformerArgumentParser
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.data.image_folder import PICTURES
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor

MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
INTERRUPTED = 130  # what shells report for Ctrl-C
M_MMAP_THRESHOLD = -3  # glibc, malloc.h
LARGE_BLOCK = 4 << 20  # bytes

TrainIds = npt.NDArray[np.uint8 | np.uint16]


def predict(arguments: list[str]) -> None:
    """``predict --ckpt FILE --input PICTURES --output FOLDER``: what a network says of pictures.

    Exits with 1 if a picture was skipped, with 2 if an argument is wrong.
    """
    parser = SegformerArgumentParser(
        prog=f"{PROG} predict",
        description="Segment pictures with the network of a run. Writes masks/NAME.png, the train "
        "id of every pixel at full size, with the data set's palette (from 257 classes on 16-bit "
        "grey without one), and overlays/NAME.png for the eye; small pictures are enlarged there. "
        "NAME is the picture's path below the folder or below the fixed part of the pattern, "
        "without suffix; pictures that differ in nothing else keep it (a.jpg.png). Pictures are "
        "turned upright by their EXIF data, and so are the masks; transparency is ignored; of 16 "
        "bits the upper 8 count; of several frames the first. What cannot be read, or written "
        "under its name, is reported and skipped, and the exit code is then 1. Files that are "
        "there already are written anew. Of --inference, whatever defaults are listed, what is "
        "not given is as in the run.",
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run")
    parser.add_argument(
        "--input",
        required=True,
        help="a picture; a folder, searched with all below it for pictures "
        f"({', '.join(PICTURES)}); or a pattern in quotes, such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write probabilities/NAME.npz: `probabilities`, float16 of shape (classes, "
        "height, width), and `class_names`; takes memory for every class of every pixel",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where the network runs; auto is CUDA where there is some",
    )
    # Their defaults are the run's own, known once the checkpoint is read.
    parser.add_class_arguments(Inference, "inference")
    options = parser.parse_args(arguments)
    changes = parser.parse_args(arguments, defaults=False).get("inference")
    try:
        pictures = find_pictures(options.input, options.output)
        device = resolve_device(options.device)
        _return_large_blocks()
        predictor = Predictor.from_weights(RunCheckpoint.read(options.ckpt).weights()).to(device)
        _check_channels(predictor)
        predictor.protocol = changed_protocol(
            predictor.protocol, changes.as_dict() if changes else {}
        )
    except ValueError as error:
        parser.error(str(error))
    kinds = (MASKS, OVERLAYS, *([PROBABILITIES] if options.probabilities else []))
    for folder in (options.output, *(options.output / kind for kind in kinds)):
        make_writable_folder(folder, "--output")
    writer = PredictionFiles(options.output, predictor.class_names, predictor.palette or [])
    num_written = num_skipped = 0
    progress = tqdm(pictures.items(), "predicting", unit="picture")
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
                if not error.is_name_error:  # but of the disk or the folder, as of all others
                    raise
                num_skipped += 1
                tqdm.write(f"skipped: {file}: {error}", file=sys.stderr)
                continue
            num_written += 1
    except KeyboardInterrupt:
        progress.close()
        sys.stderr.write(f"interrupted after {num_written} pictures; what is written is whole\n")
        sys.exit(INTERRUPTED)
    sys.stdout.write(
        f"{num_written} masks in {options.output / MASKS}, overlays in "
        f"{options.output / OVERLAYS}; skipped: {num_skipped}\n"
    )
    if num_skipped:
        sys.exit(1)


def find_pictures(pattern: str, output: Path) -> dict[Path, Path]:
    """The files that a path or a pattern means, in sorted order, each with the name of its outputs.

    Hidden files, and what an earlier call wrote to ``output``, belong to no folder and no pattern.

    Returns:
        Relative path of the outputs, without the suffix that they get, by file. No two are equal.

    Raises:
        UserError: There is no such file or folder, or nothing matches.
    """
    if not pattern:
        raise UserError("--input is empty; give a picture, a folder or a pattern")
    path = Path(pattern).expanduser()
    remedy = "give a picture, a folder of pictures, or a pattern in quotes like 'photos/**/*.jpg'"
    if path.is_file():
        return _named([path], path.parent)
    if path.is_dir():
        base, found = path, glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)
        found = [file for file in found if Path(file).suffix.lower() in PICTURES]
        missing = f"folder {pattern!r} holds no picture ({', '.join(PICTURES)})"
    elif glob.has_magic(pattern):
        fixed = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        base, found = Path(*path.parts[:fixed]), glob.glob(str(path), recursive=True)
        missing = f"no file matches {pattern!r}"
    else:
        raise UserError(f"--input: there is no file or folder {pattern!r}; {remedy}")
    ours = [(output / folder).resolve() for folder in (MASKS, OVERLAYS, PROBABILITIES)]
    files = [
        file
        for file in sorted(Path(os.path.normpath(file)) for file in found)
        # A link to nowhere counts: it is reported, not passed over in silence.
        if (file.is_file() or not file.exists())
        and not any(file.resolve().is_relative_to(folder) for folder in ours)
    ]
    if not files:
        raise UserError(f"--input: {missing}; {remedy}")
    return _named(files, Path(os.path.normpath(base)))


def _named(files: list[Path], base: Path) -> dict[Path, Path]:
    """Without suffix, unless another picture has or would get the same name."""
    relative = {file: Path(os.path.relpath(file, base)) for file in files}
    outside = next((file for file, name in relative.items() if ".." in name.parts), None)
    if outside is not None:
        raise UserError(
            f"--input: '{outside}' is not below '{base}', where the pattern starts; use '..' "
            "before its first wildcard only"
        )
    whole = set(relative.values())
    count = Counter(name.with_suffix("") for name in whole)
    return {
        file: name if count[short := name.with_suffix("")] > 1 or short in whole - {name} else short
        for file, name in relative.items()
    }


def _check_channels(predictor: Predictor) -> None:
    num_channels = predictor.network.in_channels
    if num_channels != 3:
        raise UserError(
            f"--ckpt: the network takes {num_channels} channels, but pictures are read with 3 "
            "(RGB); give a checkpoint of a network with in_channels 3"
        )


def changed_protocol(of_the_run: Inference, changes: dict[str, Any]) -> Inference:
    """Return a run's own protocol with some arguments changed."""
    arguments = {field.name: getattr(of_the_run, field.name) for field in fields(of_the_run)}
    if "window" in changes:  # these belong to the run's windows
        del arguments["stride"], arguments["window_weights"]
    return Inference(**arguments | changes)


def _return_large_blocks() -> None:
    """Have the C library return freed memory of large blocks to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB for later. The activations of window after
    window leave holes between them, and the process grows to several times what it uses.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _segment(
    predictor: Predictor, pixels: Pixels, with_probabilities: bool, where: str
) -> tuple[TrainIds, npt.NDArray[np.float16] | None]:
    """Train ids (H, W) and, if asked for, probabilities (num_classes, H, W)."""
    height, width = pixels.shape[:2]
    try:
        if with_probabilities:
            return predictor.probabilities(pixels)
        return predictor(pixels), None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{where}: {height}x{width} pixels need more memory than the device has; give "
            "--inference.window and --inference.stride, or --device cpu"
        ) from error
    except ValueError as error:  # such as: smaller than the network can take
        raise UserError(f"{where}: {error}") from error


class PredictionFiles:
    """Writes what the network says of a picture, each file whole or not at all.

    Args:
        folder: Where to.
        class_names: By train id.
        palette: RGB 0-255 by train id.
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
        """Write overlay, probabilities if there are any, and mask.

        The mask comes last: where there is one, the picture is done.

        Args:
            name: Relative path, without the suffix of its own that each file gets.
            pixels: (H, W, 3) RGB.
            labels: Train ids (H, W); uint16 becomes 16-bit grey, uint8 indices of the palette.
            probabilities: (num_classes, H, W).

        Raises:
            WriteError: a file cannot be written, in one sentence.
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
