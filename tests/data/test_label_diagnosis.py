from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.labels import LabelSpec
from segformer_pl.errors import UserError

SPEC = LabelSpec(
    names=("road", "car"), colors=((0, 0, 0), (1, 1, 1)), ignored=frozenset({7}), ignore_index=255
)
THREE = LabelSpec(names=("class 0", "class 1", "class 2"), colors=distinct_colors(3))
FROM_1 = replace(THREE, raw_to_train={1: 0, 2: 1, 3: 2})
STREET = LabelSpec(
    names=("road", "car", "tree"),
    colors=((128, 64, 128), (0, 0, 142), (107, 142, 35)),
    ignored=frozenset({(0, 0, 0)}),
    coding="colors",
)


def test_an_unknown_value_is_reported_with_image_count_and_known_values():
    raw = np.array([[0, 9], [9, 3]], np.uint8)
    with pytest.raises(
        UserError,
        match=r"^image 5: label value 9 in 2 pixels \(and 1 other unknown values\) .*\(0-1, 7\);",
    ):
        SPEC.to_train_ids(raw, "image 5")


def test_an_unknown_color_is_reported_with_image_count_and_known_colors():
    raw = np.full((2, 3, 3), 9, np.uint8)
    with pytest.raises(
        UserError,
        match=r"^image 5: label colour \(9, 9, 9\) in 6 pixels .*\(128, 64, 128\), .*;",
    ):
        STREET.to_train_ids(raw, "image 5")


def blocks(values):
    """A label image of one 16-pixel block for each value."""
    return np.kron(np.array([values], np.uint16), np.ones((16, 16), np.uint16))


@pytest.mark.parametrize(
    ("labels", "values", "cause"),
    [
        (THREE, [0, 1, 255], r"usually marks unlabelled.* add it to labels\.ignored"),
        (THREE, [0, 1, 65535], r"usually marks unlabelled.* add it to labels\.ignored"),
        # One above the last name: a class is missing or the values are shifted. Both are possible.
        *(
            (
                THREE,
                [*values, 3],
                r"it is one above the last of the 3 classes: if a class is missing, add its name "
                rf"to labels\.names; if labels start at 1 \({zero}\), set labels\.offset: 1; if "
                r"it marks unlabelled pixels, add it to labels\.ignored",
            )
            for values, zero in (
                ([0, 1, 2], "0 marks unlabelled pixels"),
                ([1, 2], "this image has no 0"),
            )
        ),
        (THREE, [0, 3, 9], r"3 in 256 .*one above the last of the 3 classes"),
        (
            replace(FROM_1, ignored=frozenset({0})),
            [0, 1, 2, 255],
            r"start at 0: if these do, leave labels\.offset out",
        ),
        (FROM_1, [0, 1], r"0 in 256.*unlabelled.*add it to labels\.ignored"),
        (
            LabelSpec(THREE.names[:2], THREE.colors[:2]),
            [0, 255],
            r"if 255 stands for 'class 1', set labels\.raw_to_train: \{0: 0, 255: 1\}; if it "
            r"marks unlabelled pixels, add it to labels\.ignored",
        ),
        (THREE, [0, 1, 40, 50, 60, 70], r"correct the label image, or add the value"),
    ],
)
def test_an_unknown_value_comes_with_its_likely_cause(labels, values, cause):
    with pytest.raises(UserError, match=cause):
        labels.to_train_ids(blocks(values), "x")


@pytest.mark.parametrize(
    ("color", "cause"),
    [
        (
            (142, 0, 0),
            r"\(0, 0, 142\) is among them: if .* BGR, store them as RGB; otherwise add the colour",
        ),
        ((255, 255, 255), r"usually marks unlabelled pixels: add it to labels\.ignored"),
        ((5, 6, 7), "correct the label image, or add the colour"),
    ],
)
def test_an_unknown_color_comes_with_its_likely_cause(color, cause):
    with pytest.raises(UserError, match=cause):
        STREET.to_train_ids(np.full((4, 4, 3), color, np.uint8), "x")


def jpeg(array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=90)
    return np.array(Image.open(buffer))


def discs(size=128):
    """Train ids of three classes with curved borders."""
    y, x = np.mgrid[:size, :size]
    disc = (np.hypot(x - 40, y - 50) < 30) + 2 * (np.hypot(x - 90, y - 90) < 25)
    return disc.astype(np.uint8)


def test_lossy_storage_and_interpolation_are_distinguished_from_a_wrong_spec():
    spaced = replace(THREE, raw_to_train={0: 0, 120: 1, 240: 2})
    values = np.array([0, 120, 240], np.uint8)[discs()]
    resized = np.array(Image.fromarray(values).resize((200, 200), Image.Resampling.BILINEAR))
    colors = np.array(STREET.colors, np.uint8)[discs()]
    for labels, raw in [(spaced, jpeg(values)), (spaced, resized), (STREET, jpeg(colors))]:
        with pytest.raises(
            UserError, match=r"lossy format \(JPEG\) or resizing .*; otherwise add these"
        ):
            labels.to_train_ids(raw, "x")


@pytest.mark.parametrize(
    ("labels", "raw", "advice"),
    [
        (SPEC, np.zeros((4, 6, 3), np.uint8), r"store one of .*, set labels\.coding: colors and"),
        (SPEC, np.zeros((4, 6), np.float32), "not one integer per pixel; store"),
        (SPEC, np.arange(72, dtype=np.uint8).reshape(4, 6, 3), r"set labels\.coding: colors and"),
        (STREET, np.zeros((4, 6), np.uint8), r"set labels\.coding: values"),
        (STREET, np.zeros((4, 6, 4), np.uint8), "store RGB without alpha"),
    ],
)
def test_label_images_of_another_kind_are_refused(labels, raw, advice):
    with pytest.raises(UserError, match=f"^image 5: the label image is an array of .*{advice}"):
        labels.to_train_ids(raw, "image 5")
