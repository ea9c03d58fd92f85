import numpy as np
import pytest

from segformer_pl.data.labels import DataError, LabelSpec

SPEC = LabelSpec(
    names=("road", "car"), colors=((0, 0, 0), (1, 1, 1)), ignored=frozenset({7}), ignore_index=255
)


def test_values_map_to_train_ids_and_ignored_values_to_ignore_index():
    raw = np.array([[0, 1], [7, 0]], np.uint8)
    np.testing.assert_array_equal(SPEC.to_train_ids(raw, "x"), [[0, 1], [255, 0]])


def test_an_explicit_mapping_replaces_the_identity():
    spec = LabelSpec(names=("a",), colors=((0, 0, 0),), raw_to_train={500: 0})
    raw = np.array([[500]], np.uint16)
    np.testing.assert_array_equal(spec.to_train_ids(raw, "x"), [[0]])
    with pytest.raises(DataError, match="label value 0 in 1 pixels"):
        spec.to_train_ids(np.zeros((1, 1), np.uint8), "x")


def test_an_unknown_value_is_named_with_image_count_and_what_is_known():
    raw = np.array([[0, 9], [9, 3]], np.uint8)
    with pytest.raises(
        DataError,
        match=r"^picture 5: label value 9 in 2 pixels \(and 1 other unknown values\) .*0-1, 7",
    ):
        SPEC.to_train_ids(raw, "picture 5")


@pytest.mark.parametrize("value", [-1, 1 << 16, (1 << 16) + 1, (1 << 31) - 1])
def test_values_beyond_16_bits_are_unknown_not_wrapped_around(value):
    with pytest.raises(DataError, match=f"label value {value} in 1 pixels"):
        SPEC.to_train_ids(np.array([[value, 0]], np.int32), "x")


def test_one_bit_labels_are_the_values_0_and_1():
    raw = np.array([[True, False], [False, False]])
    np.testing.assert_array_equal(SPEC.to_train_ids(raw, "x"), [[1, 0], [0, 0]])


@pytest.mark.parametrize("raw", [np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.float32)])
def test_label_images_without_one_whole_number_per_pixel_are_refused(raw):
    with pytest.raises(DataError, match=r"picture 5: .* not one whole number per pixel; store"):
        SPEC.to_train_ids(raw, "picture 5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ("a", "b"), "colors": ((0, 0, 0),)}, "2 class names but 1 colours"),
        (
            {"names": ("a",), "colors": ((0, 0, 0),), "raw_to_train": {5: 40}},
            "raw value 5 maps to train id 40, which has no name",
        ),
        (
            {"names": ("a",), "colors": ((0, 0, 0),), "ignore_index": 0},
            "ignore_index 0 is the train id of class 'a'",
        ),
    ],
)
def test_a_contradictory_spec_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelSpec(**arguments)
