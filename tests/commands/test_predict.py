"""predict as its user meets it: pictures of every kind in, whole files out, the rest in words."""

import os
import resource
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.atomic import WriteError
from segformer_pl.cli import main
from segformer_pl.commands.predict import changed_protocol, find_pictures, predict
from segformer_pl.data import shapes
from segformer_pl.inference import Inference, Predictor, predictor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one step; the classifier drawn anew, so that pictures have several classes."""
    folder = tmp_path_factory.mktemp("run")
    shapes.generate(folder / "data", {"train": 2, "validation": 1})
    settings = {
        "model.network": "segformer_pl.models.segformer_b0",
        "model.network.decoder_dim": 16,
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
    del content["optimizer_states"]  # two thirds of what every test has to read
    torch.save(content, file)
    return file


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Function (input, options) -> exit code, what is printed, what is reported."""

    def call(pictures, *options):
        arguments = [f"--ckpt={checkpoint}", f"--input={pictures}", f"--output={tmp_path / 'out'}"]
        capsys.readouterr()
        try:
            predict([*arguments, "--device=cpu", *options])
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def pictures(tmp_path):
    """Folder for the pictures of a test."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def photograph(height=48, width=64, seed=0):
    """Smooth patches of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def written(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def mask(folder, name):
    return np.asarray(Image.open(folder / "masks" / f"{name}.png"))


def test_masks_are_the_networks_train_ids_with_the_palette(run, checkpoint, pictures, tmp_path):
    pixels = photograph(45, 70)
    Image.fromarray(pixels).save(pictures / "a.png")
    code, printed, _ = run(pictures / "a.png")
    out = tmp_path / "out"
    assert code == 0
    assert printed == f"1 masks in {out / 'masks'}, overlays in {out / 'overlays'}; skipped: 0\n"
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
def test_every_kind_of_picture(run, pictures, tmp_path):
    pixels = photograph()
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    alpha = Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64))
    image.save(pictures / "rgb.png")
    image.save(pictures / "rgb.bmp")
    image.save(pictures / "rgb.webp", lossless=True)
    Image.merge("RGBA", [*image.split(), alpha]).save(pictures / "rgba.png")
    cv2.imwrite(str(pictures / "rgb16.png"), pixels[..., ::-1] * np.uint16(257))
    grey.save(pictures / "grey.png")
    Image.merge("LA", [grey, alpha]).save(pictures / "grey_alpha.png")
    Image.fromarray(pixels[..., 0] * np.uint16(257)).save(pictures / "grey16.png")
    Image.fromarray(pixels[..., 0] * np.uint16(257)).save(pictures / "grey16.tiff")
    grey.convert("RGB").save(pictures / "grey_rgb.png")
    image.convert("CMYK").save(pictures / "cmyk.TIF")
    image.quantize(16).save(pictures / "palette.png")
    image.convert("1").save(pictures / "black_and_white.png")
    code, _, reported = run(pictures)
    assert code == 0, reported
    out = tmp_path / "out"
    assert len(list((out / "masks").iterdir())) == 13
    for name in ("rgb.bmp", "rgb.webp", "rgba", "rgb16", "cmyk"):
        assert np.array_equal(mask(out, name), mask(out, "rgb.png")), name
    for name in ("grey_alpha", "grey16.png", "grey16.tiff", "grey_rgb"):
        assert np.array_equal(mask(out, name), mask(out, "grey")), name
    assert not np.array_equal(mask(out, "grey"), mask(out, "rgb.png"))


def test_a_turned_picture_gets_an_upright_mask(run, pictures, tmp_path):
    upright = photograph(48, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right for viewing
    Image.fromarray(np.rot90(upright).copy()).save(pictures / "turned.png", exif=exif)
    Image.fromarray(upright).save(pictures / "upright.png")
    assert run(pictures)[0] == 0
    out = tmp_path / "out"
    assert mask(out, "turned").shape == (48, 80)
    assert np.array_equal(mask(out, "turned"), mask(out, "upright"))
    assert (out / "overlays/turned.png").read_bytes() == (out / "overlays/upright.png").read_bytes()


def test_what_cannot_be_used_is_reported_and_the_rest_goes_on(run, pictures, tmp_path):
    good = Image.fromarray(photograph())
    good.save(pictures / "a.png")
    good.save(pictures / "z.png")
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "text.jpg").write_text("no picture")
    good.save(pictures / "truncated.jpg")
    whole = (pictures / "truncated.jpg").read_bytes()
    (pictures / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "link.jpg").symlink_to(tmp_path / "nowhere")
    Image.fromarray(np.zeros((40, 40), np.float32)).save(pictures / "float.tif")
    Image.new("RGB", (64, 20)).save(pictures / "small.png")
    code, printed, reported = run(pictures)
    assert code == 1
    assert printed.startswith("2 masks in ")
    assert printed.endswith("; skipped: 6\n")
    assert written(tmp_path / "out") == [
        f"{k}/{n}.png" for k in ("masks", "overlays") for n in "az"
    ]
    for name, sentence in {
        "empty.png": "the 0 bytes are not an image, or a damaged one; replace them",
        "text.jpg": "the 10 bytes are not an image, or a damaged one; replace them",
        "truncated.jpg": f"the {len(whole) // 2} bytes are not an image, or a damaged one",
        "link.jpg": "it cannot be read (No such file or directory)",
        "float.tif": "the image holds numbers without a known range",
        "small.png": "sr_ratio 8 is larger than the 5x16 token grid",
    }.items():
        assert reported.count(f"skipped: {pictures / name}: {sentence}") == 1
    assert "Traceback" not in reported


def test_probabilities(run, pictures, tmp_path):
    Image.fromarray(photograph(50, 70)).save(pictures / "a.png")
    assert run(pictures)[0] == 0
    alone = mask(tmp_path / "out", "a")
    assert run(pictures, "--probabilities")[0] == 0
    with np.load(tmp_path / "out/probabilities/a.npz") as file:
        probabilities, names = file["probabilities"], file["class_names"]
    assert probabilities.shape == (6, 50, 70)
    assert probabilities.dtype == np.float16
    assert list(names) == list(shapes.CLASS_NAMES)
    assert np.abs(probabilities.astype(float).sum(0) - 1).max() < 0.005
    assert np.array_equal(mask(tmp_path / "out", "a"), alone)
    chosen = np.take_along_axis(probabilities, alone[None].astype(int), 0)[0]
    assert (chosen == probabilities.max(0)).all()


def test_inference_of_the_run_and_changes(run, pictures, tmp_path, monkeypatch):
    Image.fromarray(photograph()).save(pictures / "a.png")
    used = []
    original = predictor.predict_classes

    def watched(network, images, size, protocol, *arguments):
        used.append(protocol)
        return original(network, images, size, protocol, *arguments)

    monkeypatch.setattr(predictor, "predict_classes", watched)
    assert run(pictures)[0] == 0
    assert run(pictures, "--inference.flip=true", "--inference.scales=[0.75,1]")[0] == 0
    assert [plan.flip for plan in used] == [False, True]
    assert [list(plan.scales) for plan in used] == [[1.0], [0.75, 1.0]]


def test_the_checkpoint_is_read_once(run, checkpoint, pictures, reads_of):
    Image.fromarray(photograph()).save(pictures / "a.png")
    with reads_of(checkpoint) as reads:
        assert run(pictures)[0] == 0
    assert reads == {"opened": 1, "loaded": 1}


def test_changes_keep_the_rest_of_the_runs_inference():
    of_the_run = Inference(window=(64, 64), stride=(48, 48), window_weights="hann", scales=(0.5, 1))
    changed = changed_protocol(of_the_run, {"flip": True})
    assert vars(changed) == vars(of_the_run) | {"flip": True}
    # A stride and weights belong to their window.
    assert vars(changed_protocol(of_the_run, {"window": None})) == vars(Inference(scales=(0.5, 1)))


def test_a_second_run_writes_anew_and_does_not_read_its_own_files(run, pictures, tmp_path):
    (tmp_path / "out/masks").mkdir(parents=True)
    Image.fromarray(photograph()).save(pictures / "a.png")
    assert run(tmp_path)[0] == 0
    first = mask(tmp_path / "out", "pictures/a")
    (tmp_path / "out/masks/pictures/a.png").write_bytes(b"old")
    code, printed, _ = run(tmp_path)
    assert (code, printed[:8]) == (0, "1 masks ")
    assert np.array_equal(mask(tmp_path / "out", "pictures/a"), first)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--input={}/none"], "--input: there is no file or folder '{}/none'; give a picture"),
        (["--input={}"], "--input: folder '{}' holds no picture (.jpg, "),
        (["--input={}/*.png"], "--input: no file matches '{}/*.png'; give a picture, a folder"),
        (["--ckpt={}/none"], "--ckpt: there is no file '{}/none'; give a run's checkpoint"),
        (["--inference.stride=[8,8]"], "stride"),
        (["--inference.scales=[-1]"], "inference.scales"),
        (["--device=tpu"], "device"),
        (["--tta=true"], "tta"),
    ],
)
def test_wrong_arguments(run, pictures, tmp_path, options, sentence):
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    code, printed, reported = run(
        tmp_path / "a.png", *(option.format(pictures) for option in options)
    )
    assert code == 2
    assert printed == ""
    assert reported.startswith("error: ")
    assert reported.count("\n") == 1
    assert sentence.format(pictures) in reported
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_a_missing_device(run, pictures):
    Image.fromarray(photograph()).save(pictures / "a.png")
    code, _, reported = run(pictures, "--device=cuda")
    assert code == 2
    assert "--device cuda: this machine has no CUDA device that torch can use" in reported


def test_a_network_of_other_pictures(run, pictures, monkeypatch):
    Image.fromarray(photograph()).save(pictures / "a.png")

    original = Predictor.from_weights

    def load(weights):
        loaded = original(weights)
        loaded.network.in_channels = 4
        return loaded

    monkeypatch.setattr(Predictor, "from_weights", load)
    code, _, reported = run(pictures)
    assert code == 2
    assert "the network takes 4 channels, but pictures are read with 3 (RGB); give" in reported


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files(run, pictures, tmp_path, monkeypatch):
    for name in "abc":
        Image.fromarray(photograph(seed=ord(name))).save(pictures / f"{name}.png")
    assert run(pictures)[0] == 0
    before = {file: (tmp_path / "out" / file).read_bytes() for file in written(tmp_path / "out")}
    save, calls = Image.Image.save, []

    def interrupted(self, file, **options):
        calls.append(file)
        if len(calls) == 2:  # overlays are written otherwise
            file.write(b"half a")
            raise KeyboardInterrupt
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    code, printed, reported = run(pictures)
    assert code == 130
    assert printed == ""
    assert "interrupted after 1 pictures; what is written is whole" in reported
    after = {file: (tmp_path / "out" / file).read_bytes() for file in written(tmp_path / "out")}
    assert after == before


def test_a_full_disk_ends_in_words(run, pictures, tmp_path):
    Image.fromarray(photograph()).save(pictures / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a disk with as much room
    try:
        with pytest.raises(WriteError, match=r"cannot write '.*/a.png': File too large; free"):
            run(pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written(tmp_path / "out") == []


def test_names_that_clash_or_are_too_long_cost_no_other_picture(run, pictures, tmp_path):
    image = Image.fromarray(photograph())
    (pictures / "x.png").mkdir()
    long = "l" * 251
    for name in ("a.png", "x.jpg", "x.png/1.jpg", f"{long}.jpg", f"{long}.png", "q.png", "z.png"):
        image.save(pictures / name)
    (tmp_path / "out" / "masks" / "q.png").mkdir(parents=True)
    code, printed, reported = run(pictures)
    assert code == 1
    assert printed.startswith("3 masks in ")
    assert printed.endswith("skipped: 4\n")
    assert {f"masks/{name}.png" for name in "axz"} <= set(written(tmp_path / "out"))
    told = [line for line in reported.splitlines() if line.startswith("skipped: ")]
    assert len(told) == 4
    assert sum(line.endswith("File name too long; give a shorter name") for line in told) == 2
    assert any("x.png/1.jpg: cannot write" in line for line in told)
    assert any("q.png: cannot write" in line for line in told)
    assert "free space" not in reported


def test_a_file_in_place_of_a_folder_of_outputs_is_said_before_any_work(run, pictures, tmp_path):
    Image.fromarray(photograph()).save(pictures / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "masks").write_text("a file")
    with pytest.raises(WriteError, match=r"cannot write to the folder '.*/masks': File exists; gi"):
        run(pictures)
    assert written(tmp_path / "out") == ["masks"]


def test_an_output_that_cannot_be_written_is_said_before_any_work(run, pictures, tmp_path):
    Image.fromarray(photograph()).save(pictures / "a.png")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(WriteError, match=r"cannot write to the folder '.*/out': File exists; give"):
        run(pictures)


def test_links_that_were_planted_are_not_followed(run, pictures, tmp_path):
    Image.fromarray(photograph()).save(pictures / "a.png")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out" / "masks").mkdir(parents=True)
    for name in ("a.png.part", "a.png.partial", "a.png"):
        (tmp_path / "out" / "masks" / name).symlink_to(precious)
    assert run(pictures)[0] == 0
    assert precious.read_text() == "mine"
    assert not (tmp_path / "out" / "masks" / "a.png").is_symlink()
    assert mask(tmp_path / "out", "a").shape == (48, 64)


def test_more_than_256_classes_are_16_bit_grey(run, pictures, tmp_path, monkeypatch):
    Image.fromarray(photograph(40, 50)).save(pictures / "a.png")
    train_ids = np.arange(2000).reshape(40, 50) % 300

    original = Predictor.from_weights

    def load(weights):
        loaded = original(weights)
        loaded.class_names = [f"class {number}" for number in range(300)]
        loaded.palette = np.random.default_rng(0).integers(0, 256, (300, 3)).tolist()
        return loaded

    monkeypatch.setattr(Predictor, "from_weights", load)
    found = torch.from_numpy(train_ids)[None]
    monkeypatch.setattr(predictor, "predict_classes", lambda *given: found.to(given[-1]))
    assert run(pictures)[0] == 0
    assert Image.open(tmp_path / "out/masks/a.png").mode == "I;16"
    assert np.array_equal(mask(tmp_path / "out", "a"), train_ids)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Function: empty files of these names below the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    return make


def found(pattern, output="out"):
    """Output names by file, as text."""
    return {str(file): str(name) for file, name in find_pictures(pattern, Path(output)).items()}


def test_a_folder_is_searched_for_pictures_with_all_below_it(tree):
    tree("in/b.JPG", "in/a.png", "in/sub/deep/c.tiff", "in/notes.txt", "in/._b.jpg", "in/d.jpg/x")
    expected = {"in/a.png": "a", "in/b.JPG": "b", "in/sub/deep/c.tiff": "sub/deep/c"}
    assert found("in") == found("in/") == found("./in") == expected
    assert list(found("in")) == sorted(expected)
    assert found(os.path.abspath("in")).keys() == {os.path.abspath(file) for file in expected}
    assert list(found(os.path.abspath("in")).values()) == list(expected.values())


def test_patterns(tree):
    tree("in/1/a.jpg", "in/2/a.jpg", "in/2/b.gif", "in/2/x/a.jpg", "other/a.jpg")
    assert found("in/*/a.jpg") == {"in/1/a.jpg": "1/a", "in/2/a.jpg": "2/a"}
    assert set(found("in/**/a.jpg")) == {"in/1/a.jpg", "in/2/a.jpg", "in/2/x/a.jpg"}
    assert found("in/2/*") == {"in/2/a.jpg": "a", "in/2/b.gif": "b"}  # what was asked for
    assert found("in/[2]/?.gif") == {"in/2/b.gif": "2/b"}
    assert found("./in/../other/*.jpg") == {"other/a.jpg": "a"}
    with pytest.raises(ValueError, match=r"^--input: 'other/a.jpg' is not below 'in', where the"):
        find_pictures("in/*/../../other/a.jpg", Path("out"))


def test_a_file_whose_name_looks_like_a_pattern(tree):
    tree("in/a[1].jpg", "in/a1.jpg", "[x]/b.jpg")
    assert found("in/a[1].jpg") == {"in/a[1].jpg": "a[1]"}
    assert found("[x]") == {"[x]/b.jpg": "b"}


def test_pictures_never_share_a_name(tree):
    tree("in/a.jpg", "in/a.png", "in/b.png", "in/sub/a.png")
    assert found("in") == {
        "in/a.jpg": "a.jpg",
        "in/a.png": "a.png",
        "in/b.png": "b",
        "in/sub/a.png": "sub/a",
    }
    tree("in/a.jpg.png", "in/b.png.png")
    names = found("in").values()
    assert len(set(names)) == len(names) == 6
    tree("in/c")
    assert found("in/c*") == {"in/c": "c"}


def test_what_was_written_before_is_no_input(tree):
    tree("in/a.jpg", "in/masks/a.png", "in/overlays/a.png", "in/more/masks/b.png")
    assert set(found("in", output="in")) == {"in/a.jpg", "in/more/masks/b.png"}
    assert set(found("in/**/*", output="./in")) == {"in/a.jpg", "in/more/masks/b.png"}
    Path("link").symlink_to("in")
    assert set(found("link", output="in")) == {"link/a.jpg", "link/more/masks/b.png"}
