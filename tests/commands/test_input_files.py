"""Which files a path or a pattern names, and the names of their outputs."""

import os
from pathlib import Path

import pytest

from segformer_pl.commands.input_files import find_files
from segformer_pl.data.image_suffixes import IMAGE_SUFFIXES
from segformer_pl.video_file import VIDEO_SUFFIXES


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Function that creates empty files of these names below the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    return make


def output_names(pattern, outputs=(), suffixes=IMAGE_SUFFIXES):
    """Input file -> name of its outputs, as strings."""
    outputs = [Path(folder) for folder in outputs]
    found = find_files(pattern, "--input", suffixes, outputs)
    return {str(file): str(name) for file, name in found.items()}


def test_a_folder_is_searched_recursively(tree):
    tree("in/b.JPG", "in/a.png", "in/sub/deep/c.tiff", "in/notes.txt", "in/._b.jpg", "in/d.jpg/x")
    expected = {"in/a.png": "a", "in/b.JPG": "b", "in/sub/deep/c.tiff": "sub/deep/c"}
    assert output_names("in") == output_names("in/") == output_names("./in") == expected
    assert list(output_names("in")) == sorted(expected)
    assert output_names(os.path.abspath("in")).keys() == {
        os.path.abspath(file) for file in expected
    }
    assert list(output_names(os.path.abspath("in")).values()) == list(expected.values())


def test_patterns(tree):
    tree("in/1/a.jpg", "in/2/a.jpg", "in/2/b.gif", "in/2/x/a.jpg", "other/a.jpg")
    assert output_names("in/*/a.jpg") == {"in/1/a.jpg": "1/a", "in/2/a.jpg": "2/a"}
    assert set(output_names("in/**/a.jpg")) == {"in/1/a.jpg", "in/2/a.jpg", "in/2/x/a.jpg"}
    assert output_names("in/2/*") == {
        "in/2/a.jpg": "a",
        "in/2/b.gif": "b",
    }  # any suffix, as the pattern says
    assert output_names("in/[2]/?.gif") == {"in/2/b.gif": "2/b"}
    assert output_names("./in/../other/*.jpg") == {"other/a.jpg": "a"}
    with pytest.raises(ValueError, match=r"^--input: 'other/a.jpg' is not below 'in', where the"):
        find_files("in/*/../../other/a.jpg", "--input")


def test_a_file_whose_name_looks_like_a_pattern(tree):
    tree("in/a[1].jpg", "in/a1.jpg", "[x]/b.jpg")
    assert output_names("in/a[1].jpg") == {"in/a[1].jpg": "a[1]"}
    assert output_names("[x]") == {"[x]/b.jpg": "b"}


def test_no_two_images_share_an_output_name(tree):
    tree("in/a.jpg", "in/a.png", "in/b.png", "in/sub/a.png")
    assert output_names("in") == {
        "in/a.jpg": "a.jpg",
        "in/a.png": "a.png",
        "in/b.png": "b",
        "in/sub/a.png": "sub/a",
    }
    tree("in/a.jpg.png", "in/b.png.png")
    names = output_names("in").values()
    assert len(set(names)) == len(names) == 6
    tree("in/c")
    assert output_names("in/c*") == {"in/c": "c"}


def test_earlier_outputs_are_no_input(tree):
    tree("in/a.jpg", "in/masks/a.png", "in/overlays/a.png", "in/more/masks/b.png")
    outputs = ["in/masks", "./in/overlays"]
    assert set(output_names("in", outputs)) == {"in/a.jpg", "in/more/masks/b.png"}
    assert set(output_names("in/**/*", outputs)) == {"in/a.jpg", "in/more/masks/b.png"}
    Path("link").symlink_to("in")
    assert set(output_names("link", outputs)) == {"link/a.jpg", "link/more/masks/b.png"}


def test_videos_are_found_where_they_are_asked_for(tree):
    tree("in/a.mp4", "in/b.MOV", "in/c.png", "in/text.ts")
    assert set(output_names("in")) == {"in/c.png"}
    both = output_names("in", suffixes=(*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    assert both == {"in/a.mp4": "a", "in/b.MOV": "b", "in/c.png": "c"}


def test_the_folder_of_a_video_is_not_that_of_images(tree):
    """For a video called a, masks are written as a/000000.png."""
    tree("in/a.mp4", "in/a/000000.png", "in/b.png", "in/b/1.png", "in/c.mp4", "in/c.avi")
    names = output_names("in", suffixes=(*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    assert names["in/a.mp4"] == "a.mp4"
    assert names["in/a/000000.png"] == "a/000000"
    assert (names["in/b.png"], names["in/b/1.png"]) == ("b", "b/1")
    assert (names["in/c.mp4"], names["in/c.avi"]) == ("c.mp4", "c.avi")
