"""The command ``predict``: image formats, videos, contents of its files, skipped images."""

import resource
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.analysis.overlays import draw_classes
from segformer_pl.atomic import WriteError
from segformer_pl.cli import main
from segformer_pl.commands import predict
from segformer_pl.commands.options.predict import parse
from segformer_pl.commands.predict import changed_protocol
from segformer_pl.data import shapes
from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.inference import Inference, Predictor, predictor
from segformer_pl.video_file import Video
from tests.small_video import make_frames, write_video
from tests.tiny_network import TINY_OPTION


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint after one step, with a random classifier so that predictions vary."""
    folder = tmp_path_factory.mktemp("run")
    shapes.generate(folder / "data", {"train": 2, "validation": 1})
    settings = {
        "model.network": TINY_OPTION,
        "data.path": folder / "data",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": folder,
    }
    main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
    (file,) = folder.rglob("last.ckpt")
    content = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    content["state_dict"]["network.head.classifier.weight"].normal_(generator=generator)
    del content["optimizer_states"]  # two thirds of the file, which every test reads
    torch.save(content, file)
    return file


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Function (input, options) -> exit status, stdout, stderr of the command."""

    def call(images, *options, ckpt=True):
        arguments = [f"--input={images}", f"--output={tmp_path / 'out'}"]
        arguments += [f"--ckpt={checkpoint}"] if ckpt else []
        capsys.readouterr()
        try:
            predict.run(parse([*arguments, "--device=cpu", *options]))
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def images(tmp_path):
    """Folder for the input images of a test."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def make_image(height=48, width=64, seed=0):
    """RGB pixels (height, width, 3): smooth patches of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def written(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def mask(folder, name):
    return np.asarray(Image.open(folder / "masks" / f"{name}.png"))


@pytest.mark.slow
def test_masks_are_the_networks_train_ids_with_the_palette(run, checkpoint, images, tmp_path):
    pixels = make_image(45, 70)
    Image.fromarray(pixels).save(images / "a.png")
    code, printed, _ = run(images / "a.png")
    out = tmp_path / "out"
    assert code == 0
    assert printed == f"1 mask in {out / 'masks'}, overlays in {out / 'overlays'}; skipped: 0\n"
    assert written(out) == ["masks/a.png", "overlays/a.png"]
    image = Image.open(out / "masks" / "a.png")
    assert image.mode == "P"
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.array_equal(palette[: len(shapes.COLORS)], shapes.COLORS)
    loaded = Predictor.load(checkpoint)
    with torch.inference_mode():
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        logits = loaded.network(loaded.normalization(images))
        logits = torch.nn.functional.interpolate(logits, size=(45, 70), mode="bilinear")
    expected = logits.argmax(1)[0].numpy()
    assert len(np.unique(expected)) > 2
    assert (np.asarray(image) != expected).mean() < 0.005  # rounding where two classes are equal
    overlay = Image.open(out / "overlays" / "a.png")
    assert overlay.width == 70 * 8
    assert overlay.height > 45 * 8


@pytest.mark.slow
def test_every_image_format(run, images, tmp_path):
    pixels = make_image()
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    alpha = Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64))
    image.save(images / "rgb.png")
    image.save(images / "rgb.bmp")
    image.save(images / "rgb.webp", lossless=True)
    Image.merge("RGBA", [*image.split(), alpha]).save(images / "rgba.png")
    cv2.imwrite(str(images / "rgb16.png"), pixels[..., ::-1] * np.uint16(257))
    grey.save(images / "grey.png")
    Image.merge("LA", [grey, alpha]).save(images / "grey_alpha.png")
    Image.fromarray(pixels[..., 0] * np.uint16(257)).save(images / "grey16.png")
    Image.fromarray(pixels[..., 0] * np.uint16(257)).save(images / "grey16.tiff")
    grey.convert("RGB").save(images / "grey_rgb.png")
    image.convert("CMYK").save(images / "cmyk.TIF")
    image.quantize(16).save(images / "palette.png")
    image.convert("1").save(images / "black_and_white.png")
    code, _, reported = run(images)
    assert code == 0, reported
    out = tmp_path / "out"
    assert len(list((out / "masks").iterdir())) == 13
    for name in ("rgb.bmp", "rgb.webp", "rgba", "rgb16", "cmyk"):
        assert np.array_equal(mask(out, name), mask(out, "rgb.png")), name
    for name in ("grey_alpha", "grey16.png", "grey16.tiff", "grey_rgb"):
        assert np.array_equal(mask(out, name), mask(out, "grey")), name
    assert not np.array_equal(mask(out, "grey"), mask(out, "rgb.png"))


def test_an_image_with_an_exif_orientation_gets_an_upright_mask(run, images, tmp_path):
    upright = make_image(48, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for viewing
    Image.fromarray(np.rot90(upright).copy()).save(images / "turned.png", exif=exif)
    Image.fromarray(upright).save(images / "upright.png")
    assert run(images)[0] == 0
    out = tmp_path / "out"
    assert mask(out, "turned").shape == (48, 80)
    assert np.array_equal(mask(out, "turned"), mask(out, "upright"))
    assert (out / "overlays/turned.png").read_bytes() == (out / "overlays/upright.png").read_bytes()


def test_unusable_images_are_reported_and_skipped(run, images, tmp_path):
    good = Image.fromarray(make_image())
    good.save(images / "a.png")
    good.save(images / "z.png")
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("no picture")
    good.save(images / "truncated.jpg")
    whole = (images / "truncated.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "link.jpg").symlink_to(tmp_path / "nowhere")
    Image.fromarray(np.zeros((40, 40), np.float32)).save(images / "float.tif")
    Image.new("RGB", (64, 20)).save(images / "small.png")
    code, printed, reported = run(images)
    assert code == 1
    assert printed.startswith("2 masks in ")
    assert printed.endswith("; skipped: 6\n")
    assert written(tmp_path / "out") == [
        f"{k}/{n}.png" for k in ("masks", "overlays") for n in "az"
    ]
    for name, sentence in {
        "empty.png": "the 0 bytes are not an image, or a damaged one; replace the file",
        "text.jpg": "the 10 bytes are not an image, or a damaged one; replace the file",
        "truncated.jpg": f"the {len(whole) // 2} bytes are not an image, or a damaged one",
        "link.jpg": "it cannot be read (No such file or directory)",
        "float.tif": "the image holds numbers without a known range",
        "small.png": "sr_ratio 8 is larger than the 5x16 token grid",
    }.items():
        assert reported.count(f"skipped: {images / name}: {sentence}") == 1
    assert "Traceback" not in reported


def test_probabilities(run, images, tmp_path):
    Image.fromarray(make_image(50, 70)).save(images / "a.png")
    assert run(images)[0] == 0
    alone = mask(tmp_path / "out", "a")
    assert run(images, "--probabilities")[0] == 0
    with np.load(tmp_path / "out/probabilities/a.npz") as file:
        probabilities, names = file["probabilities"], file["class_names"]
    assert probabilities.shape == (6, 50, 70)
    assert probabilities.dtype == np.float16
    assert list(names) == list(shapes.CLASS_NAMES)
    assert np.abs(probabilities.astype(float).sum(0) - 1).max() < 0.005
    assert np.array_equal(mask(tmp_path / "out", "a"), alone)
    chosen = np.take_along_axis(probabilities, alone[None].astype(int), 0)[0]
    assert (chosen == probabilities.max(0)).all()


def test_the_protocol_is_that_of_the_run_unless_changed(run, images, tmp_path, monkeypatch):
    Image.fromarray(make_image()).save(images / "a.png")
    used = []
    original = predictor.predict_classes

    def watched(network, images, size, protocol, *arguments):
        used.append(protocol)
        return original(network, images, size, protocol, *arguments)

    monkeypatch.setattr(predictor, "predict_classes", watched)
    assert run(images)[0] == 0
    assert run(images, "--inference.flip=true", "--inference.scales=[0.75,1]")[0] == 0
    assert [plan.flip for plan in used] == [False, True]
    assert [list(plan.scales) for plan in used] == [[1.0], [0.75, 1.0]]


def test_weights_of_any_source_predict(run, checkpoint, images, tmp_path):
    """A folder states names, size and normalisation, and colours are made up for it."""
    from segformer_pl.checkpoints import export_weights, read_weights

    Image.fromarray(make_image()).save(images / "a.png")
    assert run(images)[0] == 0
    expected = mask(tmp_path / "out", "a")
    network = Predictor.load(checkpoint).network
    task = {"class_names": ["sky", "road", "car", "tree", "lake", "sea"]}
    own_size = {"do_resize": True, "size": {"height": 48, "width": 64}}
    export_weights(network, tmp_path / "w", "huggingface", task, own_size)
    facts = read_weights(checkpoint).task
    content = {"state_dict": network.state_dict(), "hyper_parameters": facts}
    content["ema_state_dict"] = network.state_dict()
    torch.save(content, tmp_path / "w.pth")
    for given in ([tmp_path / "w"], [tmp_path / "w.pth", "--state=ema_state_dict"], [checkpoint]):
        source, *options = given
        code, _, reported = run(images, f"--weights={source}", *options, ckpt=False)
        assert code == 0, reported
        assert np.array_equal(mask(tmp_path / "out", "a"), expected)
    run(images, f"--weights={tmp_path / 'w'}", ckpt=False)
    palette = Image.open(tmp_path / "out" / "masks" / "a.png").getpalette()
    assert tuple(palette[:18]) == sum(distinct_colors(6), ())


def test_weights_that_cannot_be_read_are_one_sentence(run, images, tmp_path):
    Image.fromarray(make_image()).save(images / "a.png")
    state = {"a.weight": torch.ones(1)}
    torch.save({"model": state, "model_ema": state}, tmp_path / "w.pth")
    code, _, reported = run(images, f"--weights={tmp_path / 'w.pth'}", ckpt=False)
    assert code == 2
    assert "holds the state dicts model, model_ema; choose one" in reported
    code, _, reported = run(images, f"--weights={tmp_path / 'none.pth'}", ckpt=False)
    assert code == 2
    assert f"there is no file or folder '{tmp_path / 'none.pth'}'; give weights" in reported
    code, _, reported = run(images, ckpt=False)
    assert code == 2
    assert "give one of --ckpt and --weights: the network that predicts" in reported


def test_the_checkpoint_is_read_once(run, checkpoint, images, reads_of):
    Image.fromarray(make_image()).save(images / "a.png")
    with reads_of(checkpoint) as reads:
        assert run(images)[0] == 0
    assert reads == {"opened": 1, "loaded": 1}


def test_changes_keep_the_rest_of_the_protocol():
    protocol = Inference(window=(64, 64), stride=(48, 48), window_weights="hann", scales=(0.5, 1))
    changed = changed_protocol(protocol, {"flip": True})
    assert vars(changed) == vars(protocol) | {"flip": True}
    # Of two sizes that exclude each other, the given one replaces the other.
    sized = changed_protocol(Inference(image_size=(8, 9)), {"base_size": (64, 32)})
    assert sized == Inference(base_size=(64, 32))
    # Stride and weights of the old window do not apply to another window.
    assert vars(changed_protocol(protocol, {"window": None})) == vars(Inference(scales=(0.5, 1)))


def test_a_second_call_overwrites_its_files_and_does_not_read_them(run, images, tmp_path):
    (tmp_path / "out/masks").mkdir(parents=True)
    Image.fromarray(make_image()).save(images / "a.png")
    assert run(tmp_path)[0] == 0
    first = mask(tmp_path / "out", "images/a")
    (tmp_path / "out/masks/images/a.png").write_bytes(b"old")
    code, printed, _ = run(tmp_path)
    assert (code, printed[:10]) == (0, "1 mask in ")
    assert np.array_equal(mask(tmp_path / "out", "images/a"), first)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--input={}/none"], "--input: there is no file or folder '{}/none'; give an image"),
        (["--input={}"], "--input: folder '{}' contains no image (.jpg, "),
        (["--input={}/*.png"], "--input: no file matches '{}/*.png'; give an image, a folder"),
        (["--ckpt={}"], "is a folder; give a file; other weights are given with --weights; see "),
        (["--ckpt={}/none"], "--ckpt: there is no file '{}/none'; give a run's checkpoint"),
        (["--inference.stride=[8,8]"], "stride"),
        (["--inference.scales=[-1]"], "inference.scales"),
        (["--device=tpu"], "device"),
        (["--inputs=a.png"], "there is no option --inputs (did you mean --input?)"),
        (["--weights=w.pth"], "give one of --ckpt and --weights: the network that predicts"),
        (["--state=ema"], "--state is for --weights, as a run's checkpoint holds one network"),
        (["--tta=true"], "tta"),
    ],
)
def test_wrong_arguments(run, images, tmp_path, options, sentence):
    Image.fromarray(make_image()).save(tmp_path / "a.png")
    code, printed, reported = run(
        tmp_path / "a.png", *(option.format(images) for option in options)
    )
    assert code == 2
    assert printed == ""
    assert reported.startswith("error: ")
    assert reported.count("\n") == 1
    assert sentence.format(images) in reported
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_missing_device(run, images):
    Image.fromarray(make_image()).save(images / "a.png")
    code, _, reported = run(images, "--device=cuda")
    assert code == 2
    assert "--device cuda: this machine has no CUDA device that torch can use" in reported


def test_a_network_with_five_channels_is_refused(run, images, monkeypatch):
    Image.fromarray(make_image()).save(images / "a.png")

    original = Predictor.from_weights

    def load(weights, changes=None):
        loaded = original(weights, changes)
        loaded.network.in_channels = 5
        return loaded

    monkeypatch.setattr(Predictor, "from_weights", load)
    code, _, reported = run(images)
    assert code == 2
    assert (
        "the network takes images of 5 channels, but files are read with 3 (RGB) or 4" in reported
    )


@pytest.mark.slow
def test_ctrl_c_leaves_complete_files(run, images, tmp_path, monkeypatch):
    for name in "abc":
        Image.fromarray(make_image(seed=ord(name))).save(images / f"{name}.png")
    assert run(images)[0] == 0
    before = {file: (tmp_path / "out" / file).read_bytes() for file in written(tmp_path / "out")}
    save, calls = Image.Image.save, []

    def interrupted(self, file, **options):
        calls.append(file)
        if len(calls) == 2:  # the mask of the second image; overlays are not written with save
            file.write(b"half a")
            raise KeyboardInterrupt
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    code, printed, reported = run(images)
    assert code == 130
    assert printed == ""
    assert "interrupted after 1 mask; what is written is complete" in reported
    after = {file: (tmp_path / "out" / file).read_bytes() for file in written(tmp_path / "out")}
    assert after == before


def test_a_full_disk_is_one_error_message(run, images, tmp_path):
    Image.fromarray(make_image()).save(images / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands in for a full disk
    try:
        with pytest.raises(WriteError, match=r"cannot write '.*/a.png': File too large; free"):
            run(images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written(tmp_path / "out") == []


def test_images_whose_names_clash_or_are_too_long_are_skipped_alone(run, images, tmp_path):
    image = Image.fromarray(make_image())
    (images / "x.png").mkdir()
    long = "l" * 251
    for name in ("a.png", "x.jpg", "x.png/1.jpg", f"{long}.jpg", f"{long}.png", "q.png", "z.png"):
        image.save(images / name)
    (tmp_path / "out" / "masks" / "q.png").mkdir(parents=True)
    code, printed, reported = run(images)
    assert code == 1
    assert printed.startswith("3 masks in ")
    assert printed.endswith("skipped: 4\n")
    assert {f"masks/{name}.png" for name in "axz"} <= set(written(tmp_path / "out"))
    # A progress bar that another test left open puts cursor movements before a line.
    skipped = [line for line in reported.splitlines() if "skipped: " in line]
    assert len(skipped) == 4
    assert sum(line.endswith("File name too long; give a shorter name") for line in skipped) == 2
    assert any("x.png/1.jpg: cannot write" in line for line in skipped)
    assert any("q.png: cannot write" in line for line in skipped)
    assert "free space" not in reported


def test_a_file_in_place_of_an_output_folder_is_refused_at_the_start(run, images, tmp_path):
    Image.fromarray(make_image()).save(images / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "masks").write_text("a file")
    with pytest.raises(WriteError, match=r"folder '.*/masks': '.*/masks' is a file; give a folder"):
        run(images)
    assert written(tmp_path / "out") == ["masks"]


def test_an_output_that_cannot_be_written_is_refused_at_the_start(run, images, tmp_path):
    Image.fromarray(make_image()).save(images / "a.png")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        WriteError, match=r"cannot write to the folder '.*/out': '.*/out' is a file"
    ):
        run(images)


def test_links_that_were_planted_are_not_followed(run, images, tmp_path):
    Image.fromarray(make_image()).save(images / "a.png")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out" / "masks").mkdir(parents=True)
    for name in ("a.png.part", "a.png.partial", "a.png"):
        (tmp_path / "out" / "masks" / name).symlink_to(precious)
    assert run(images)[0] == 0
    assert precious.read_text() == "mine"
    assert not (tmp_path / "out" / "masks" / "a.png").is_symlink()
    assert mask(tmp_path / "out", "a").shape == (48, 64)


def test_more_than_256_classes_are_16_bit_grey(run, images, tmp_path, monkeypatch):
    Image.fromarray(make_image(40, 50)).save(images / "a.png")
    train_ids = np.arange(2000).reshape(40, 50) % 300

    original = Predictor.from_weights

    def load(weights, changes=None):
        loaded = original(weights, changes)
        loaded.class_names = [f"class {number}" for number in range(300)]
        loaded.palette = np.random.default_rng(0).integers(0, 256, (300, 3)).tolist()
        return loaded

    monkeypatch.setattr(Predictor, "from_weights", load)
    pred = torch.from_numpy(train_ids)[None]
    monkeypatch.setattr(predictor, "predict_classes", lambda *arguments: pred.to(arguments[-1]))
    assert run(images)[0] == 0
    assert Image.open(tmp_path / "out/masks/a.png").mode == "I;16"
    assert np.array_equal(mask(tmp_path / "out", "a"), train_ids)


def test_frames_of_a_video_are_predicted_like_images(run, images, tmp_path):
    """Their overlays are a video of the same rate, times and size."""
    write_video(images / "clip.mkv", make_frames(5), rate=10, times=[0, 1, 2, 5, 6])
    with Video(images / "clip.mkv") as video:
        rate, frames = video.rate, list(video)
        times = [frame.time * video.time_base for frame in frames]
    for number, frame in enumerate(frames):
        Image.fromarray(frame.pixels).save(images / f"still{number}.png")
    code, printed, reported = run(images)
    assert code == 0, reported
    out = tmp_path / "out"
    assert printed.startswith("10 masks in ")
    videos = [f"masks/clip/{number:06d}.png" for number in range(5)]
    stills = [f"{kind}/still{n}.png" for kind in ("masks", "overlays") for n in range(5)]
    assert written(out) == sorted(["overlays/clip.mp4", "overlays/clip.png", *videos, *stills])
    for number in range(5):
        assert np.array_equal(mask(out, f"clip/{number:06d}"), mask(out, f"still{number}"))
        with Image.open(out / f"masks/clip/{number:06d}.png") as image:
            assert image.mode == "P"
    with Video(out / "overlays/clip.mp4") as video:
        drawn = list(video)
        assert [frame.time * video.time_base for frame in drawn] == times
        assert video.rate == rate
    for number, frame in enumerate(frames):
        expected = draw_classes(frame.pixels, mask(out, f"still{number}"), shapes.COLORS)
        found = drawn[number].pixels
        assert found.shape == expected.shape == (48, 64, 3)
        # Outlines blur: the codec stores colours at half the size.
        assert np.abs(found.astype(int) - expected).mean() < 12
        assert np.abs(found.astype(int) - frame.pixels).mean() > 20
    with Image.open(out / "overlays/clip.png") as legend:
        assert legend.height < 200


def test_probabilities_of_a_video(run, images, tmp_path):
    write_video(images / "clip.mp4", make_frames(2))
    assert run(images / "clip.mp4", "--probabilities")[0] == 0
    for number in range(2):
        with np.load(tmp_path / f"out/probabilities/clip/{number:06d}.npz") as file:
            chosen = file["probabilities"].argmax(0)
        assert (chosen == mask(tmp_path / "out", f"clip/{number:06d}")).mean() > 0.99


def test_unusable_videos_are_reported_and_skipped(run, images, tmp_path):
    write_video(images / "a.mp4", make_frames(6), movflags="faststart")
    whole = (images / "a.mp4").read_bytes()
    (images / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (images / "text.avi").write_text("no video")
    write_video(images / "small.mp4", make_frames(1, 20, 64))
    code, printed, reported = run(images)
    assert code == 1
    assert printed.endswith("; skipped: 3\n")
    assert [name for name in written(tmp_path / "out") if name.startswith("overlays")] == [
        "overlays/a.mp4",
        "overlays/a.png",
    ]
    for name, sentence in {
        "cut.mp4": "it cannot be read after frame",
        "text.avi": "it is not a video, or a damaged one (",
        "small.mp4, frame 0": "sr_ratio 8 is larger than the 5x16 token grid",
    }.items():
        assert reported.count(f"skipped: {images / name}: {sentence}") == 1
    assert "Traceback" not in reported


def test_ctrl_c_leaves_the_masks_of_a_video(run, images, tmp_path, monkeypatch):
    write_video(images / "clip.mp4", make_frames(6))
    original = Predictor.__call__
    calls = []

    def interrupted(self, pixels):
        calls.append(pixels)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    code, printed, reported = run(images)
    assert (code, printed) == (130, "")
    assert "interrupted after 3 masks; what is written is complete" in reported
    assert written(tmp_path / "out") == [f"masks/clip/{number:06d}.png" for number in range(3)]


def test_a_full_disk_ends_a_video(run, images, tmp_path):
    write_video(images / "clip.mp4", make_frames(6))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # masks are smaller, the overlay is not
    try:
        with pytest.raises(WriteError, match=r"cannot write '.*/clip.mp4': File too large; free"):
            run(images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out" / "overlays").iterdir())


def test_videos_without_their_package_are_refused_at_the_start(run, images, tmp_path, monkeypatch):
    Image.fromarray(make_image()).save(images / "a.png")
    (images / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, reported = run(images)
    assert code == 2
    assert "clip.mp4: this is a video, and videos need the package av" in reported
    assert "pip install 'segformer_pl[video]'" in reported
    assert not (tmp_path / "out").exists()
    assert run(images / "*.png")[0] == 0
