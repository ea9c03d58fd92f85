from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from segformer_pl.data.labels import DataError, LabelSpec, distinct_colors

SPEC = LabelSpec(
    names=("road", "car"), colors=((0, 0, 0), (1, 1, 1)), ignored=frozenset({7}), ignore_index=255
)
STREET = LabelSpec(
    names=("road", "car", "tree"),
    colors=((128, 64, 128), (0, 0, 142), (107, 142, 35)),
    ignored=frozenset({(0, 0, 0)}),
    coding="colors",
)


def spec(num_classes, **arguments):
    return LabelSpec(
        names=tuple(f"class {number}" for number in range(num_classes)),
        colors=distinct_colors(num_classes),
        **arguments,
    )


def offset_spec(num_classes, ignored=frozenset({0})):
    raw_to_train = {number + 1: number for number in range(num_classes)}
    return spec(num_classes, raw_to_train=raw_to_train, ignored=ignored)


def test_values_map_to_train_ids_and_ignored_values_to_ignore_index():
    raw = np.array([[0, 1], [7, 0]], np.uint8)
    np.testing.assert_array_equal(SPEC.to_train_ids(raw, "x"), [[0, 1], [255, 0]])


def test_an_explicit_mapping_replaces_the_identity():
    labels = spec(2, raw_to_train={500: 0, 7: 1})
    raw = np.array([[500, 7]], np.uint16)
    np.testing.assert_array_equal(labels.to_train_ids(raw, "x"), [[0, 1]])
    with pytest.raises(DataError, match="label value 0 in 1 pixels"):
        labels.to_train_ids(np.zeros((1, 1), np.uint8), "x")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("flip", [False, True], ids=["contiguous", "a view"])
def test_every_integer_type_and_layout_gives_the_same_train_ids(dtype, flip):
    raw = np.random.default_rng(0).choice([0, 1, 7], (5, 8)).astype(dtype)
    raw = raw.T[::-1] if flip else raw
    train_ids = SPEC.to_train_ids(raw, "x")
    np.testing.assert_array_equal(train_ids, np.where(raw == 7, 255, raw))
    assert train_ids.dtype == np.uint8
    assert train_ids.flags.writeable


def test_16_bit_values_reach_to_65535():
    labels = spec(2, raw_to_train={65535: 0, 256: 1}, ignored=frozenset({40000}))
    raw = np.array([[65535, 256, 40000]], np.uint16)
    np.testing.assert_array_equal(labels.to_train_ids(raw, "x"), [[0, 1, 255]])


def test_a_negative_raw_value_is_not_taken_for_one_from_the_end():
    labels = spec(2, ignored=frozenset({-1}))
    np.testing.assert_array_equal(labels.to_train_ids(np.array([[-1, 0]]), "x"), [[255, 0]])
    with pytest.raises(DataError, match="label value 65535 in 1 pixels"):
        labels.to_train_ids(np.array([[65535]], np.uint16), "x")


@pytest.mark.parametrize(
    ("num_classes", "ignore_index", "dtype"),
    [(254, 254, np.uint8), (254, 255, np.uint8), (255, 255, np.int32), (300, 65535, np.int32)],
)
def test_many_classes(num_classes, ignore_index, dtype):
    labels = spec(num_classes, ignored=frozenset({60000}), ignore_index=ignore_index)
    raw = np.array([[0, 1, num_classes - 1, 60000]], np.uint16)
    train_ids = labels.to_train_ids(raw, "x")
    np.testing.assert_array_equal(train_ids, [[0, 1, num_classes - 1, ignore_index]])
    assert train_ids.dtype == dtype
    eight_bits = np.array([[254 % num_classes]], np.uint8)
    np.testing.assert_array_equal(labels.to_train_ids(eight_bits, "x"), eight_bits)
    with pytest.raises(DataError, match=f"label value {num_classes} in 1 pixels"):
        labels.to_train_ids(np.array([[num_classes]], np.uint16), "x")


def test_colors_map_to_train_ids_and_back():
    rng = np.random.default_rng(0)
    labels = spec(40, coding="colors", ignored=frozenset({(255, 255, 255)}))
    ids = rng.integers(0, 41, (20, 30))
    palette = np.array([*labels.colors, (255, 255, 255)], np.uint8)
    expected = np.where(ids == 40, 255, ids)
    np.testing.assert_array_equal(labels.to_train_ids(palette[ids], "x"), expected)


def test_an_unknown_value_is_named_with_image_count_and_what_is_known():
    raw = np.array([[0, 9], [9, 3]], np.uint8)
    with pytest.raises(
        DataError,
        match=r"^picture 5: label value 9 in 2 pixels \(and 1 other unknown values\) .*0-1, 7;",
    ):
        SPEC.to_train_ids(raw, "picture 5")


def test_an_unknown_color_is_named_with_image_count_and_what_is_known():
    raw = np.full((2, 3, 3), 9, np.uint8)
    with pytest.raises(
        DataError,
        match=r"^picture 5: label colour \(9, 9, 9\) in 6 pixels .*\(128, 64, 128\), .*;",
    ):
        STREET.to_train_ids(raw, "picture 5")


@pytest.mark.parametrize("value", [-1, 1 << 16, (1 << 16) + 1, (1 << 31) - 1])
def test_values_beyond_16_bits_are_unknown_not_wrapped_around(value):
    with pytest.raises(DataError, match=f"label value {value} in 1 pixels"):
        SPEC.to_train_ids(np.array([[value, 0]], np.int32), "x")


def test_one_bit_labels_are_the_values_0_and_1():
    raw = np.array([[True, False], [False, False]])
    np.testing.assert_array_equal(SPEC.to_train_ids(raw, "x"), [[1, 0], [0, 0]])


def blocks(values):
    """A label image of one 16-pixel block for each value."""
    return np.kron(np.array([values], np.uint16), np.ones((16, 16), np.uint16))


@pytest.mark.parametrize(
    ("labels", "values", "cause"),
    [
        (spec(3), [0, 1, 255], r"usually marks unlabelled.* add it to labels\.ignored"),
        (spec(3), [0, 1, 65535], r"usually marks unlabelled.* add it to labels\.ignored"),
        # one above the last name: a class is missing, or they are shifted; nothing tells which
        *(
            (
                spec(3),
                [*values, 3],
                r"it is one above the last of the 3 classes: if a class is missing, add its name "
                rf"to labels\.names; if labels count from 1 \({zero}\), set labels\.offset: 1; if "
                r"it marks unlabelled pixels, add it to labels\.ignored",
            )
            for values, zero in (
                ([0, 1, 2], "0 marks unlabelled pixels"),
                ([1, 2], "there is no 0 here"),
            )
        ),
        (spec(3), [0, 3, 9], r"3 in 256 .*one above the last of the 3 classes"),
        (offset_spec(3), [0, 1, 2, 255], r"count from 0: leave labels\.offset out"),
        (offset_spec(3, frozenset()), [0, 1], r"0 in 256.*unlabelled.*add it to labels\.ignored"),
        (
            spec(2),
            [0, 255],
            r"if 255 stands for 'class 1', set labels\.raw_to_train: \{0: 0, 255: 1\}; if it "
            r"marks unlabelled pixels, add it to labels\.ignored",
        ),
        (spec(3), [0, 1, 40, 50, 60, 70], r"correct the label image, or add the value"),
    ],
)
def test_an_unknown_value_comes_with_its_likely_cause(labels, values, cause):
    with pytest.raises(DataError, match=cause):
        labels.to_train_ids(blocks(values), "x")


@pytest.mark.parametrize(
    ("color", "cause"),
    [
        ((142, 0, 0), r"\(0, 0, 142\) is: if .* BGR, store them as RGB; otherwise add the colour"),
        ((255, 255, 255), r"usually marks unlabelled pixels: add it to labels\.ignored"),
        ((5, 6, 7), "correct the label image, or add the colour"),
    ],
)
def test_an_unknown_color_comes_with_its_likely_cause(color, cause):
    with pytest.raises(DataError, match=cause):
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


def test_lossy_storage_and_interpolation_are_told_from_a_wrong_spec():
    apart = spec(3, raw_to_train={0: 0, 120: 1, 240: 2})
    values = np.array([0, 120, 240], np.uint8)[discs()]
    resized = np.array(Image.fromarray(values).resize((200, 200), Image.Resampling.BILINEAR))
    colors = np.array(STREET.colors, np.uint8)[discs()]
    for labels, raw in [(apart, jpeg(values)), (apart, resized), (STREET, jpeg(colors))]:
        with pytest.raises(
            DataError, match=r"lossy format \(JPEG\) or of resizing .*; otherwise the"
        ):
            labels.to_train_ids(raw, "x")


@pytest.mark.parametrize(
    ("labels", "raw", "advice"),
    [
        (SPEC, np.zeros((4, 6, 3), np.uint8), "one whole number per pixel; store .* one channel"),
        (SPEC, np.zeros((4, 6), np.float32), "not one whole number per pixel; store"),
        (SPEC, np.arange(72, dtype=np.uint8).reshape(4, 6, 3), r"set labels\.coding: colors and"),
        (STREET, np.zeros((4, 6), np.uint8), r"set labels\.coding: values"),
        (STREET, np.zeros((4, 6, 4), np.uint8), "store RGB without alpha"),
    ],
)
def test_label_images_of_another_kind_are_refused(labels, raw, advice):
    with pytest.raises(DataError, match=f"^picture 5: the label image is an array of .*{advice}"):
        labels.to_train_ids(raw, "picture 5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colors": ((0, 0, 0),)}, "2 class names but 1 colours"),
        ({"names": ("a", "a")}, "two classes are named 'a'"),
        ({"raw_to_train": {5: 40}}, "raw value 5 maps to train id 40, which has no name"),
        ({"raw_to_train": {4: 1, 5: 0}, "ignored": frozenset({5})}, "raw value 5 is ignored and"),
        ({"raw_to_train": {1 << 16: 0, 1: 1}}, "raw value 65536 is not among"),
        ({"ignore_index": 0}, "ignore_index 0 is the train id of class 'a'"),
        ({"ignore_index": -1}, "ignore_index -1 is negative; choose one of at least 2"),
        ({"coding": "colors", "raw_to_train": {0: 0, 1: 1}}, "leave raw_to_train and offset out"),
        (
            {"coding": "colors", "ignored": frozenset({(0, 0, 0)})},
            r"colour \(0, 0, 0\) has two meanings",
        ),
        # any answer would be right
        ({"names": ("a",), "colors": ((0, 0, 0),)}, "there is one class, 'a', and nothing to tell"),
        ({"raw_to_train": {4: 1, 5: 1}}, "raw_to_train maps every raw value to class 'b', so that"),
        # what is drawn and written line by line
        *(
            ({"names": ("a", name)}, "class name .* holds a line break or control character; write")
            for name in ("two\nlines", "tab\t", "\x1b[31mred", "\u2028", "\ud800")
        ),
    ],
)
def test_a_contradictory_spec_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        LabelSpec(**{"names": ("a", "b"), "colors": ((0, 0, 0), (1, 1, 1))} | arguments)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "name", ["$x^2_{", "<b>", "道路 1", "نیم\u200cفاصله", "a\u00a0b", "%s {0} \\"]
)
def test_any_other_text_is_a_name(name):
    assert LabelSpec(("a", name), ((0, 0, 0), (1, 1, 1))).names[1] == name


def test_two_classes_may_share_a_color_where_colors_only_draw():
    LabelSpec(names=("a", "b"), colors=((0, 0, 0), (0, 0, 0)))


def linear(colors):
    srgb = np.array(colors) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def test_generated_colors_stay_apart_without_red_green_vision():
    # Vienot et al. 1999 in linear RGB: what remains of a colour without the L or the M cones.
    without = {
        "none": np.eye(3),
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    for matrix in without.values():
        seen = np.cbrt((linear(distinct_colors(19)) @ np.transpose(matrix)).clip(0))
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distances[~np.eye(19, dtype=bool)].min() > 0.05


def test_generated_colors_are_a_function_of_the_class_alone():
    colors = distinct_colors(400)
    assert len(set(colors)) == 400
    assert distinct_colors(19) == colors[:19]
    with pytest.raises(ValueError, match="5000 classes; give their colors"):
        distinct_colors(5000)
