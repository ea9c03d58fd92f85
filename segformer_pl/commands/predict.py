"""``predict``: masks, overlays and probabilities of image files and videos."""

import ctypes
import sys
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

from segformer_pl.analysis.overlays import (
    Palette,
    Pixels,
    count_pixels,
    draw_classes,
    draw_legend,
    write_overlay,
)
from segformer_pl.atomic import WriteError, atomic_write, make_writable_folder
from segformer_pl.checkpoints import Weights, read_weights
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.input_files import find_files
from segformer_pl.commands.options.predict import predict_parser
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.decoding import EncodedImage, NumBands
from segformer_pl.data.image_suffixes import IMAGE_SUFFIXES
from segformer_pl.errors import INTERRUPTED, UserError, counted
from segformer_pl.inference import Inference, Predictor
from segformer_pl.inference.predictor import check_takes_rgb, num_bands_of
from segformer_pl.video_file import (
    VIDEO_SUFFIXES,
    Video,
    VideoWriter,
    check_video_support,
    is_video,
)

MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MMAP_THRESHOLD = 4 << 20  # bytes

TrainIds = npt.NDArray[np.uint8 | np.uint16]


def run(options: Namespace) -> None:
    """Run ``predict --weights SOURCE --input IMAGES --output FOLDER`` and write the predictions.

    The exit status is 1 if an image or a video was skipped and 2 if an argument is wrong.

    Args:
        options: Options as ``options/predict.py`` parses them.

    Raises:
        WriteError: The output folder cannot be written to.
    """
    output = Path(options.output)
    kinds = (MASKS, OVERLAYS, *([PROBABILITIES] if options.probabilities else []))
    try:
        if (options.ckpt is None) == (options.weights is None):
            raise UserError("give one of --ckpt and --weights: the network that predicts")
        files = find_files(
            options.input,
            "--input",
            (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES),
            [output / kind for kind in (MASKS, OVERLAYS, PROBABILITIES)],
        )
        if video := next(filter(is_video, files), None):
            check_video_support(video)
        device = resolve_device(options.device)
        return_large_blocks()
        predictor = Predictor.from_weights(_weights(options), options.network).to(device)
        option = "--weights" if options.ckpt is None else "--ckpt"
        num_bands = num_bands_of(predictor.network, option)
        if video:
            check_takes_rgb(predictor.network, option, f"'{video}'")
        predictor.protocol = changed_protocol(predictor.protocol, options.changes)
    except ValueError as error:
        predict_parser().error(str(error))
    for folder in (output, *(output / kind for kind in kinds)):
        make_writable_folder(folder, "--output")
    writer = PredictionFiles(output, predictor, num_bands, options.probabilities)
    num_skipped = 0
    progress = tqdm(files.items(), "predicting", unit="file")
    try:
        for file, name in progress:
            try:
                (writer.write_video if is_video(file) else writer.write_image)(file, name)
            except WriteError as error:
                if not error.is_name_error:  # a full disk, for example, stops all other files too
                    raise
                num_skipped += 1
                tqdm.write(f"skipped: {file}: {error}", file=sys.stderr)
            except UserError as error:
                num_skipped += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        progress.close()
        sys.stderr.write(
            f"interrupted after {counted(writer.num_masks, 'mask')}; what is written is complete\n"
        )
        sys.exit(INTERRUPTED)
    sys.stdout.write(
        f"{counted(writer.num_masks, 'mask')} in {output / MASKS}, "
        f"overlays in {output / OVERLAYS}; skipped: {num_skipped}\n"
    )
    if num_skipped:
        sys.exit(1)


def _weights(options: Namespace) -> Weights:
    if options.ckpt is None:
        return read_weights(options.weights, options.state)
    if options.state is not None:
        raise UserError("--state is for --weights, as a run's checkpoint holds one network")
    try:
        return RunCheckpoint.read(options.ckpt).weights()
    except UserError as error:
        if not Path(options.ckpt).exists():
            raise
        raise UserError(f"{error}; other weights are given with --weights") from error


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


def return_large_blocks() -> None:
    """Make the C library return freed blocks of 4 MiB and more to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB for reuse. The activations of one window
    after another fragment that memory, and the process grows to several times what it uses.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


class PredictionFiles:
    """Predicts images and videos and writes the results, each file completely or not at all.

    Args:
        folder: Folder that contains the folders of masks, overlays and probabilities.
        predictor: The network with its classes.
        with_probabilities: Whether to write the probabilities of all classes too.

    Attributes:
        num_masks: Number of masks written so far.
    """

    def __init__(
        self, folder: Path, predictor: Predictor, num_bands: NumBands, with_probabilities: bool
    ) -> None:
        self.folder = folder
        self.predictor = predictor
        self.num_bands = num_bands
        self.with_probabilities = with_probabilities
        self.class_names = predictor.class_names
        self.palette: Palette = predictor.palette or distinct_colors(len(self.class_names))
        self.num_masks = 0

    def write_image(self, file: Path, name: Path) -> None:
        """Write the overlay, the probabilities and the mask of an image.

        The mask is written last, so an image with a mask is complete.

        Args:
            file: Image file.
            name: Relative path of the outputs, without their suffixes.

        Raises:
            UserError: The image cannot be read or segmented.
            WriteError: A file cannot be written.
        """
        pixels = EncodedImage.read(file, self.num_bands).decode()
        labels, probabilities = self._segment(pixels, str(file))
        with atomic_write(self._file(OVERLAYS, name, ".png")) as stream:
            rgb = np.ascontiguousarray(pixels[..., :3])
            write_overlay(stream, rgb, labels, self.class_names, self.palette)
        self._write_labels(name, labels, probabilities)

    def write_video(self, file: Path, name: Path) -> None:
        """Write masks and probabilities of the frames of a video, its overlay and its legend.

        Only one frame is held at a time. The overlay appears after the last frame, so a video with
        an overlay is complete.

        Args:
            file: Video file.
            name: Relative path of the outputs: a folder for the masks and the probabilities, and
                the overlay without its suffix.

        Raises:
            UserError: The video cannot be read or segmented.
            WriteError: A file cannot be written.
        """
        counts = np.zeros(len(self.class_names), np.int64)
        with (
            Video(file) as video,
            atomic_write(self._file(OVERLAYS, name, ".mp4")) as stream,
            VideoWriter(stream, video) as overlay,
            tqdm(video, file.name, video.num_frames, leave=False, unit="frame") as frames,
        ):
            for number, frame in enumerate(frames):
                labels, probabilities = self._segment(frame.pixels, f"{file}, frame {number}")
                counts += count_pixels(labels, len(self.class_names))
                drawn = draw_classes(frame.pixels, labels, self.palette)
                overlay.write(frame._replace(pixels=drawn))
                self._write_labels(name / f"{number:06d}", labels, probabilities)
                width = labels.shape[1]
        legend = draw_legend(counts, self.class_names, self.palette, width)
        with atomic_write(self._file(OVERLAYS, name, ".png")) as stream:
            legend.save(stream, format="PNG")

    def _segment(
        self, pixels: Pixels, where: str
    ) -> tuple[TrainIds, npt.NDArray[np.float16] | None]:
        """Return train ids (H, W), and probabilities (num_classes, H, W) or None."""
        height, width = pixels.shape[:2]
        try:
            if self.with_probabilities:
                return self.predictor.probabilities(pixels)
            return self.predictor(pixels), None
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{where}: {height}x{width} pixels need more memory than the device has; give "
                "--inference.window and --inference.stride, or --device cpu"
            ) from error
        except ValueError as error:  # such as an image smaller than the network accepts
            raise UserError(f"{where}: {error}") from error

    def _write_labels(
        self, name: Path, labels: TrainIds, probabilities: npt.NDArray[np.float16] | None
    ) -> None:
        """Write the probabilities, if given, and train ids: 16-bit grey if they are uint16."""
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
        self.num_masks += 1

    def _file(self, kind: str, name: Path, suffix: str) -> Path:
        return self.folder / kind / f"{name}{suffix}"
