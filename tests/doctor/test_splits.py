"""The doctor's checks of each split: files, labels, classes and image sizes."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from segformer_pl.errors import UserError

pytestmark = pytest.mark.slow

NAMES = ["road", "car", "tree"]


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
    "one id for all": ({"rows": same_ids}, "warning ids 1 id shared by several train samples"),
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
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, check_fault):
    check_fault(*FAULTS[fault])


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
