"""Video files: pixels, times and rotation of frames, what is written, files that are refused."""

import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from segformer_pl.errors import UserError
from segformer_pl.video_file import Frame, Video, VideoWriter, is_video
from tests.small_video import make_frames, write_sound, write_video


def read(file):
    """Frames, times in seconds, rate."""
    with Video(file) as video:
        frames = list(video)
        return [f.pixels for f in frames], [f.time * video.time_base for f in frames], video.rate


@contextmanager
def written_like(source, target):
    """The video of a file, and a writer of another file with its rate."""
    with (
        Video(source) as video,
        target.open("w+b") as stream,
        VideoWriter(stream, video) as writer,
    ):
        yield video, writer


def copy(source, target):
    with written_like(source, target) as (video, writer):
        for frame in video:
            writer.write(frame)


def difference(images, others):
    """Mean difference of two lists of images in levels of 8 bits."""
    assert [image.shape for image in images] == [image.shape for image in others]
    return np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(images, others)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_frames_have_their_pixels_and_times(tmp_path, suffix):
    frames = make_frames(5)
    write_video(tmp_path / f"a{suffix}", frames, rate=Fraction(30000, 1001))
    pixels, times, rate = read(tmp_path / f"a{suffix}")
    assert difference(pixels, frames) < 2
    assert difference(pixels[1:], frames[:-1]) > 40  # so that a wrong frame would be seen
    assert rate == pytest.approx(30000 / 1001, rel=1e-3)
    assert times == pytest.approx([n * 1001 / 30000 for n in range(5)], abs=1e-3)  # mkv: whole ms
    assert times[0] == 0


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_frames_are_upright(tmp_path, degrees, turns):
    frames = make_frames(1)
    write_video(tmp_path / "a.mp4", frames, rotation=degrees)
    pixels, _, _ = read(tmp_path / "a.mp4")
    assert difference(pixels, [np.rot90(frames[0], turns)]) < 2


def test_a_copy_has_the_same_frames_times_and_rate(tmp_path):
    frames, times = make_frames(6), [7, 8, 11, 12, 13, 40]
    write_video(tmp_path / "a.mp4", frames, rate=10, times=times, time_base=Fraction(1, 100))
    copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    pixels, copied, _ = read(tmp_path / "b.mp4")
    assert copied == [Fraction(time - 7, 100) for time in times]
    assert difference(pixels, frames) < 15  # a lossy codec, and colours at half the size
    write_video(tmp_path / "c.mp4", frames, rate=24)
    copy(tmp_path / "c.mp4", tmp_path / "d.mp4")
    assert read(tmp_path / "d.mp4")[1:] == read(tmp_path / "c.mp4")[1:]
    assert read(tmp_path / "d.mp4")[2] == 24


def test_colours_are_those_that_were_written(tmp_path):
    """Also those at which the conversions of BT.601 and BT.709 differ by 20 levels and more."""
    colors = np.array([[213, 94, 0], [0, 158, 115], [255, 0, 0], [0, 255, 0]], np.uint8)
    frame = np.repeat(np.repeat(colors[:, None], 32, 0), 64, 1)
    write_video(tmp_path / "a.mp4", frame[None])
    with written_like(tmp_path / "a.mp4", tmp_path / "b.mp4") as (_, writer):
        writer.write(Frame(frame, 0))
    (pixels,), _, _ = read(tmp_path / "b.mp4")
    assert np.abs(pixels[16::32, 32].astype(int) - colors).max() <= 4
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == 1  # BT.709


def test_an_odd_side_gets_one_more_pixel(tmp_path):
    frames = make_frames(2, 31, 45)
    write_video(tmp_path / "a.mp4", frames)
    copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    pixels, _, _ = read(tmp_path / "b.mp4")
    assert difference(pixels, np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), "edge")) < 15


def test_frames_of_another_size_are_refused(tmp_path):
    write_video(tmp_path / "a.mp4", make_frames(1))
    with written_like(tmp_path / "a.mp4", tmp_path / "b.mp4") as (_, writer):
        writer.write(Frame(make_frames(1)[0], 0))
        with pytest.raises(UserError, match="a frame has 32x64 pixels and the first one 48x64"):
            writer.write(Frame(make_frames(1, 32)[0], 1))


def test_files_that_hold_no_video(tmp_path):
    write_video(tmp_path / "a.mp4", make_frames(4))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # the table is at the end
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    write_sound(tmp_path / "sound.mp4")
    for name, sentence in {
        "cut.mp4": "it is not a video, or a damaged one (Invalid data found when processing input",
        "text.mp4": "it is not a video, or a damaged one (",
        "empty.mp4": "it is not a video, or a damaged one (",
        "none.mp4": "it is not a video, or a damaged one (No such file or directory); replace it",
        "sound.mp4": "the file holds no video; give another one",
    }.items():
        with pytest.raises(UserError) as error:
            Video(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {sentence}")


def test_a_video_that_ends_too_early_is_an_error_after_its_frames(tmp_path):
    write_video(tmp_path / "a.mp4", make_frames(8), movflags="faststart")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    frames = []
    with (
        Video(tmp_path / "cut.mp4", "clip") as video,
        pytest.raises(UserError, match=r"clip: it cannot be read after frame \d+ \(Invalid data"),
    ):
        frames.extend(video)
    assert 0 < len(frames) < 8


def test_a_playlist_opens_no_other_address(tmp_path):
    """A file that is called a video can list addresses that a server has behind its firewall."""
    (tmp_path / "a.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(UserError, match=r"it is not a video|holds no video"):
        Video(tmp_path / "a.mp4")


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a.mp4: this is a video, .* pip install 'segformer_pl\["):
        Video(tmp_path / "a.mp4")


def test_suffixes():
    assert is_video(Path("a/b.MP4"))
    assert not is_video(Path("a.mp4/b.gif"))
