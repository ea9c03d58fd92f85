"""The catalogue's entries, and the validation of YAML files of the user's own."""

import re

import numpy as np
import pytest

from segformer_pl.data import shapes
from segformer_pl.data.catalog import FOLDER, dataset_names, find_dataset
from segformer_pl.errors import UserError

NUM_CLASSES = {
    "ade20k": 150,
    "camvid": 11,
    "cityscapes": 19,
    "coco_stuff171": 171,
    "coco_stuff182": 182,
    "foodseg103": 104,
    "mapillary_vistas": 65,
    "pascal_context": 59,
    "pascal_voc2012": 21,
    "shapes": 6,
    "sidewalk": 34,
}
MINIMAL = """
image_column: photo
label_column: mask
labels:
  names: [road, car]
"""


def train_ids(name, *values):
    return find_dataset(name).labels.to_train_ids(np.array([values], np.int32), "x")[0].tolist()


def names(name, *numbers):
    return [find_dataset(name).labels.names[number] for number in numbers]


@pytest.fixture
def yaml_file(tmp_path):
    """Function text -> path of a YAML file with it."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_catalogue_has_these_data_sets_and_numbers_of_classes():
    num_classes = {name: find_dataset(name).labels.num_classes for name in dataset_names()}
    assert num_classes == NUM_CLASSES


@pytest.mark.parametrize("name", NUM_CLASSES)
def test_an_entry_is_complete(name):
    entry = find_dataset(name)
    assert entry.name == name
    assert entry.title
    assert entry.source
    assert entry.verified
    assert entry.revision is None or entry.hub is not None
    assert "# Source:" in (FOLDER / f"{name}.yaml").read_text()
    assert all(label == label.strip() for label in entry.labels.names)
    ids = set(range(entry.labels.num_classes))
    if entry.labels.raw_to_train is not None:
        assert set(entry.labels.raw_to_train.values()) == ids


def test_an_unknown_name_lists_the_names_and_suggests_one():
    with pytest.raises(UserError, match=r"no data set 'camvd'.*did you mean 'camvid'.*shapes"):
        find_dataset("camvd")


def test_a_name_reads_only_its_own_file(tmp_path, monkeypatch):
    for file in FOLDER.glob("*.yaml"):
        text = file.read_text() if file.stem == "camvid" else "broken: ["
        (tmp_path / file.name).write_text(text)
    monkeypatch.setattr("segformer_pl.data.catalog.FOLDER", tmp_path)
    assert find_dataset("camvid").labels.num_classes == 11


def test_camvid_has_eleven_classes_and_an_unlabelled_value():
    labels = find_dataset("camvid").labels
    assert labels.num_classes == 11
    assert labels.ignored == {11}
    assert labels.names[3] == "road"


def test_the_entry_of_shapes_matches_its_generator():
    entry = find_dataset("shapes")
    assert entry.labels.names == shapes.CLASS_NAMES
    assert entry.labels.colors == shapes.COLORS
    assert entry.labels.ignored == {shapes.UNLABELLED}
    assert entry.num_samples == shapes.NUM_IMAGES
    assert entry.size == (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE)
    assert entry.prepare is shapes.prepare
    assert entry.reference_scores is shapes.reference_scores


def test_cityscapes_evaluates_19_of_its_34_ids():
    # Ignored: the void classes, parking, rail track, guard rail, bridge, tunnel, pole group,
    # caravan and trailer.
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    others = [value for value in range(-1, 34) if value not in evaluated]
    assert train_ids("cityscapes", *evaluated) == list(range(19))
    assert set(train_ids("cityscapes", *others, 255)) == {255}
    assert names("cityscapes", 0, 2, 10, 13, 18) == ["road", "building", "sky", "car", "bicycle"]
    assert find_dataset("cityscapes").labels.colors[13] == (0, 0, 142)


def test_ade20k_counts_from_one_and_ignores_zero():
    assert train_ids("ade20k", 0, 1, 150) == [255, 0, 149]
    assert names("ade20k", 0, 1, 2, 12, 149) == ["wall", "building", "sky", "person", "flag"]
    with pytest.raises(UserError, match=r"labels \(0-150\); it usually marks unlabelled"):
        train_ids("ade20k", 255)


@pytest.mark.slow
def test_both_coco_stuff_entries_name_a_value_alike():
    some, every = (find_dataset(f"coco_stuff{number}").labels for number in (171, 182))
    for raw, train_id in some.raw_to_train.items():
        assert some.names[train_id] == every.names[raw]
    missing = set(range(182)) - set(some.raw_to_train)
    assert {every.names[raw] for raw in missing} == {
        *("street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk"),
        *("door", "blender", "hair brush"),
    }
    # Object numbers of COCO are one above the values: 1 is person, 90 toothbrush.
    assert train_ids("coco_stuff171", 0, 11 + 1, 89, 181, 255) == [0, 11, 79, 170, 255]
    assert names("coco_stuff171", 0, 11, 79, 170) == ["person", "stop sign", "toothbrush", "wood"]


def test_voc_has_the_palette_of_its_bit_pattern():
    entry = find_dataset("pascal_voc2012")
    numbers = range(21)
    palette = [
        tuple(
            sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
            for channel in range(3)
        )
        for number in numbers
    ]
    assert list(entry.labels.colors) == palette
    raw = np.array([[*palette, (224, 224, 192)]], np.uint8)
    np.testing.assert_array_equal(entry.labels.to_train_ids(raw, "x"), [[*numbers, 255]])


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("pascal_context", [0, 1, 59], [255, 0, 58]),
        ("mapillary_vistas", [0, 64, 65], [0, 64, 255]),
        ("sidewalk", [0, 1, 34], [255, 0, 33]),
        ("foodseg103", [0, 1, 103], [0, 1, 103]),
        ("camvid", [0, 10, 11], [0, 10, 255]),
    ],
)
def test_first_and_last_values(name, raw, expected):
    assert train_ids(name, *raw) == expected


def test_first_and_last_names():
    assert names("pascal_context", 0, 58) == ["aeroplane", "wood"]
    assert names("mapillary_vistas", 0, 13, 64) == ["Bird", "Road", "Ego Vehicle"]
    assert names("sidewalk", 0, 33) == ["flat-road", "void-unclear"]
    assert names("foodseg103", 0, 103) == ["background", "other ingredients"]


def test_a_file_needs_only_columns_and_class_names(yaml_file):
    entry = find_dataset(yaml_file(MINIMAL))
    assert (entry.name, entry.image_column, entry.label_column) == ("mine", "photo", "mask")
    assert (entry.id_column, entry.hub, entry.size, entry.splits) == (None, None, None, {})
    assert entry.labels.names == ("road", "car")
    assert len(set(entry.labels.colors)) == 2
    train_ids = entry.labels.to_train_ids(np.array([[0, 1]], np.uint8), "x")
    np.testing.assert_array_equal(train_ids, [[0, 1]])


def test_a_file_may_have_every_key_of_an_entry(yaml_file):
    entry = find_dataset(
        yaml_file(
            MINIMAL
            + "  offset: 3\n  ignored: [255]\n  ignore_index: 9\n  colors: [[1, 2, 3], [4, 5, 6]]\n"
            + "hub: me/mine\nconfig: large\nsplits: {validation: val}\nsize: [480, 640]\n"
            + f"revision: {'0a' * 20}\nid_column: id\nnum_samples: {{train: 5}}\n"
        )
    )
    assert (entry.hub, entry.config, entry.splits) == ("me/mine", "large", {"validation": "val"})
    assert (entry.size, entry.num_samples, entry.id_column) == ((480, 640), {"train": 5}, "id")
    assert entry.labels.colors == ((1, 2, 3), (4, 5, 6))
    raw = np.array([[0, 2, 3, 4, 255]], np.uint8)
    np.testing.assert_array_equal(entry.labels.to_train_ids(raw, "x"), [[9, 9, 0, 1, 9]])


def test_a_file_may_code_classes_by_color(yaml_file):
    text = (
        MINIMAL + "  coding: colors\n  colors: [[9, 9, 9], [0, 0, 200]]\n  ignored: [[0, 0, 0]]\n"
    )
    raw = np.array([[[0, 0, 200], [9, 9, 9], [0, 0, 0]]], np.uint8)
    labels = find_dataset(yaml_file(text)).labels
    np.testing.assert_array_equal(labels.to_train_ids(raw, "x"), [[1, 0, 255]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give a YAML file that holds the description of a data set"),
        ("names: [a", "line 1: invalid YAML (.*did not find expected ',' or ']'"),
        (
            MINIMAL.replace("image_column", "image_colum"),
            "unknown key image_colum; did you mean im",
        ),
        (MINIMAL.replace("names", "name"), "unknown key labels.name; did you mean names"),
        (
            MINIMAL.replace("label_column: mask", ""),
            "label_column is missing; give a text",
        ),
        (MINIMAL.replace("names: [road, car]", "offset: 1"), "labels.names is missing"),
        ("image_column: a\nlabel_column: b\nlabels:\n", "labels is missing"),
        (MINIMAL.replace("car]", "on]"), r"labels.names is ['road', True]; .* quote"),
        (MINIMAL.replace("[road, car]", "road"), "labels.names is 'road'; it has to be a list"),
        (MINIMAL.replace("car", "road"), "labels: two classes are named 'road'"),
        (
            MINIMAL.replace("car", '"a\\nb"'),
            r"labels: class name 'a\nb' holds a line break or contr",
        ),
        (MINIMAL.replace("car", '"\\e[1m"'), r"labels: class name '\x1b[1m' holds a line break or"),
        (MINIMAL.replace("[road, car]", "[road]"), "labels: there is one class, 'road', but"),
        (MINIMAL + 'title: "a\\nb"', r"title is 'a\nb'; it has to be a text of one line"),
        (MINIMAL + 'name: "a\\0b"', r"name is 'a\x00b'; it has to be a text of one line"),
        (MINIMAL + "  colors: [[0, 0, 0], [0, 0, 256]]", r"labels.colors is .*each 0 to 255"),
        (MINIMAL + "  colors: [[0, 0, 0]]", "labels: 2 class names but 1 colours"),
        (MINIMAL + "  coding: rgb", "labels.coding is 'rgb'; it has to be values or colors"),
        (MINIMAL + "  coding: colors", "labels: coding is colors, but colors is missing"),
        (MINIMAL + "  ignored: [[0, 0, 0]]", r"ignored holds [0, 0, 0], which is not a whole"),
        (MINIMAL + "  offset: 1\n  raw_to_train: {1: 0}", "offset and raw_to_train both define"),
        (MINIMAL + "  raw_to_train: {1: 7}", "raw value 1 maps to train id 7, which has no name"),
        (MINIMAL + "  ignore_index: 1", "ignore_index 1 is the train id of class 'car'"),
        (MINIMAL + "hub: mine", "hub is 'mine'; it has to be owner/name"),
        (MINIMAL + "revision: main", "revision is 'main'; it has to be a commit"),
        (MINIMAL + "size: [480]", r"size is [480]; it has to be [height, width]"),
        (MINIMAL + "splits: {val: val}", "splits is {'val': 'val'}; it has to be a mapping of"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_file_and_key(yaml_file, text, message):
    file = yaml_file(text)
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(UserError, match=pattern) as raised:
        find_dataset(file)
    assert str(raised.value).lstrip("'").startswith(file)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"'nowhere\.yaml' cannot be read \(No such"):
        find_dataset("nowhere.yaml")
