"""File names: which files belong to a split, and which combinations are ambiguous."""

import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from segformer_pl.data import files
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import open_split
from segformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_shards_of_a_split_whose_name_has_the_same_prefix_are_left_out(
    tmp_path, row, write_shards, subfolder, ids_of
):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    write_shards(folder, "train", [[row("t0")], [row("t1")]])
    write_shards(folder, "train_extra", [[row("e0")]])
    write_shards(folder, "val", [[row("v0")]])
    write_shards(folder, "validation_hard", [[row("h0")]])
    data_files = datasets.load_dataset_builder(str(tmp_path)).config.data_files
    assert ids_of(tmp_path) == ["t0", "t1"]
    assert ids_of(f"{folder}/{{split}}*.parquet") == ["t0", "t1"]
    if subfolder == "data":  # where datasets distinguishes the two as well
        assert [name.rsplit("/")[-1] for name in data_files["train"]] == [
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
def test_files_of_split(names, ours):
    assert files.files_of_split(names, "train") == ours


def test_ambiguous_names_are_an_error(tmp_path, row, write_shards, ids_of):
    write_shards(tmp_path, "train", [[row("t")]])
    shard = tmp_path / "train-00000-of-00001.parquet"
    shutil.copy(shard, tmp_path / "train_extra.parquet")
    with pytest.raises(UserError, match=r"beside 'train-.*' there is 'train_extra.parquet', and"):
        ids_of(tmp_path)
    with pytest.raises(UserError, match=r"beside 'train-.*' there is 'train_extra.parquet', and"):
        ids_of(f"{tmp_path}/{{split}}*.parquet")
    assert ids_of({"train": [str(shard)]}) == ["t"]


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
def test_ambiguous_matches_of_a_pattern_are_an_error(
    tmp_path, pattern, ours, other, ids_of, write_named_shards
):
    write_named_shards(tmp_path, ours)
    assert ids_of(tmp_path / pattern) == [ours]
    write_named_shards(tmp_path, other)
    ours, other = (name.removeprefix("cam/") for name in (ours, other))
    with pytest.raises(UserError, match=f"beside '{ours}' there is '{other}', and the name does"):
        ids_of(tmp_path / pattern)


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
def test_unambiguous_patterns(tmp_path, pattern, ours, others, ids_of, write_named_shards):
    write_named_shards(tmp_path, *ours, *others)
    assert ids_of(tmp_path / pattern) == ours


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.parquet", "train-00000-of-00001.parquet"], "are either two copies of the split"),
        (["train.parquet", "train_0.parquet"], "are either two copies of the split 'train' or"),
        (["train_0.parquet", "train-00000-of-00001.parquet"], "are either two copies of the spl"),
        (["train_256.parquet", "train_512.parquet"], "no part lies between 'train_256"),
        (["train_00001.parquet", "train_00003.parquet"], "so either parts are missing or these f"),
        (["train-1-of-2.parquet"], "1 of the 2 shards of '.*/train' are missing, the first is -0-"),
        (["train.parquet", "data/train.parquet"], "the split 'train' is in '.*' and in '.*/data/t"),
    ],
)
def test_duplicate_or_missing_parts_are_an_error(
    tmp_path, names, message, ids_of, write_named_shards
):
    folder = write_named_shards(tmp_path / "set", *names)
    with pytest.raises(UserError, match=message):
        ids_of(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["train_00001.parquet", "train_00002.parquet"],
        ["train-2019.parquet", "train-2020.parquet"],
        ["train-1-of-2.parquet", "train-2-of-2.parquet"],
        [f"train{number}.parquet" for number in range(12)],
    ],
)
def test_common_names_of_parts_are_read(tmp_path, names, ids_of, write_named_shards):
    folder = write_named_shards(tmp_path / "set", *names)
    assert sorted(ids_of(folder)) == sorted(names)


def test_shards_next_to_image_files_are_an_error_unless_they_name_them(
    make_image_folder, ids_of, write_named_shards
):
    folder = make_image_folder({"a.png": 1})
    write_named_shards(folder, "train.parquet")
    with pytest.raises(UserError, match=r"is in '.*/train.parquet' and in '.*/images/train', and"):
        ids_of(folder)
    cells = {
        "image": {"bytes": None, "path": "images/train/a.png"},
        "label": {"bytes": None, "path": "labels/train/a.png"},
        "id": "a",
    }
    (folder / "train.parquet").unlink()
    pq.write_table(pa.Table.from_pylist([cells]), folder / "train-0.parquet")
    assert ids_of(folder) == ["a"]


@pytest.mark.parametrize("name", ["val-00000-of-00001.parquet", "data/val.parquet"])
def test_a_split_under_another_usual_name_is_read(tmp_path, name, ids_of, write_named_shards):
    folder = write_named_shards(tmp_path / "set", "train-00000-of-00001.parquet", name)
    assert ids_of(folder, "validation") == [name]


@pytest.mark.parametrize("others", [["val", "dev"], ["eval"]])
def test_a_split_whose_name_is_ambiguous_is_suggested(tmp_path, others, ids_of, write_named_shards):
    folder = write_named_shards(tmp_path / "set", *(f"{name}.parquet" for name in others))
    split = "test" if others == ["eval"] else "validation"
    message = (
        rf"no split '{split}' in '.*', but there is '\w+.parquet'; if that is the {split} split, "
        rf"write `splits: {{{split}: \w+}}` in"
    )
    with pytest.raises(UserError, match=message):
        ids_of(folder, split)


def test_an_image_folder_with_another_usual_split_name_is_read(make_image_folder, ids_of):
    folder = make_image_folder({"a.png": 1})
    for kind in ("images", "labels"):
        (folder / kind / "train").rename(folder / kind / "training")
    assert ids_of(folder) == ["a"]
    # The exact name comes first.
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir()
        (folder / kind / "training" / "a.png").rename(folder / kind / "train" / "b.png")
    assert ids_of(folder) == ["b"]


def test_splits_that_datasets_would_merge_are_an_error(tmp_path, row, ids_of):
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
        ids_of(tmp_path / "set")
    assert ids_of(tmp_path / "set", "validation") == ["a"]


def test_a_missing_shard_is_an_error(tmp_path, row, write_shards, ids_of):
    write_shards(tmp_path, "train", [[row("a")], [row("b")], [row("c")]])
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    for path in (tmp_path, f"{tmp_path}/{{split}}-*.parquet"):
        with pytest.raises(UserError, match=r"1 of the 3 shards of .*first is -00001-of-00003; f"):
            ids_of(path)
    chosen = {"train": [str(tmp_path / "train-00000-of-00003.parquet")]}
    assert ids_of(chosen) == ["a"]  # listed files are read as they are
    write_shards(tmp_path, "train", [[row("a")]])
    with pytest.raises(UserError, match=r"has shards of 1 and of 3, so they are of two versions"):
        ids_of(tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 5000 + "/{split}.parquet", "y" * 300])
def test_a_path_that_is_too_long_is_an_error(path):
    with pytest.raises(UserError, match=r"File name too long\)") as raised:
        open_split(ENTRY, path, "train")
    assert len(str(raised.value)) < 500


def test_a_folder_name_may_contain_an_at_sign(tmp_path):
    (tmp_path / "set@home" / "train").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set@home" / "train" / "a.png")
    with pytest.raises(UserError, match=r"have no column 'label'"):
        open_split(ENTRY, str(tmp_path / "set@home"), "train")
