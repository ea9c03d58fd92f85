"""Read and write video files frame by frame, with PyAV, the package ``av`` of the extra ``video``.

PyAV is imported when a video is opened, so that commands work on images without it. OpenCV, which
the package needs anyway, reads videos too, but its wheels cannot write H.264, keep no times of
frames and report no reason when a file cannot be read.
"""

import importlib
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from segformer_pl.errors import UserError

# Suffixes of the containers that cameras, phones and the web use
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp"),
    *(".wmv", ".flv", ".ogv"),
)

Pixels = npt.NDArray[np.uint8]


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        pixels: Upright image, (H, W, 3) RGB.
        time: Time at which it is shown, in units of the video's ``time_base``. The first frame has
            0, and the times increase.
    """

    pixels: Pixels
    time: int


def is_video(file: Path) -> bool:
    """Return whether the suffix of a file is that of a video."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def check_video_support(file: Path) -> None:
    """Check that the package that reads videos is installed.

    Args:
        file: Video to be read, for the message.

    Raises:
        UserError: It is not installed.
    """
    try:
        importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            f"{file}: this is a video, and videos need the package av, which is not installed; "
            "install it with pip install 'segformer_pl[video]'"
        ) from error


class Video:
    """A video file whose frames are decoded one by one, to be used as a context manager.

    Frames are rotated as the file states, as in players, and converted to 8 bits per channel. Sound
    is not read. Frames can be iterated over once::

        with Video(Path("clip.mp4")) as video:
            for frame in video:
                frame.pixels  # (H, W, 3)

    Args:
        file: Path of the file.
        where: Name of the video in error messages. Default: its path.

    Attributes:
        num_frames: Number of frames that the file states, None if it states none.
        rate: Frames per second, the mean if they are not evenly spaced.
        time_base: Unit of the frames' times, in seconds.

    Raises:
        UserError: The package av is not installed, the file cannot be read, or it holds no video.
            Iteration raises it when a frame cannot be decoded or there is none.
    """

    def __init__(self, file: Path, where: str | None = None) -> None:
        check_video_support(file)
        self._av = importlib.import_module("av")
        self.where = where or str(file)
        try:
            # A colon would end the name of a protocol; a playlist must not open other addresses.
            self._container = self._av.open(
                f"file:{file}", container_options={"protocol_whitelist": "file"}
            )
        except (self._av.FFmpegError, OSError) as error:
            raise UserError(
                f"{self.where}: it is not a video, or a damaged one ({error.strerror}); replace it"
            ) from error
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            self._container.close()
            raise UserError(f"{self.where}: the file holds no video; give another one")
        # Threads over frames would hide an error at the end of the file.
        self._stream.thread_type = "SLICE"
        self.num_frames: int | None = self._stream.frames or None
        # 25 is FFmpeg's own default; only frames without a time depend on it.
        self.rate: Fraction = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.time_base: Fraction = self._stream.time_base

    @property
    def interval(self) -> int:
        """Mean interval between two frames, in units of :attr:`time_base`, at least 1."""
        return max(round(1 / (self.rate * self.time_base)), 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        number, start, previous = 0, 0, -1
        try:
            for number, frame in enumerate(self._container.decode(self._stream), 1):
                if frame.pts is None:
                    time = previous + self.interval
                else:
                    start = frame.pts if number == 1 else start
                    time = max(frame.pts - start, previous + 1)
                previous = time if number > 1 else 0
                pixels = frame.to_ndarray(format="rgb24")
                # Counter-clockwise, like that of numpy
                upright = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
                yield Frame(upright, previous)
        except self._av.FFmpegError as error:
            raise UserError(
                f"{self.where}: it cannot be read after frame {number} ({error.strerror}); repair "
                "the file or encode it anew"
            ) from error
        if number == 0:
            raise UserError(f"{self.where}: the video holds no frame; give another one")


class VideoWriter:
    """Writes frames as H.264 in an MP4 file, which browsers play; a context manager.

    A side of an odd number of pixels gets one more, which repeats the last: players expect even
    sides.

    Args:
        stream: File open for writing and seeking in binary mode.
        like: Video with the rate and the time base of the frames.

    Raises:
        UserError: A frame has another size than the first.
    """

    def __init__(self, stream: BinaryIO, like: Video) -> None:
        self._av = importlib.import_module("av")
        self._container = self._av.open(stream, "w", format="mp4")
        self._like = like
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(Exception):  # the file is incomplete, and the first error counts
                self._container.close()
            return
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))  # the frames that the encoder holds
        self._container.close()

    def write(self, frame: Frame) -> None:
        """Write a frame; frames are written in the order of their times."""
        height, width = frame.pixels.shape[:2]
        pixels = frame.pixels
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        height, width = pixels.shape[:2]
        if self._stream is None:
            self._stream = self._open(height, width)
        elif (height, width) != (self._stream.height, self._stream.width):
            raise UserError(
                f"{self._like.where}: a frame has {height}x{width} pixels and the first one "
                f"{self._stream.height}x{self._stream.width}; cut the video where its size changes"
            )
        converted = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        converted = converted.reformat(format="yuv420p", dst_colorspace="ITU709")
        converted.pts, converted.time_base = frame.time, self._like.time_base
        converted.duration = self._like.interval  # that of the last frame ends the video
        self._container.mux(self._stream.encode(converted))

    def _open(self, height: int, width: int) -> Any:
        stream = self._container.add_stream("h264", rate=self._like.rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = self._like.time_base
        # Without a statement, players guess the conversion to RGB from the size: 1 is BT.709.
        for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
            setattr(stream.codec_context, name, 1)
        return stream
