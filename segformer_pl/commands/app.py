"""``app``: a page in the browser on which images and videos are dropped to be segmented."""

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import Namespace
from matplotlib import colormaps

from segformer_pl.analysis.overlays import (
    Palette,
    Pixels,
    count_pixels,
    draw_classes,
    enlargement,
    share_text,
)
from segformer_pl.analysis.style import css_color, printable
from segformer_pl.atomic import atomic_write
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.predict import return_large_blocks
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.errors import UserError
from segformer_pl.inference import Predictor
from segformer_pl.inference.predictor import check_takes_rgb
from segformer_pl.video_file import Video, VideoWriter, is_video

PREVIEW_SECONDS = 1.0  # between two frames that are shown while a video is segmented
KEPT_SECONDS = 24 * 3600  # for which dropped files and their results can be looked at
CONFIDENCE_COLORS = (255 * colormaps["viridis"](np.arange(256))[:, :3]).round().astype(np.uint8)


def run(options: Namespace) -> None:
    """Run ``app --weights SOURCE``: serve the page until Ctrl-C.

    Args:
        options: Options as ``options/app.py`` parses them.

    Raises:
        UserError: Gradio is not installed, the weights cannot be read, or the address is in use.
    """
    with tempfile.TemporaryDirectory(prefix="segformer_pl_app_") as folder:
        predictor = Predictor.load(options.weights, options.state)
        check_takes_rgb(predictor.network, "--weights", "what the page is given")
        predictor.to(resolve_device(options.device))
        return_large_blocks()
        gradio = _import_gradio(folder)
        _reach_without_proxy("127.0.0.1", "localhost", options.server_name)
        page = build_page(gradio, predictor, Path(options.weights).name, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=options.server_name,
                server_port=options.server_port,
                share=False,  # also where the environment asks for it
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
            )
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on port {options.server_port or '7860 to 7959'} of "
                f"{options.server_name}; give another --server_port, or another --server_name"
            ) from error
        sys.stdout.write(f"open {address} in a browser; Ctrl-C ends this command\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            page.close(verbose=False)


def _import_gradio(folder: str) -> ModuleType:
    """Import Gradio so that it sends no statistics and keeps its files in a folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise UserError(
            f"app needs the package {error.name}, which is not installed; install it with pip "
            "install 'segformer_pl[app]'"
        ) from error


def _reach_without_proxy(*hosts: str) -> None:
    """Let requests to these hosts bypass a proxy: Gradio asks whether its own server is there."""
    excepted = os.environ.get("no_proxy", os.environ.get("NO_PROXY"))
    os.environ["no_proxy"] = ",".join(filter(None, [excepted, *hosts]))


class Segmented(NamedTuple):
    """An image or a frame as the page shows it.

    Attributes:
        overlay: Image under the colours of the classes, (H, W, 3) RGB.
        confidence: Probability of the predicted class as a colour, (H, W, 3) RGB.
        table: HTML table of the classes that occur; those of a video up to this frame.
    """

    overlay: Pixels
    confidence: Pixels
    table: str


class Segmentation:
    """Segments one image, or the frames of one video, and sums up the classes.

    Args:
        predictor: The network with its classes.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.names = predictor.class_names
        self.palette: Palette = predictor.palette or distinct_colors(len(self.names))
        self.counts = np.zeros(len(self.names), np.int64)  # pixels of each class
        self.sums = np.zeros(len(self.names))  # of their confidence

    def image(self, file: Path) -> Segmented:
        """Segment an image file; the result of a small image is enlarged.

        Raises:
            UserError: It cannot be read or segmented.
        """
        pixels = EncodedImage(file.read_bytes(), file.name).decode()
        return self._segment(pixels, file.name, enlargement(max(pixels.shape)))

    def video(self, file: Path, target: Path) -> Iterator[tuple[Segmented, int | None]]:
        """Segment a video and write it with its overlay.

        Args:
            file: Video file.
            target: MP4 file to write, complete when the iteration ends.

        Yields:
            Each frame, and the number of frames that the file states, if it does.

        Raises:
            UserError: The video cannot be read or segmented.
        """
        with (
            Video(file, file.name) as video,
            atomic_write(target) as stream,
            VideoWriter(stream, video) as writer,
        ):
            for number, frame in enumerate(video):
                segmented = self._segment(frame.pixels, f"{file.name}, frame {number}")
                writer.write(frame._replace(pixels=segmented.overlay))
                yield segmented, video.num_frames

    def _segment(self, pixels: Pixels, where: str, factor: int = 1) -> Segmented:
        try:
            labels, confidence = self.predictor.confidence(pixels)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{where}: {pixels.shape[0]}x{pixels.shape[1]} pixels need more memory than the "
                "device has; give a smaller one, or start the page with --device cpu"
            ) from error
        except ValueError as error:  # such as an image smaller than the network accepts
            raise UserError(f"{where}: {error}") from error
        flat, weights = labels.ravel(), confidence.ravel()
        self.counts += count_pixels(labels, len(self.names))
        self.sums += np.bincount(flat, weights, minlength=len(self.names))
        levels = (255 * confidence.astype(np.float32)).round().astype(np.uint8)
        overlay = draw_classes(_enlarged(pixels, factor), _enlarged(labels, factor), self.palette)
        return Segmented(overlay, CONFIDENCE_COLORS[_enlarged(levels, factor)], self._table())

    def _table(self) -> str:
        """Return the classes that occur with their colours, the largest first, as HTML."""
        rows = []
        for index in np.argsort(-self.counts, kind="stable")[: np.count_nonzero(self.counts)]:
            name = escape(printable(self.names[index], 60))
            share = share_text(self.counts[index] / self.counts.sum())
            certainty = self.sums[index] / self.counts[index]
            rows.append(
                f'<tr><td style="background:{css_color(self.palette[index])};width:2em"></td>'
                f"<td>{name}</td><td>{escape(share)}</td><td>{certainty:.2f}</td></tr>"
            )
        heads = "<tr><th></th><th>class</th><th>share of pixels</th><th>mean confidence</th></tr>"
        return f'<table style="width:100%">{heads}{"".join(rows)}</table>'


def _enlarged(pixels: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def build_page(gradio: ModuleType, predictor: Predictor, name: str, folder: Path) -> Any:
    """Return the page as Gradio's ``Blocks``, to be launched.

    Args:
        gradio: The imported package.
        predictor: The network with its classes.
        name: Name of the weights, for the title.
        folder: Folder for the videos that are written.
    """

    def segment(file: str, progress: Any = gradio.Progress()) -> Iterator[list[Any]]:  # noqa: B008
        path, segmentation = Path(file), Segmentation(predictor)
        try:
            if not is_video(path):
                yield outputs(segmentation.image(path))
                return
            target = Path(tempfile.mkdtemp(dir=folder), f"{path.stem}.mp4")
            shown = -PREVIEW_SECONDS
            for number, (segmented, total) in enumerate(segmentation.video(path, target), 1):
                progress((number, total), unit="frames")
                if time.monotonic() - shown >= PREVIEW_SECONDS:
                    yield outputs(segmented)
                    shown = time.monotonic()
            yield outputs(segmented, target)
        except UserError as error:
            # Gradio shows a message as HTML.
            message = escape(str(error), quote=False)
            raise gradio.Error(message, duration=None, print_exception=False) from error

    def outputs(segmented: Segmented, video: Path | None = None) -> list[Any]:
        return [
            gradio.Image(segmented.overlay, visible=video is None),
            gradio.Video(video, visible=video is not None),
            gradio.Image(segmented.confidence, visible=video is None),
            segmented.table,
        ]

    with gradio.Blocks(
        title=name, analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)
    ) as page:
        gradio.HTML(f"<h2>{escape(printable(name))}</h2>")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                dropped = gradio.File(label="Image or video", height=180)
                classes = gradio.HTML(label="Classes")
            with gradio.Column(scale=2, min_width=320):
                buttons = ["download", "fullscreen"]
                overlay = gradio.Image(
                    label="Classes", format="png", interactive=False, buttons=buttons
                )
                video = gradio.Video(label="Classes", interactive=False, visible=False)
                confidence = gradio.Image(
                    label="Confidence, from 0 (dark) to 1 (bright)",
                    format="png",
                    interactive=False,
                    buttons=buttons,
                )
        dropped.upload(segment, dropped, [overlay, video, confidence, classes], api_name="segment")
    return page
