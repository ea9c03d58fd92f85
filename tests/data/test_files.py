"""Which files are read as what: names, splits, shards, links, and everything that is left out."""

import os
import shutil
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from segformer_pl.data import StreamingSegmentationData, files, sources
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.image_folder import PICTURES
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.sources import open_split
from segformer_pl.data.streaming import Samples, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.doctor.findings import Examination
from segformer_pl.doctor.splits import examine_split
from segformer_pl.errors import UserError
from segformer_pl.models import segformer_b0

ENTRY = find_dataset("shapes")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources._warn_once.cache_clear()


def samples_of(path, split="train", **arguments):
    source = open_split(ENTRY, path if isinstance(path, dict) else str(path), split)
    order = StoredOrder(source.group_rows)
    return Samples(ENTRY, source, order, to_tensors, **arguments)


def ids(path, split="train"):
    samples = samples_of(path, split)
    return [samples[position]["id"] for position in range(samples.order.num_rows)]


@pytest.fixture
def pairs(tmp_path, row):
    """Function {name of image: label value}, {other file: content} -> a folder of them."""

    def make(images, labels=None):
        root = tmp_path / "set"
        for name in ("images/train", "labels/train"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name, value in images.items():
            file = root / "images" / "train" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row("x")["image"]["bytes"])
            label = name.rpartition(".")[0] + ".png"
            if value is not None:
                (root / "labels" / "train" / label).parent.mkdir(parents=True, exist_ok=True)
                content = row("x", label_value=value)["label"]["bytes"]
                (root / "labels" / "train" / label).write_bytes(content)
        for name in labels or []:
            (root / "labels" / "train" / name).write_bytes(row("x")["label"]["bytes"])
        return root

    return make


# Names


def test_a_name_ends_at_its_last_dot(pairs):
    names = ["clip.001.png", "clip.002.png", "clip.png", "road_jpg.rf.9f3a.jpg", "a.b/c.d.jpg"]
    folder = pairs({name: value for value, name in enumerate(names)})
    samples = samples_of(folder)
    labels = {samples[i]["id"]: int(samples[i]["label"][0, 0]) for i in range(5)}
    assert labels == {"clip.001": 0, "clip.002": 1, "clip": 2, "road_jpg.rf.9f3a": 3, "a.b/c.d": 4}


def test_shards_of_one_name_in_two_folders_have_names_of_their_own(tmp_path, row, write_shards):
    nameless = [row("x") | {"id": None}]
    for folder in ("a", "b"):
        write_shards(tmp_path / folder, "train", [nameless])
    shards = [str(tmp_path / folder / "train-00000-of-00001.parquet") for folder in ("a", "b")]
    assert ids({"train": shards}) == ["a/train-00000-of-00001:0", "b/train-00000-of-00001:0"]
    assert ids({"train": shards[:1]}) == ["train-00000-of-00001:0"]


# Splits


@pytest.mark.parametrize("place", ["", "data"])
def test_the_shards_of_another_split_whose_name_begins_alike(tmp_path, row, write_shards, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    write_shards(folder, "train", [[row("t0")], [row("t1")]])
    write_shards(folder, "train_extra", [[row("e0")]])
    write_shards(folder, "val", [[row("v0")]])
    write_shards(folder, "validation_hard", [[row("h0")]])
    entry_of_library = datasets.load_dataset_builder(str(tmp_path)).config.data_files
    assert ids(tmp_path) == ["t0", "t1"]
    assert ids(f"{folder}/{{split}}*.parquet") == ["t0", "t1"]
    if place == "data":  # where the library tells the two apart as well
        assert [name.rsplit("/")[-1] for name in entry_of_library["train"]] == [
            "train-00000-of-00002.parquet",
            "train-00001-of-00002.parquet",
        ]


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (["train.parquet"], ["train.parquet"]),
        (["train_0.parquet", "train_1.parquet"], ["train_0.parquet", "train_1.parquet"]),
        (["train-part-1.parquet", "train2.parquet"], ["train-part-1.parquet", "train2.parquet"]),
        (["train-00000-of-00001-0a1b2c3d.parquet"], ["train-00000-of-00001-0a1b2c3d.parquet"]),
        (["training.parquet", "trainval.parquet", "train_extra.parquet"], []),
        (["train_extra-00000-of-00001.parquet"], []),
    ],
)
def test_names_of_shards(names, ours):
    assert files.files_of_split(names, "train") == ours


def test_names_that_could_mean_two_splits_are_refused(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("t")]])
    shard = tmp_path / "train-00000-of-00001.parquet"
    shutil.copy(shard, tmp_path / "train_extra.parquet")
    with pytest.raises(UserError, match=r"beside 'train-.*' there is 'train_extra.parquet', and"):
        ids(tmp_path)
    with pytest.raises(UserError, match=r"beside 'train-.*' there is 'train_extra.parquet', and"):
        ids(f"{tmp_path}/{{split}}*.parquet")
    assert ids({"train": [str(shard)]}) == ["t"]


def shards_at(root, row, *names):
    """One row in each, whose id is the name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row(name)]), root / name)
    return root


@pytest.mark.parametrize(
    ("pattern", "ours", "other"),
    [
        ("{split}*/*.parquet", "train/a.parquet", "train_extra/a.parquet"),
        ("{split}*/**/*.parquet", "train/a.parquet", "train_extra/b/a.parquet"),
        ("cam_{split}*.parquet", "cam_train-0.parquet", "cam_train_extra.parquet"),
        ("*{split}*.parquet", "cam_train.parquet", "cam_train_extra.parquet"),
        ("*{split}*.parquet", "train.parquet", "extra_train.parquet"),
        ("*/{split}*/*.parquet", "cam/train/a.parquet", "cam/train.old/a.parquet"),
    ],
)
def test_the_rule_for_splits_holds_wherever_the_pattern_has_the_split(
    tmp_path, row, pattern, ours, other
):
    shards_at(tmp_path, row, ours)
    assert ids(tmp_path / pattern) == [ours]
    shards_at(tmp_path, row, other)
    ours, other = (name.removeprefix("cam/") for name in (ours, other))
    with pytest.raises(UserError, match=f"beside '{ours}' there is '{other}', and the name does"):
        ids(tmp_path / pattern)


@pytest.mark.parametrize(
    ("pattern", "ours", "others"),
    [
        ("{split}*/*.parquet", ["train-0/a.parquet", "train-1/a.parquet"], ["trainval/a.parquet"]),
        ("{split}/*.parquet", ["train/a.parquet", "train/b.parquet"], ["train_extra/a.parquet"]),
        ("*{split}*.parquet", ["a_train.parquet", "b_train.parquet"], ["pretrain.parquet"]),
        ("{split}_*.parquet", ["train_aachen.parquet", "train_bremen.parquet"], []),
        (
            "cam_{split}*.parquet",
            ["cam_train-00000-of-00001.parquet"],
            ["cam_train_extra-00000-of-00001.parquet"],
        ),
    ],
)
def test_patterns_that_mean_one_thing(tmp_path, row, pattern, ours, others):
    shards_at(tmp_path, row, *ours, *others)
    assert ids(tmp_path / pattern) == ours


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["train.parquet", "train-00000-of-00001.parquet"], "are either two copies of the split"),
        (["train.parquet", "train_0.parquet"], "are either two copies of the split 'train' or"),
        (["train_0.parquet", "train-00000-of-00001.parquet"], "are either two copies of the spl"),
        (["train_256.parquet", "train_512.parquet"], "no number lies between those of 'train_256"),
        (["train_00001.parquet", "train_00003.parquet"], "so either parts are missing or these a"),
        (["train-1-of-2.parquet"], "1 of the 2 shards of '.*/train' are missing, the first is -0-"),
        (["train.parquet", "data/train.parquet"], "the split 'train' is in '.*' and in '.*/data/t"),
    ],
)
def test_folders_of_two_readings_are_refused(tmp_path, row, names, sentence):
    folder = shards_at(tmp_path / "set", row, *names)
    with pytest.raises(UserError, match=sentence):
        ids(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["train_00001.parquet", "train_00002.parquet"],
        ["train-2019.parquet", "train-2020.parquet"],
        ["train-1-of-2.parquet", "train-2-of-2.parquet"],
        [f"train{number}.parquet" for number in range(12)],
    ],
)
def test_parts_of_ordinary_names_are_read(tmp_path, row, names):
    folder = shards_at(tmp_path / "set", row, *names)
    assert sorted(ids(folder)) == sorted(names)


def test_shards_beside_pairs_of_files_are_refused_unless_they_name_them(pairs, row):
    folder = pairs({"a.png": 1})
    shards_at(folder, row, "train.parquet")
    with pytest.raises(UserError, match=r"is in '.*/train.parquet' and in '.*/images/train', and"):
        ids(folder)
    cells = {
        "image": {"bytes": None, "path": "images/train/a.png"},
        "label": {"bytes": None, "path": "labels/train/a.png"},
        "id": "a",
    }
    (folder / "train.parquet").unlink()
    pq.write_table(pa.Table.from_pylist([cells]), folder / "train-0.parquet")
    assert ids(folder) == ["a"]


@pytest.mark.parametrize("name", ["val-00000-of-00001.parquet", "data/val.parquet"])
def test_a_split_of_another_usual_name_is_named(tmp_path, row, name):
    folder = shards_at(tmp_path / "set", row, "train-00000-of-00001.parquet", name)
    sentence = (
        f"holds no split 'validation', but there is '{name.rpartition('/')[2]}'; if that is the "
        "validation split, write `splits: {validation: val}` in"
    )
    with pytest.raises(UserError, match=sentence):
        ids(folder, "validation")


def test_a_folder_of_images_whose_split_has_another_usual_name(pairs):
    folder = pairs({"a.png": 1})
    for kind in ("images", "labels"):
        (folder / kind / "train").rename(folder / kind / "training")
    with pytest.raises(UserError, match=r"there is 'images/training'; .*{train: training}"):
        ids(folder)


def test_splits_that_the_library_would_join_are_refused(tmp_path, row):
    features = {
        "image": datasets.Image(),
        "label": datasets.Image(),
        "id": datasets.Value("string"),
    }
    one = datasets.Dataset.from_list([row("a")], features=datasets.Features(features))
    splits = {"train": one, "train_extra": one, "validation": one}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert len(datasets.load_dataset(str(tmp_path / "set"), split="train")) == 2
    with pytest.raises(UserError, match=r"'train_extra/data-.*' would be read as split 'train' as"):
        ids(tmp_path / "set")
    assert ids(tmp_path / "set", "validation") == ["a"]


def test_a_missing_shard(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")], [row("b")], [row("c")]])
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    for path in (tmp_path, f"{tmp_path}/{{split}}-*.parquet"):
        with pytest.raises(UserError, match=r"1 of the 3 shards of .*first is -00001-of-00003; f"):
            ids(path)
    chosen = {"train": [str(tmp_path / "train-00000-of-00003.parquet")]}
    assert ids(chosen) == ["a"]  # whoever lists files means these
    write_shards(tmp_path, "train", [[row("a")]])
    with pytest.raises(UserError, match=r"has shards of 1 and of 3, so they are of two versions"):
        ids(tmp_path)


# Images and labels that are left out


def test_every_suffix_is_one_that_pillow_reads():
    readable = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert set(PICTURES) - {".avif"} <= readable


def test_images_of_other_suffixes_are_read(pairs):
    names = ["a.jfif", "b.jpe", "c.ppm", "d.JP2", "e.jpg"]
    assert ids(pairs(dict.fromkeys(names, 1))) == ["a", "b", "c", "d", "e"]


def examined(folder):
    found = Examination()
    data = StreamingSegmentationData(path=str(folder), num_workers=0)
    examine_split(found, segformer_b0(num_classes=data.entry.labels.num_classes), data, "train")
    return [(f.level, f.message) for f in found.findings if f.check in ("files", "open")]


def test_labels_without_an_image_are_counted_and_named_once(pairs):
    folder = pairs({"a.png": 1, "b.heic": 1}, labels=["c.png"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert ids(folder) == ["a"]
    alone, unread = (str(warning.message) for warning in caught)
    assert "2 of 3 labels in " in alone
    assert "the first is 'b.png' (there is 'b.heic', which is not read); add the pictures" in alone
    assert "1 files in " in unread
    assert "none of a picture: 'b.heic'; convert them" in unread
    assert examined(folder) == [("error", alone), ("warning", unread)]


def test_files_beside_an_image_and_hidden_ones_are_nothing_to_speak_of(pairs):
    folder = pairs({"a.png": 1})
    (folder / "images" / "train" / "a.json").write_text("{}")
    (folder / "images" / "train" / ".DS_Store").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(folder) == ["a"]


def test_files_that_file_managers_leave_are_passed_over(pairs, row):
    folder = pairs({"a.png": 1})
    for kind in ("images", "labels"):
        (folder / kind / "train" / "._a.png").write_bytes(b"Mac OS X")
        (folder / kind / "train" / ".cache").mkdir()
        (folder / kind / "train" / ".cache" / "b.png").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(folder) == ["a"]
    shards = shards_at(folder.parent / "shards", row, "train.parquet")
    (shards / "._train.parquet").write_bytes(b"Mac OS X")
    assert ids(shards) == ids(f"{shards}/*{{split}}*.parquet") == ["train.parquet"]


def test_composed_and_decomposed_names_are_one(pairs):
    composed, decomposed = "\u00e9.png", "e\u0301.png"
    folder = pairs({composed: None}, labels=[decomposed])
    assert ids(folder) == ["\u00e9"]
    (folder / "images" / "train" / decomposed).write_bytes(b"x")
    if len(list((folder / "images" / "train").iterdir())) == 2:  # the system tells them apart
        with pytest.raises(UserError, match="have one name, so it is not clear which"):
            ids(folder)


@pytest.mark.parametrize("near", ["p1_mask.png", "P1.PNG", "gt_p1.tif"])
def test_a_label_of_a_name_that_is_near_is_named(pairs, near):
    folder = pairs({"p1.jpg": None, "p2.png": 1}, labels=[near, "p10_mask.png"])
    with pytest.raises(UserError, match=f"is 'p1.jpg'; there is '{near}': name labels like"):
        ids(folder)


def test_two_images_of_one_name_are_refused(pairs):
    folder = pairs({"p.jpg": 1, "p.png": 1, "q.jpg": 1})
    sentence = r"the pictures '.*p.jpg', '.*p.png' have one name, so it is not clear which"
    with pytest.raises(UserError, match=sentence):
        ids(folder)


def test_a_label_of_another_suffix_is_named(pairs, row):
    folder = pairs({"a.png": 1, "b.png": None}, labels=["b.bmp"])
    with pytest.raises(UserError, match=r"1 of 2 pictures .* 'b.png'; there is 'b.bmp': convert"):
        ids(folder)


def test_folders_behind_links_are_read_and_circles_end(pairs, tmp_path):
    folder = pairs({"a.png": 1, "town/b.png": 1})
    for kind in ("images", "labels"):
        shutil.move(folder / kind / "train" / "town", tmp_path / kind)
        (folder / kind / "train" / "town").symlink_to(tmp_path / kind)
        (tmp_path / kind / "up").symlink_to(folder / kind / "train")
    assert ids(folder) == ["a", "town/b"]


def test_what_is_no_regular_file_is_named(pairs):
    folder = pairs({"a.png": 1, "b.png": 1})
    image = folder / "images" / "train" / "a.png"
    image.unlink()
    image.symlink_to("gone.png")
    with pytest.raises(UserError, match=r"a.png' is a link to 'gone.png', which is not there; re"):
        ids(folder)
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(UserError, match=r"a.png' is a folder, a pipe or a device; give a regular"):
        ids(folder)


# Shards


def write(file, columns):
    pq.write_table(pa.table(columns), file)


def test_the_columns_of_every_shard_are_looked_at(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")], [row("b")]])
    write(tmp_path / "train-00000-of-00002.parquet", {"image": [b"x"], "mask": [b"x"]})
    sentence = r"00000-of-00002.parquet' has no column 'label', which .*; it has: image, mask"
    with pytest.raises(UserError, match=sentence):
        ids(tmp_path)
    ((level, message),) = examined(tmp_path)
    assert level == "error"
    assert "has no column 'label'" in message


@pytest.mark.parametrize("cells", [[[[1, 2], [3, 4]]], [7], ["file.png"]])
def test_columns_that_hold_no_encoded_images(tmp_path, cells):
    write(tmp_path / "train.parquet", {"image": [b"x"], "label": cells, "id": ["a"]})
    with pytest.raises(UserError, match=r"column 'label' of .* holds .*; .*|needs encoded images"):
        ids(tmp_path)


@pytest.mark.parametrize("place", ["absolute", "relative", "outside", "device", "pipe", "gone"])
def test_cells_name_files_below_the_folder_only(tmp_path, row, place, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "inside.png").write_bytes(row("a")["image"]["bytes"])
    (tmp_path / "secret.png").write_bytes(row("a")["image"]["bytes"])
    os.mkfifo(folder / "pipe.png")
    path = {
        "absolute": str(folder / "inside.png"),
        "relative": "inside.png",
        "outside": f"{folder}/../secret.png",
        "device": "/dev/zero",
        "pipe": "pipe.png",
        "gone": "gone.png",
    }[place]
    cells = row("a") | {"image": {"bytes": None, "path": path}}
    pq.write_table(pa.Table.from_pylist([cells]), folder / "train.parquet")
    if place in ("absolute", "relative"):
        assert ids(folder) == ["a"]
        monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
        with pytest.raises(UserError, match=r"sample 'a', column 'image': .* bytes, but an image"):
            ids(folder)
        return
    sentence = {
        "outside": r"the row names the file '.*/set/../secret.png', which is not in '.*/set'; sto",
        "device": r"the row names the file '/dev/zero', which is not in",
        "pipe": r"pipe.png' is a folder, a pipe or a device",
        "gone": r"there is no file '.*gone.png'",
    }[place]
    with pytest.raises(UserError, match=f"sample 'a', column 'image': .*{sentence}"):
        ids(folder)


def test_an_archive_of_images_is_read(tmp_path, row):
    # its cells name members of the archive in place of bytes
    entry = find_dataset("shapes")
    folder = tmp_path / "set"
    members = tmp_path / "members"
    members.mkdir()
    lines = ["file_name,label_file_name,id"]
    for name in ("a", "b"):
        for kind in ("image", "label"):
            (members / f"{kind}-{name}.png").write_bytes(row(name)[kind]["bytes"])
        lines.append(f"image-{name}.png,label-{name}.png,{name}")
    (members / "metadata.csv").write_text("\n".join(lines))
    shutil.make_archive(str(folder / "train"), "zip", members)
    source = open_split(entry, str(folder), "train")
    samples = Samples(entry, source, StoredOrder(source.group_rows), to_tensors)
    assert sorted(samples[position]["id"] for position in range(2)) == ["a", "b"]
    with pytest.raises(UserError, match=r"the file '/etc/hostname', which is not one of the data"):
        source.read_file("/etc/hostname")


def zero_rows(shard):
    """Zeros in place of the rows of a shard, whose footer stays."""
    content = shard.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    shard.write_bytes(bytes(len(content) - footer) + content[-footer:])


def test_the_rows_of_a_zeroed_shard_are_skipped_and_counted(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a"), row("b")], [row("c"), row("d")]])
    zero_rows(tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(UserError, match=r"00001-of-00002.parquet' is not a complete Parquet file"):
        ids(tmp_path)
    evaluated = samples_of(tmp_path, on_bad_sample="skip")
    batch = collate([evaluated[position] for position in range(4)])
    assert batch["id"] == ["a", "b"]
    assert list(batch["skipped"]) == ["train-00001-of-00002:0", "train-00001-of-00002:1"]
    source = evaluated.source
    order = EpochShuffle(source.group_rows, source.group_bytes, seed=0)
    trained = Samples(ENTRY, source, order, to_tensors, "skip")
    epoch = [trained[position] for position in range(4)]
    assert {sample["id"] for sample in epoch} <= {"a", "b"}
    assert {name for sample in epoch for name in sample["skipped"]} == {
        "train-00001-of-00002:0",
        "train-00001-of-00002:1",
    }


def test_what_is_not_damage_is_not_skipped(tmp_path, row, write_shards):
    # such as a disk that is gone: all rows would be skipped, one by one
    write_shards(tmp_path, "train", [[row("a")]])
    samples = samples_of(tmp_path, on_bad_sample="skip")
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"data.path: there is no file '.*train-00000-of-00001"):
        samples[0]


def test_shards_that_are_no_regular_files(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")]])
    shard = tmp_path / "train-00000-of-00001.parquet"
    shard.unlink()
    shard.symlink_to("gone.parquet")
    with pytest.raises(UserError, match=r"0001.parquet' is a link to 'gone.parquet', which is not"):
        ids(tmp_path)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=r"00001.parquet' is a folder, a pipe or a device; give"):
        ids(tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 5000 + "/{split}.parquet", "y" * 300])
def test_a_path_that_is_too_long(path):
    with pytest.raises(UserError, match=r"File name too long\)") as raised:
        open_split(ENTRY, path, "train")
    assert len(str(raised.value)) < 500


def test_a_folder_with_an_at_sign(tmp_path, row):
    (tmp_path / "set@home" / "train").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set@home" / "train" / "a.png")
    with pytest.raises(UserError, match=r"have no column 'label'"):
        open_split(ENTRY, str(tmp_path / "set@home"), "train")


# Fingerprints


def test_fingerprints_see_what_row_counts_do_not(tmp_path, row, write_shards, pairs):
    one = write_shards(tmp_path / "one", "train", [[row("a", label_value=1)]])
    other = write_shards(tmp_path / "other", "train", [[row("a", label_value=2)]])
    prints = [open_split(ENTRY, str(folder), "train").fingerprint for folder in (one, other)]
    assert prints[0].partition("-")[0] == prints[1].partition("-")[0]
    assert prints[0] != prints[1]
