"""Small video files for tests, written with PyAV alone."""

from fractions import Fraction

import av
import cv2
import numpy as np


def make_frames(number, height=48, width=64):
    """Smooth patches of colour, (number, height, width, 3) RGB, other ones in each frame."""
    small = np.random.default_rng(0).integers(0, 256, (number, 6, 8, 3), dtype=np.uint8)
    sized = [cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in small]
    return np.stack(sized)


def write_video(file, frames, rate=25, times=None, time_base=None, rotation=0, **options):
    """Write frames as a video, in H.264 without loss but for the rounding of colours.

    Args:
        times: Times of the frames in units of ``time_base``. Default: evenly spaced.
        time_base: Seconds, a Fraction. Default: the interval of the rate.
        rotation: Degrees by which players rotate the frames, counter-clockwise.
        options: Further options of the container.
    """
    with av.open(str(file), "w", container_options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"qp": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = time_base or 1 / Fraction(rate)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_sound(file):
    """Write a file that holds sound and no video."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
