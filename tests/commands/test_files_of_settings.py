"""Files of settings that no command can read: one sentence that names the file and the line."""

from pathlib import Path

import pytest

from segformer_pl.ablation.study import read_study
from segformer_pl.cli.run_parser import RunArgumentParser
from segformer_pl.cli.training import resolve
from segformer_pl.errors import UserError

BASE = Path(__file__).parents[2] / "experiments" / "camvid_b0.yaml"
BINARY, SYNTAX, LIST = b"\x89PNG\r\n", b"model:\n  lr: 1\n   oops: [", b"- 1\n"
SENTENCES = {
    BINARY: "line 1: not UTF-8 text (byte 0x89); give a YAML file that holds ",
    SYNTAX: "line 3: invalid YAML (mapping values are not allowed in this context); correct it",
    LIST: "line 1: a list, where keys with values are expected; give a YAML file that holds ",
}
COMMANDS = {
    "fit": ("fit", "--config={}"),
    "validate": ("validate", "--config", "{}"),
    "second": ("validate", f"--config={BASE}", "--config={}"),
    "doctor": ("doctor", "--config={}"),
    "section": ("fit", f"--config={BASE}", "--model", "{}"),
    "argument": ("fit", f"--config={BASE}", "--model.inference={}"),
    "network": ("fit", f"--config={BASE}", "--model.network", "{}"),
    "data": ("fit", f"--config={BASE}", "--data.dataset={}"),
    "predict": ("predict", "--ckpt=a", "--input=b", "--output=c", "--inference", "{}"),
    "recipe": ("recipe", "diff", str(BASE), "{}"),
    "ablate": ("ablate", "{}", "--budget=small"),
    "arena": ("arena", "{}", "--budget=small"),
    "test_time": ("test_time", "--ckpt=a", "--output=c", "--settings={}"),
}


@pytest.mark.parametrize("content", SENTENCES, ids=("binary", "syntax", "list"))
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_file_and_line(command, content, fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_bytes(content)
    message = fail(*(part.format("wrong.yaml") for part in COMMANDS[command]))
    assert message.startswith("error: 'wrong.yaml', " + SENTENCES[content])
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["validate", "section", "predict"])
def test_binary_files_with_another_suffix(command, fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("last.ckpt").write_bytes(b"a: 1\n\xff")
    Path("a").write_bytes(b"\xff")  # another file that is no text, which is not to blame
    message = fail(*(part.format("last.ckpt") for part in COMMANDS[command]))
    assert message.startswith("error: 'last.ckpt', line 2: not UTF-8 text (byte 0xff)")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainer: 3\n", "line 1: trainer is a number; give its settings as keys with values"),
        ("seed_everything: 1\ndata:\n- 1\n", "line 2: data is a list; "),
        ("model:\n", "line 1: model is empty; "),
        ("last_checkpoint: true\n", "line 1: last_checkpoint is true or false; "),
    ],
)
def test_sections_of_another_type(text, sentence, fail, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert f"error: '{file}', {sentence}" in fail("fit", f"--config={BASE}", f"--config={file}")
    with pytest.raises(UserError, match=f"^'{file}', line "):
        resolve([str(BASE), str(file)])


def test_a_file_cannot_name_further_files(fail, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(f"config: {BASE}\n")
    assert "give several files as several --config" in fail("fit", f"--config={file}")


def test_a_study_names_its_base(tmp_path):
    (tmp_path / "base.yaml").write_bytes(SYNTAX)
    study = "question: a?\nbase: base.yaml\nseeds: [0]\nvariants: {a: {}}\nbudgets: {small: {}}\n"
    (tmp_path / "study.yaml").write_text(study)
    with pytest.raises(UserError, match=r"base\.yaml', line 3: invalid YAML \(mapping"):
        read_study(tmp_path / "study.yaml", "small", resolve)


def test_other_values_are_not_taken_for_files_of_settings(tmp_path):
    """A list of callbacks may be in a file, and an output may have the name of a YAML file."""
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "weights.bin").write_bytes(BINARY)
    parser = RunArgumentParser()
    for option in ("--trainer.callbacks", "--weights", "--text"):
        parser.add_argument(option)
    arguments = [
        "--trainer.callbacks",
        f"{tmp_path}/list.yaml",
        f"--weights={tmp_path}/weights.bin",
    ]
    parsed = parser.parse_args([*arguments, f"--text={'x' * 5000}\0"])
    assert parsed.weights == f"{tmp_path}/weights.bin"
