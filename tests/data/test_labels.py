import numpy as np
import pytest

from segformer_pl.data.class_colors import distinct_colors
from segformer_pl.data.labels import LabelSpec
from segformer_pl.errors import UserError

SPEC = LabelSpec(
    names=("road", "car"), colors=((0, 0, 0), (1, 1, 1)), ignored=frozenset({7}), ignore_index=255
)


def spec(num_classes, **arguments):
    return LabelSpec(
        names=tuple(f"class {number}" for number in range(num_classes)),
        colors=distinct_colors(num_classes),
        **arguments,
    )


def test_values_map_to_train_ids_and_ignored_values_to_ignore_index():
    raw = np.array([[0, 1], [7, 0]], np.uint8)
    np.testing.assert_array_equal(SPEC.to_train_ids(raw, "x"), [[0, 1], [255, 0]])


def test_an_explicit_mapping_replaces_the_identity():
    labels = spec(2, raw_to_train={500: 0, 7: 1})
    raw = np.array([[500, 7]], np.uint16)
    np.testing.assert_array_equal(labels.to_train_ids(raw, "x"), [[0, 1]])
    with pytest.raises(UserError, match="label value 0 in 1 pixel"):
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


def test_a_negative_raw_value_is_not_confused_with_a_large_one():
    labels = spec(2, ignored=frozenset({-1}))
    np.testing.assert_array_equal(labels.to_train_ids(np.array([[-1, 0]]), "x"), [[255, 0]])
    with pytest.raises(UserError, match="label value 65535 in 1 pixel"):
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
    with pytest.raises(UserError, match=f"label value {num_classes} in 1 pixel"):
        labels.to_train_ids(np.array([[num_classes]], np.uint16), "x")


def test_colors_map_to_train_ids_and_back():
    rng = np.random.default_rng(0)
    labels = spec(40, coding="colors", ignored=frozenset({(255, 255, 255)}))
    ids = rng.integers(0, 41, (20, 30))
    palette = np.array([*labels.colors, (255, 255, 255)], np.uint8)
    expected = np.where(ids == 40, 255, ids)
    np.testing.assert_array_equal(labels.to_train_ids(palette[ids], "x"), expected)


@pytest.mark.parametrize("value", [-1, 1 << 16, (1 << 16) + 1, (1 << 31) - 1])
def test_values_beyond_16_bits_are_unknown_and_do_not_wrap_around(value):
    with pytest.raises(UserError, match=f"label value {value} in 1 pixel"):
        SPEC.to_train_ids(np.array([[value, 0]], np.int32), "x")


def test_one_bit_labels_are_the_values_0_and_1():
    raw = np.array([[True, False], [False, False]])
    np.testing.assert_array_equal(SPEC.to_train_ids(raw, "x"), [[1, 0], [0, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colors": ((0, 0, 0),)}, "2 class names but 1 colours; give one"),
        ({"names": ("a", "a")}, "two classes are named 'a'"),
        ({"raw_to_train": {5: 40}}, "raw value 5 maps to train id 40, which has no name"),
        ({"raw_to_train": {4: 1, 5: 0}, "ignored": frozenset({5})}, "raw value 5 is ignored and"),
        ({"raw_to_train": {1 << 16: 0, 1: 1}}, "raw value 65536 is not among the supported"),
        ({"ignore_index": 0}, "ignore_index 0 is the train id of class 'a'"),
        ({"ignore_index": -1}, "ignore_index -1 is negative; choose a value of at least 2"),
        ({"coding": "colors", "raw_to_train": {0: 0, 1: 1}}, "leave raw_to_train and offset out"),
        (
            {"coding": "colors", "ignored": frozenset({(0, 0, 0)})},
            r"colour \(0, 0, 0\) has two meanings",
        ),
        # with one class every prediction is right
        (
            {"names": ("a",), "colors": ((0, 0, 0),)},
            "there is one class, 'a', but segmentation needs two",
        ),
        ({"raw_to_train": {4: 1, 5: 1}}, "raw_to_train maps every raw value to class 'b'; map the"),
        # names are printed line by line and drawn in figures
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
def test_any_other_text_is_a_valid_name(name):
    assert LabelSpec(("a", name), ((0, 0, 0), (1, 1, 1))).names[1] == name


def test_two_classes_may_share_a_color_if_colors_do_not_code_classes():
    LabelSpec(names=("a", "b"), colors=((0, 0, 0), (0, 0, 0)))
