"""Image folders: pairs of image and label files, and the files that are left out."""

import os
import shutil
import warnings

import pytest
from PIL import Image

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.image_folder import IMAGE_SUFFIXES
from segformer_pl.data.sources import ImageFolder, open_split
from segformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("empty_cache")

ENTRY = find_dataset("shapes")


def test_a_name_ends_at_its_last_dot(make_image_folder, samples_of):
    names = ["clip.001.png", "clip.002.png", "clip.png", "road_jpg.rf.9f3a.jpg", "a.b/c.d.jpg"]
    folder = make_image_folder({name: value for value, name in enumerate(names)})
    samples = samples_of(folder)
    labels = {samples[i]["id"]: int(samples[i]["label"][0, 0]) for i in range(5)}
    assert labels == {"clip.001": 0, "clip.002": 1, "clip": 2, "road_jpg.rf.9f3a": 3, "a.b/c.d": 4}


def test_pillow_reads_every_image_suffix():
    readable = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert set(IMAGE_SUFFIXES) - {".avif"} <= readable


def test_rare_image_suffixes_are_read(make_image_folder, ids_of):
    names = ["a.jfif", "b.jpe", "c.ppm", "d.JP2", "e.jpg"]
    assert ids_of(make_image_folder(dict.fromkeys(names, 1))) == ["a", "b", "c", "d", "e"]


def test_labels_without_an_image_are_reported_once(make_image_folder, ids_of, findings_of):
    folder = make_image_folder({"a.png": 1, "b.heic": 1}, labels=["c.png"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert ids_of(folder) == ["a"]
    unused, unread = (str(warning.message) for warning in caught)
    assert "2 of 3 labels in " in unused
    assert "the first is 'b.png' (there is 'b.heic', which is not read); add the images" in unused
    assert "1 files in " in unread
    assert "they have no image suffix: 'b.heic'; convert them" in unread
    assert findings_of(folder) == [("error", unused), ("warning", unread)]


def test_hidden_files_and_files_of_an_image_give_no_warning(make_image_folder, ids_of):
    folder = make_image_folder({"a.png": 1})
    (folder / "images" / "train" / "a.json").write_text("{}")
    (folder / "images" / "train" / ".DS_Store").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids_of(folder) == ["a"]


def test_hidden_files_are_left_out(make_image_folder, ids_of, write_named_shards):
    folder = make_image_folder({"a.png": 1})
    for kind in ("images", "labels"):
        (folder / kind / "train" / "._a.png").write_bytes(b"Mac OS X")
        (folder / kind / "train" / ".cache").mkdir()
        (folder / kind / "train" / ".cache" / "b.png").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids_of(folder) == ["a"]
    shards = write_named_shards(folder.parent / "shards", "train.parquet")
    (shards / "._train.parquet").write_bytes(b"Mac OS X")
    assert ids_of(shards) == ids_of(f"{shards}/*{{split}}*.parquet") == ["train.parquet"]


def test_composed_and_decomposed_names_are_equal(make_image_folder, ids_of):
    composed, decomposed = "\u00e9.png", "e\u0301.png"
    folder = make_image_folder({composed: None}, labels=[decomposed])
    assert ids_of(folder) == ["\u00e9"]
    (folder / "images" / "train" / decomposed).write_bytes(b"x")
    # Some file systems distinguish the two names.
    if len(list((folder / "images" / "train").iterdir())) == 2:
        with pytest.raises(UserError, match="have the same name, so it is not clear which"):
            ids_of(folder)


@pytest.mark.parametrize("similar", ["p1_mask.png", "P1.PNG", "gt_p1.tif"])
def test_a_label_of_a_similar_name_is_suggested(make_image_folder, similar, ids_of):
    folder = make_image_folder({"p1.jpg": None, "p2.png": 1}, labels=[similar, "p10_mask.png"])
    with pytest.raises(UserError, match=f"is 'p1.jpg'; there is '{similar}': name labels like"):
        ids_of(folder)


def test_a_missing_folder_of_labels_is_named(make_image_folder, ids_of):
    folder = make_image_folder({"a.png": None, "b.png": None})
    labels = folder / "labels" / "train"
    labels.rmdir()
    with pytest.raises(UserError, match=f"there is no folder '{labels}'; put the labels there, "):
        ids_of(folder)
    labels.parent.rename(folder / "annotations")
    (folder / "masks" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=f"'{labels}'; if '{folder}/masks/train' holds the labels"):
        ids_of(folder)


def test_two_images_of_the_same_name_are_an_error(make_image_folder, ids_of):
    folder = make_image_folder({"p.jpg": 1, "p.png": 1, "q.jpg": 1})
    message = r"the images '.*p.jpg', '.*p.png' have the same name, so it is not clear which"
    with pytest.raises(UserError, match=message):
        ids_of(folder)


def test_a_label_of_another_suffix_is_suggested(make_image_folder, ids_of):
    folder = make_image_folder({"a.png": 1, "b.png": None}, labels=["b.bmp"])
    with pytest.raises(UserError, match=r"1 of 2 images .* 'b.png'; there is 'b.bmp': convert"):
        ids_of(folder)


def test_links_to_folders_are_followed_once(make_image_folder, tmp_path, ids_of):
    folder = make_image_folder({"a.png": 1, "town/b.png": 1})
    for kind in ("images", "labels"):
        shutil.move(folder / kind / "train" / "town", tmp_path / kind)
        (folder / kind / "train" / "town").symlink_to(tmp_path / kind)
        (tmp_path / kind / "up").symlink_to(folder / kind / "train")
    assert ids_of(folder) == ["a", "town/b"]


def test_images_that_are_no_regular_files_are_an_error(make_image_folder, ids_of):
    folder = make_image_folder({"a.png": 1, "b.png": 1})
    image = folder / "images" / "train" / "a.png"
    image.unlink()
    image.symlink_to("gone.png")
    with pytest.raises(UserError, match=r"a.png' is a link to 'gone.png', which does not exist; "):
        ids_of(folder)
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(UserError, match=r"a.png' is a folder, a pipe or a device; give a regular"):
        ids_of(folder)


@pytest.fixture
def image_folder(tmp_path, row):
    """A folder of image and label files, one pair of them in a sub-folder."""
    for name in ("b", "a", "town/c"):
        for kind, suffix in (("image", ".jpg"), ("label", ".png")):
            file = tmp_path / "set" / f"{kind}s" / "train" / f"{name}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row(name)[kind]["bytes"])
    return tmp_path / "set"


def test_an_image_folder(image_folder, ids):
    source = open_split(ENTRY, str(image_folder), "train")
    assert isinstance(source, ImageFolder)
    assert source.group_rows == [1, 1, 1]
    assert ids(source) == ["a", "b", "town/c"]
    assert source.name(2, 0) == "town/c"


def test_images_without_labels_are_counted_and_named(image_folder):
    (image_folder / "labels" / "train" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images in .* have no label .* is 'a.jpg'; add"):
        open_split(ENTRY, str(image_folder), "train")
    with pytest.raises(UserError, match=r"no images in '.*/images/validation'; give a folder"):
        open_split(ENTRY, str(image_folder), "validation")
