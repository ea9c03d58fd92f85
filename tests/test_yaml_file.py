"""Files that are no YAML, or hold something else, are one sentence with file and line."""

import pytest

from segformer_pl.errors import UserError
from segformer_pl.yaml_file import check_sections, read_mapping, read_yaml

WRONG = {
    b"a: 1\nb: \x89PNG\n": r", line 2: not UTF-8 text \(byte 0x89\); give a YAML file that holds ",
    b"a: 1\n  b: 2\n": r", line 2: invalid YAML \(mapping values are not allowed .*\); correct it$",
    b"a: [1,\nb: {": r", line 2: invalid YAML \(.*\); correct it$",
    b"a: 1\nb: \x01\n": r", line 2: invalid YAML \(the character U\+0001 is not allowed\); correct",
    b"a: !!python/object:os.system {}": r", line 1: invalid YAML \(could not determine a constru",
    b"a: 1\n---\nb: 1\n": r", line 2: invalid YAML \(expected a single document .*\); correct it$",
    b"a: 2020-13-45\n": r": invalid YAML \(month must be in 1\.\.12\); correct it$",
    b"": r" is empty; give a YAML file that holds it$",
    b"# nothing\n": r" is empty; ",
    b"# a list\n\n- 1\n": r", line 3: a list, where keys with values are expected; give a YAML ",
    b"words\n": r", line 1: a text, where keys with values are expected; ",
    b"3\n": r", line 1: a number, where keys",
    b"2020-01-01": r", line 1: a date, where keys",
}


@pytest.mark.parametrize("content", WRONG, ids=repr)
def test_what_is_wrong_where(content, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=WRONG[content]) as error:
        read_mapping(file, "it")
    assert str(error.value).startswith(f"'{file}'")
    assert "\n" not in str(error.value)


def test_the_pure_python_loader_says_the_same(tmp_path, monkeypatch):
    """Not every platform has libyaml."""
    import yaml

    monkeypatch.setattr("segformer_pl.yaml_file.Loader", yaml.SafeLoader)
    file = tmp_path / "a.yaml"
    for content in (b"a: 1\n  b: 2\n", b"a: 1\nb: \x01\n", b"# a list\n\n- 1\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=WRONG[content]):
            read_mapping(file, "it")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"b' cannot be read \(No such file or directory\); give"):
        read_mapping(tmp_path / "b", "it")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give"):
        read_mapping(tmp_path, "it")


def test_correct_files(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("# first\na: {b: [1, é]}\n", encoding="utf-8")
    assert read_mapping(file, "it") == {"a": {"b": [1, "é"]}}
    file.write_text("# first\n- 1\n", encoding="utf-8")
    assert read_yaml(file, "it") == ([1], 2)


def test_sections(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: {}\nb: other.yaml\nc: 3\nd:\n- 1\ne:\n")
    content = read_mapping(file, "it")
    check_sections(file, content, {"a", "b", "missing"})
    for key, sentence in {"c": "line 3: c is a number", "d": "line 4: d is a list"}.items():
        with pytest.raises(UserError, match=f"^'{file}', {sentence}; give its settings as keys"):
            check_sections(file, content, {key})
    with pytest.raises(UserError, match=r"line 6: e is empty; "):
        check_sections(file, content, {"e"})
