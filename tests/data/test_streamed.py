"""Formats of the datasets library that are read as a stream."""

import pytest

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.sources import StreamedSource, open_split
from segformer_pl.data.streaming import Samples
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


def test_a_format_without_row_counts_is_read_through_once_with_a_message(
    tmp_path, row, caplog, monkeypatch, ids
):
    # The image folder format of datasets, whose rows are known from the stream alone.
    folder = tmp_path / "library"
    (folder / "train").mkdir(parents=True)
    lines = ["file_name,label_file_name,id"]
    for i in range(150):
        for kind in ("image", "label"):
            cell = row(f"r{i}", label_value=i % 3)[kind]
            (folder / "train" / f"{kind}{i}.png").write_bytes(cell["bytes"])
        lines.append(f"image{i}.png,label{i}.png,r{i}")
    (folder / "train" / "metadata.csv").write_text("\n".join(lines))
    with caplog.at_level("INFO"):
        source = open_split(ENTRY, str(folder), "train")
    assert isinstance(source, StreamedSource)
    assert "it is read through once to count them; convert it to Parquet" in caplog.text
    assert source.group_rows == [64, 64, 22]
    assert sorted(ids(source)) == sorted(f"r{i}" for i in range(150))
    # Reopened, as another process would: the index comes from the cache.
    monkeypatch.setattr(StreamedSource, "_read_through", None)
    reopened = open_split(ENTRY, str(folder), "train")
    assert reopened.fingerprint == source.fingerprint
    assert [row["id"] for row in reopened.read(1)] == [row["id"] for row in source.read(1)]


def test_a_table_of_file_names_is_refused_and_names_the_cell(tmp_path):
    """CSV has no schema in advance, which `datasets` refuses to leave undecoded."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("image,label,id\na.png,a_mask.png,7\n")
    source = open_split(ENTRY, str(tmp_path), "train")
    samples = Samples(ENTRY, source, StoredOrder(source.group_rows), to_tensors)
    with pytest.raises(UserError, match=r"sample '7', column 'image': the row holds 'a.png', of "):
        samples[0]
