"""The page of ``app``: a real server, called by Gradio's client and used in a real browser."""

import os
import re
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.analysis.overlays import draw_classes
from segformer_pl.checkpoints import export_weights
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.inference import Predictor
from segformer_pl.models import MixTransformer, SegFormer
from segformer_pl.video_file import Video
from tests.browser import start_browser
from tests.small_video import make_frames, write_video

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
NAMES = ["sky", 'road <7> & "co"', "car"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, randomize):
    encoder = MixTransformer(embed_dims=[4, 8, 8, 16], depths=[1] * 4, num_heads=[1, 2, 2, 4])
    network = randomize(SegFormer(encoder=encoder, decoder_dim=16, num_classes=3)).float().eval()
    with torch.no_grad():  # so that every class occurs in an image
        network.head.classifier.bias -= network(torch.rand(1, 3, 64, 64)).mean((0, 2, 3))
    folder = tmp_path_factory.mktemp("weights") / "tiny <1>"
    export_weights(network, folder, "huggingface", {"class_names": NAMES})
    return folder


@pytest.fixture
def serve(start_command, tmp_path):
    """Function (options) that starts the command and returns it with the address of its page."""

    def start(*options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "temporary").mkdir()
        command = start_command(
            ["app", *options, "--device=cpu", f"--server_port={port}"],
            TMPDIR=str(tmp_path / "temporary"),
            http_proxy="http://127.0.0.1:9",  # which is not there
        )
        command.wait_for(lambda: "open http://" in command.output)
        return command, re.search(r"open (\S+) in", command.output)[1]

    return start


@pytest.fixture
def image(tmp_path):
    Image.fromarray(make_frames(1, 90, 120)[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def enlarged(pixels):
    return pixels.repeat(5, 0).repeat(5, 1)


def stop(command, tmp_path):
    os.kill(command.pid, signal.SIGINT)
    assert command.wait() == 0
    assert list((tmp_path / "temporary").iterdir()) == []  # nothing of what was dropped is left


@needs_gradio
@pytest.mark.slow
def test_images_and_videos_are_segmented(serve, weights, image, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    command, address = serve(f"--weights={weights}")
    client = Client(address, verbose=False, download_files=str(tmp_path / "client"))
    predictor = Predictor.load(weights)
    mask, confidence = predictor.confidence(image)

    overlay, video, certainty, table = client.predict(handle_file(image), api_name="/segment")
    assert video["visible"] is False
    pixels = np.asarray(Image.open(image))  # 90x120, which are enlarged 5 times
    drawn = draw_classes(enlarged(pixels), enlarged(mask), distinct_colors(3))
    with Image.open(overlay["value"]) as found:
        np.testing.assert_array_equal(np.asarray(found.convert("RGB")), drawn)
    with Image.open(certainty["value"]) as found:
        luminance = np.asarray(found.convert("L")).astype(float)
    assert np.corrcoef(luminance.ravel(), enlarged(confidence).ravel())[0, 1] > 0.95
    shares = np.bincount(mask.ravel(), minlength=3) / mask.size
    assert shares.min() > 0.01
    for index in range(3):
        assert f"{100 * shares[index]:.1f} %" in table
        assert f"<td>{confidence[mask == index].astype(float).mean():.2f}</td>" in table
    assert "<td>sky</td>" in table
    assert "road &lt;7&gt; &amp; &quot;co&quot;" in table

    write_video(tmp_path / "clip.mp4", make_frames(3), rate=5)
    overlay, video, certainty, table = client.predict(
        handle_file(tmp_path / "clip.mp4"), api_name="/segment"
    )
    assert (overlay["visible"], certainty["visible"], video["visible"]) == (False, False, True)
    with Video(tmp_path / "clip.mp4") as source, Video(Path(video["value"])) as found:
        assert found.rate == 5
        frames = list(zip(source, found, strict=True))
    for frame, copy in frames:
        drawn = draw_classes(frame.pixels, predictor(frame.pixels), distinct_colors(3))
        assert np.abs(copy.pixels.astype(int) - drawn).mean() < 12

    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(AppError, match=r"notes.txt: the 8 bytes are not an image, or a damaged"):
        client.predict(handle_file(tmp_path / "notes.txt"), api_name="/segment")
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(AppError, match=r"bad.mp4: it is not a video, or a damaged one"):
        client.predict(handle_file(tmp_path / "bad.mp4"), api_name="/segment")
    client.close()
    stop(command, tmp_path)
    assert "Traceback" not in command.output
    assert command.output.count("\n") == 1


@needs_gradio
@pytest.mark.slow
def test_the_page_in_a_browser_asks_no_other_server(serve, weights, image, tmp_path):
    browser = start_browser(tmp_path / "profile")
    command, address = serve(f"--weights={weights}")
    browser.resize(1280, 1000)
    browser.open(address)
    browser.wait_for("document.querySelector('input[type=file]') !== null")
    assert "tiny <1>" in browser.run("document.body.innerText")
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    chosen = browser.call("DOM.querySelector", nodeId=document, selector="input[type=file]")
    browser.call("DOM.setFileInputFiles", files=[str(image)], nodeId=chosen["nodeId"])
    browser.wait_for("document.querySelectorAll('td').length > 0")
    browser.wait_for("document.querySelectorAll('img').length >= 2")
    text = browser.run("document.body.innerText")
    assert any(name in text for name in NAMES)
    assert browser.errors() == []
    kinds = ("data:", "blob:", "about:", address)
    assert [url for url in browser.requests() if not url.startswith(kinds)] == []
    browser.close()
    stop(command, tmp_path)


@needs_gradio
@pytest.mark.slow  # imports Gradio
def test_a_port_in_use_is_one_sentence(fail, weights):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = fail("app", f"--weights={weights}", "--device=cpu", f"--server_port={port}")
    assert f"cannot listen on port {port} of 127.0.0.1; give another --server_port" in error


def test_a_missing_package_is_one_sentence(fail, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    error = fail("app", f"--weights={weights}")
    assert "app needs the package gradio, which is not installed; install it with pip" in error
    assert "'segformer_pl[app]'" in error


def test_weights_that_cannot_be_read_are_one_sentence(fail, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in fail("app", f"--weights={tmp_path / 'w.pth'}")
