"""The doctor reports every planted fault, and nothing about a sound run."""

import json
import re
from io import BytesIO

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml
from PIL import Image

from segformer_pl.cli import main
from segformer_pl.data import StreamingSegmentationData, shapes
from segformer_pl.doctor import examine
from segformer_pl.errors import UserError
from segformer_pl.models import MixTransformer, SegFormer
from segformer_pl.task import SegmentationTask

pytestmark = pytest.mark.slow

NAMES = ["road", "car", "tree"]


@pytest.fixture
def healthy(tmp_path, png):
    """Rows of both splits, with every class and some unlabelled pixels."""
    rng = np.random.default_rng(0)

    def row(split, number):
        blocks = rng.choice([0, 1, 2, 255], (6, 8), p=[0.4, 0.3, 0.25, 0.05])
        label = np.kron(blocks, np.ones((8, 8))).astype(np.uint8)
        image = rng.integers(0, 256, (48, 64, 3), np.uint8)
        return {"image": png(image), "label": png(label), "id": f"{split}{number}"}

    counts = {"train": 60, "validation": 50}
    return {split: [row(split, i) for i in range(n)] for split, n in counts.items()}


def network(num_classes=3):
    encoder = MixTransformer(
        embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
    )
    return SegFormer(encoder, num_classes, decoder_dim=16)


@pytest.fixture
def visit(tmp_path, healthy, write_shards):
    """Function (rows, settings ...) -> the doctor's examination of them."""

    def run(rows=healthy, data=(), model=(), trainer=(), spec=(), break_folder=None):
        folder = tmp_path / "set"
        for split, cells in rows.items():
            write_shards(folder, split, [cells], row_group_size=10)
        if break_folder:
            break_folder(folder)
        description = {
            "image_column": "image",
            "label_column": "label",
            "id_column": "id",
            "labels": {"names": NAMES, "ignored": [255]},
        } | dict(spec)
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(description))
        module = StreamingSegmentationData(
            str(file),
            folder,
            **{"batch_size": 4, "num_workers": 1, "crop_size": (32, 32)} | dict(data),
        )
        task = SegmentationTask(
            network(),
            class_names=NAMES,
            palette=[list(color) for color in module.entry.labels.colors],
            **{"lr": 1e-3, "warmup_steps": 5} | dict(model),
        )
        settings = {"max_steps": 50, "val_check_interval": 10, "max_epochs": -1} | dict(trainer)
        runner = pl.Trainer(
            accelerator="cpu",
            check_val_every_n_epoch=None,
            logger=False,
            enable_checkpointing=False,
            **settings,
        )
        return examine(task, module, runner)

    return run


@pytest.mark.slow
def test_a_sound_run_has_no_findings(visit):
    examination = visit()
    assert examination.findings == []
    assert examination.facts["train"]["images"] == 60
    assert set(examination.facts["train"]["share of pixels"]) == set(NAMES)
    assert examination.facts["cost"]["loading (samples/s and process)"] > 0
    assert str(examination).endswith("0 errors, 0 warnings")


def encode(array, **arguments):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, **arguments)
    return {"bytes": buffer.getvalue(), "path": None}


def each(rows, split, column, change):
    """Change a column of every row of a split."""
    for row in rows[split]:
        array = np.array(Image.open(BytesIO(row[column]["bytes"])))
        row[column] = change(array)


def one(column, cell):
    """Replace one cell of the training split."""

    def change(rows):
        rows["train"][20][column] = cell(rows["train"][20]) if callable(cell) else cell

    return change


def constant(rows):
    each(rows, "train", "image", lambda a: encode(np.zeros_like(a), format="PNG"))


def leak(rows):
    for i in range(50):
        rows["validation"][i]["image"] = rows["train"][i]["image"]


def small(rows):
    for split in rows:
        each(rows, split, "image", lambda a: encode(a[:20], format="PNG"))
        each(rows, split, "label", lambda a: encode(a[:20], format="PNG"))


def mixed(split):
    """Make the first sample of a split smaller than the others."""

    def change(rows):
        for column in ("image", "label"):
            array = np.array(Image.open(BytesIO(rows[split][0][column]["bytes"])))
            rows[split][0][column] = encode(array[:40], format="PNG")

    return change


def relabel(function):
    """Apply a function to every label image."""

    def change(rows):
        for split in rows:
            each(rows, split, "label", lambda a: encode(function(a).astype(np.uint8), format="PNG"))

    return change


def same_ids(rows):
    for row in rows["train"]:
        row["id"] = "image"


def rotated(row):
    exif = Image.Exif()
    exif[0x0112] = 3
    array = np.array(Image.open(BytesIO(row["image"]["bytes"])))
    return encode(array, format="PNG", exif=exif)


def recolored(rows):
    """Give every label image a palette in another order, as some annotation tools do."""
    rng = np.random.default_rng(0)
    for row in rows["train"]:
        label = Image.open(BytesIO(row["label"]["bytes"]))
        label.putpalette(rng.permutation(256 * 3).astype(np.uint8).tobytes())
        buffer = BytesIO()
        label.save(buffer, format="PNG")
        row["label"] = {"bytes": buffer.getvalue(), "path": None}


def recolored_validation(rows):
    def with_palette(colors):
        def encoded(array):
            label = Image.fromarray(array, "P")
            label.putpalette(np.asarray(colors, np.uint8).tobytes())
            buffer = BytesIO()
            label.save(buffer, "PNG")
            return {"bytes": buffer.getvalue(), "path": None}

        return encoded

    colors = np.arange(256)[:, None].repeat(3, 1)
    each(rows, "train", "label", with_palette(colors))
    each(rows, "validation", "label", with_palette(colors[[1, 0, *range(2, 256)]]))


def pages(row):
    label = np.array(Image.open(BytesIO(row["label"]["bytes"])))
    return encode(label, format="TIFF", save_all=True, append_images=[Image.fromarray(label)])


def truncate(folder):
    shard = next(folder.glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-50])


def without(split):
    return lambda folder: next(folder.glob(f"{split}*")).unlink()


FAULTS = {
    # fault: (how it is planted, pattern of the expected finding)
    "a truncated shard": ({"folder": truncate}, "error open .*is not a complete Parquet file"),
    "no train shards": (
        {"folder": without("train")},
        r"error open .*no train\*.parquet or ",
    ),
    "no validation shards": (
        {"folder": without("validation")},
        r"error open .*no validation\*.parquet or images/validation/ in",
    ),
    "a missing column": (
        {"spec": {"label_column": "mask"}},
        "error open .*no column 'mask'.* it has: image, label, id",
    ),
    "an empty label cell": (
        {"rows": one("label", None)},
        r"error samples 1 of 60 train .*'train20', column 'label': the row holds no image",
    ),
    "a damaged image": (
        {"rows": one("image", lambda row: {"bytes": row["image"]["bytes"][:900], "path": None})},
        "error samples .*'train20', column 'image': the 900 bytes are not an image, or a damaged",
    ),
    "a lossy label": (
        {"rows": one("label", lambda row: encode(np.zeros((48, 64), np.uint8), format="JPEG"))},
        "error samples .*the label image is a JPEG",
    ),
    "a label of another size": (
        {"rows": one("label", lambda row: encode(np.zeros((20, 64), np.uint8), format="PNG"))},
        "error samples .*the label is 20x64 but the image is 48x64",
    ),
    "an image of floating-point numbers": (
        {"rows": one("image", lambda row: encode(np.ones((48, 64), np.float32), format="TIFF"))},
        "error samples .*the image holds numbers without a known range",
    ),
    "a label in colours": (
        {"rows": one("label", lambda row: encode(np.ones((48, 64, 3), np.uint8), format="PNG"))},
        "error samples 1 of 60 train samples cannot be used",
    ),
    "labels that start at 1": (
        {"rows": relabel(lambda a: np.where(a == 255, 255, a + 1))},
        "error samples 60 of 60 train .*label value 3 ",
    ),
    "unlabelled pixels not declared": (
        {"spec": {"labels": {"names": NAMES}}},
        "error samples .*label value 255 ",
    ),
    "a class that never occurs": (
        {"rows": relabel(lambda a: np.where(a == 2, 0, a))},
        "warning classes 1 of 3 classes occur in none of the 60 examined train images: tree;",
    ),
    "labels of one class only": (
        {"rows": relabel(np.zeros_like)},
        "error classes 2 of 3 classes occur in none",
    ),
    "no label at all": (
        {"rows": relabel(lambda a: np.full_like(a, 255))},
        "error labels 60 of 60 train images have no labelled pixel",
    ),
    "mostly unlabelled": (
        {"rows": relabel(lambda a: np.where(np.arange(64) < 40, 255, a))},
        r"warning labels \d+% of the train pixels have no label",
    ),
    "one class in a small split": (
        {"rows": lambda rows: (rows.update(train=rows["train"][:5]), relabel(np.zeros_like)(rows))},
        "error classes 2 of 3 classes occur in none of the 5 examined train images",
    ),
    "a rotated image with an upright label": (
        {"rows": one("image", rotated)},
        "warning orientation 1 of 60 train samples; .*'train20': the image has the EXIF orientatio",
    ),
    "palettes that differ": (
        {"rows": recolored},
        r"warning palette \d+ of 60 train samples; .*: index \d of the label's palette is the col",
    ),
    "palettes that differ between the splits": (
        {"rows": recolored_validation},
        r"warning palette the palettes of the splits differ: .* of the validation split: index 0 ",
    ),
    "a label of several pages": (
        {"rows": one("label", pages)},
        "error samples 1 of 60 train .*'train20'.*the label file holds 2 frames or pages",
    ),
    "a black image among others": (
        {"rows": one("image", lambda row: encode(np.zeros((48, 64, 3), np.uint8), format="PNG"))},
        "warning images 1 of 60 train images have a single colour; the first is 'train20'",
    ),
    "black images": ({"rows": constant}, "error images 60 of 60 .*have a single colour"),
    "validation images in train": (
        {"rows": leak},
        r"error splits \d+ of the examined images are in both train and validation",
    ),
    "one id for all": ({"rows": same_ids}, "warning ids 1 ids are shared by several train samples"),
    "images too small": (
        {"rows": small},
        "error sizes train images have sides of 20 pixels, but SegFormer needs 29",
    ),
    "validation sizes in one batch": (
        {"rows": mixed("validation"), "data": {"eval_batch_size": 4}},
        "error sizes validation images have 2 sizes.*eval_batch_size 1",
    ),
    "training sizes without a crop": (
        {"rows": mixed("train"), "data": {"crop_size": None}},
        "error sizes training images of several sizes.*set --data.crop_size",
    ),
    "scales without a crop": (
        {"data": {"crop_size": None, "scale_range": (0.5, 2.0)}},
        "error sizes training images of several scales",
    ),
    "crops of mostly padding": (
        {"data": {"crop_size": (256, 256)}},
        "warning sizes images at scale 1 fill 5% of crops of .256, 256. pixels",
    ),
    "crops too small": (
        {"data": {"crop_size": (28, 28)}},
        "error sizes crops of .28, 28. pixels are smaller than the 29 that SegFormer needs",
    ),
    "fewer images than a global batch": (
        {"data": {"batch_size": 64}},
        "warning plan the global batch has 64 samples, but there are only 60",
    ),
    "no number of steps": ({"trainer": {"max_steps": -1}}, "error recipe trainer.max_steps is not"),
    "a warm-up longer than the training": (
        {"model": {"warmup_steps": 1500}},
        "error recipe the learning rate warms up for 1500 steps, but training ends after 50",
    ),
    "no validation before the end": (
        {"trainer": {"val_check_interval": 80}},
        "warning recipe validation runs every 80 batches",
    ),
    "a learning rate of another optimiser": (
        {"model": {"lr": 0.05}},
        "warning recipe learning rates of 0.05 in the encoder and 0.5",
    ),
    "a mean of 0 to 255": (
        {"model": {"image_mean": (123.7, 116.3, 103.5)}},
        "error recipe model.image_mean and model.image_std are for pixel values of 0 to 255",
    ),
    "one image per batch": (
        {"data": {"batch_size": 1}},
        "warning recipe with --data.batch_size 1, BatchNorm computes its statistics over one image",
    ),
    "weights that do not exist": (
        {"model": {"weights": "nowhere.pth"}},
        "error weights there is no file or folder 'nowhere.pth'",
    ),
    "more memory than there is": (
        {"data": {"batch_size": 10_000_000}},
        "error memory training needs at least .* lower --data.batch_size",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, visit, healthy):
    planted, expected = FAULTS[fault]
    if "rows" in planted:
        planted["rows"](healthy)
    examination = visit(
        break_folder=planted.get("folder"),
        **{key: value for key, value in planted.items() if key not in ("rows", "folder")},
    )
    findings = [f"{one.level} {one.check} {one.message}" for one in examination.findings]
    assert any(re.match(expected, line) for line in findings), findings
    assert examination.has_errors == any(line.startswith("error") for line in findings)


def test_skipping_is_advised_only_where_it_helps(visit, healthy, monkeypatch):
    """A row with a bad label can be skipped, a network failure cannot."""

    def failing(self, group):
        raise UserError("the shard could not be read for 600 s")

    healthy["train"][3]["label"] = {"bytes": b"no image", "path": None}
    (finding,) = [one for one in visit(healthy).findings if one.check == "samples"]
    assert finding.message.endswith("; or skip them with --data.on_bad_sample skip")
    monkeypatch.setattr("segformer_pl.data.parquet.ParquetSource.read", failing)
    findings = [one for one in visit(healthy).findings if one.check == "samples"]
    assert findings
    assert all("could not be read for 600 s" in one.message for one in findings)
    assert not any("on_bad_sample" in one.message for one in findings)


@pytest.mark.slow
def test_large_row_groups_are_reported(visit, monkeypatch):
    monkeypatch.setattr("segformer_pl.data.order.LANES_BYTES", 1 << 18)
    (finding,) = visit().findings
    assert re.match(r"row groups of 0 MB leave memory for only \d+ at a time", finding.message)


@pytest.mark.slow
def test_slow_loading_is_reported(visit, monkeypatch):
    monkeypatch.setattr("segformer_pl.doctor.cost._time_step", lambda *_: 1e-6)
    (finding,) = visit().findings
    assert finding.check == "throughput"
    assert re.search(
        r"1 data-loader workers deliver \d+; set --data.num_workers \d+", finding.message
    )
    (finding,) = visit(data={"num_workers": 0}).findings
    assert "without data-loader workers" in finding.message


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    folder = tmp_path / "shapes"
    shapes.generate(folder, {"train": 60, "validation": 60})
    arguments = [f"--data.path={folder}", "--trainer.max_steps=4000", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.val_check_interval=100", "--json"]
    with pytest.raises(SystemExit) as exit:
        main(["doctor", *arguments])
    report = json.loads(capsys.readouterr().out)
    assert exit.value.code == 0
    assert {finding["check"] for finding in report["findings"]} <= {"splits"}  # a smaller copy
    assert report["facts"]["train"]["images"] == 60

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"path": str(folder)}, "trainer": {"max_steps": 3}}))
    with pytest.raises(SystemExit) as exit:
        main(["doctor", str(config), "--trainer.accelerator=cpu"])
    assert exit.value.code == 1
    assert "error: [recipe] the learning rate warms up for 1500" in capsys.readouterr().out
