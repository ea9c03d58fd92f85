"""Fingerprints of data sets."""

import shutil

import pytest

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import open_split

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


def test_the_fingerprint_depends_on_the_data_and_not_on_the_location(tmp_path, row, write_shards):
    folder = write_shards(tmp_path / "set", "train", [[row("a"), row("b")]])
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = write_shards(tmp_path / "other", "train", [[row("a"), row("b"), row("c")]])
    fingerprints = [
        open_split(ENTRY, str(path), "train").fingerprint for path in (folder, copy, other)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
