"""Opening the source of a split: Parquet, image folders, streams; and its errors."""

import dataclasses

import datasets
import pytest

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import open_split
from segformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


def test_a_folder_a_pattern_and_a_list_open_the_same_shards(tmp_path, row, write_shards, ids):
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data", "test", [[row("a")], [row("b")]])
    files = sorted(str(file) for file in (tmp_path / "data").iterdir())
    for path in (str(tmp_path), f"{tmp_path}/data/{{split}}-*.parquet", {"test": files}):
        assert ids(open_split(ENTRY, path, "test")) == ["a", "b"]


def test_the_entry_names_the_stored_split(tmp_path, row, write_shards, ids):
    write_shards(tmp_path, "val", [[row("a")]])
    entry = dataclasses.replace(ENTRY, splits={"validation": "val"})
    assert ids(open_split(entry, str(tmp_path), "validation")) == ["a"]


def test_shards_without_rows_are_an_error(tmp_path, write_shards):
    write_shards(tmp_path, "train", [[]])
    with pytest.raises(UserError, match=r"the train shards of '.*' have no rows"):
        open_split(ENTRY, str(tmp_path), "train")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", r"there is no folder 'nowhere'; give the folder"),
        ("/no/where/at/all", r"there is no folder '/no/where/at/all'"),
        ("nobody/nothing", r"'nobody/nothing' cannot be opened as a data set \(.*\); check the"),
        ({"validation": []}, r"no files for split 'train', only for validation; add them"),
        ({"train": ["missing.parquet"]}, r"there is no file 'missing.parquet'; correct the path"),
        ("missing/{split}-*.parquet", r"no file matches 'missing/train-\*.parquet'"),
        (None, r"not given, and data set 'shapes' has no hub location; give --data.path"),
    ],
)
def test_missing_locations(path, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        open_split(ENTRY, path, "train")


def test_a_folder_with_other_splits_only(tmp_path, row, write_shards):
    write_shards(tmp_path, "train", [[row("a")]])
    with pytest.raises(
        UserError,
        match=r"no validation\*.parquet or images/validation/ in .* \(there is 'train-.*'\); give",
    ):
        open_split(ENTRY, str(tmp_path), "validation")
