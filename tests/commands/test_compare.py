"""compare as its user meets it: two run folders, a verdict, and what it does not say."""

import json

import numpy as np
import pytest

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.commands.compare import compare

NAMES = ["road", "traffic light", "wall"]


def plant(folder, right, num_pictures=40, step=1600, labelled=100, names=NAMES):
    """A run folder; ``right`` of the labelled pixels of each class, give or take a tenth."""
    shape = (num_pictures, len(names))
    labels = np.full(shape, labelled)
    jitter = np.random.default_rng(0).uniform(-0.1, 0.1, shape)
    intersection = (labels * (np.array(right) + jitter)).astype(np.int64)
    wrong = labels - intersection
    counts = np.stack([intersection, labels, intersection + np.roll(wrong, 1, axis=1)], axis=-1)
    evaluation = Evaluation(
        split="val",
        step=step,
        class_names=names,
        ids=[f"picture {n}" for n in range(num_pictures)],
        counts=counts,
        loss=np.full(num_pictures, 0.5),
        confusion=np.zeros((len(names), len(names)), np.int64),
        calibration=np.zeros((15, 3)),
    )
    evaluation.save(folder / "evaluation" / f"val_step_{step:07d}.npz")
    return folder


@pytest.fixture
def runs(tmp_path):
    a = plant(tmp_path / "base" / "version_0", [0.8, 0.4, 0.5])
    b = plant(tmp_path / "wide" / "version_0", [0.8, 0.6, 0.5], step=800)
    return a, b


@pytest.fixture
def run(capsys):
    """Function: run the command, return what it prints."""

    def call(*arguments):
        compare([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


def test_two_run_folders(run, runs):
    text = run(*runs)
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines[2:])
    assert lines[0] == f"A  {runs[0]}: val, step 1,600"
    assert lines[1] == f"B  {runs[1]}: val, step 800"
    assert lines[3].startswith("B is better: B - A = +")
    assert lines[5].endswith("95 % interval, 40 pictures")
    assert lines[6].startswith("A ")
    rows = [line for line in lines if line.startswith(tuple(NAMES))]
    assert rows[0].startswith("traffic light")
    assert " * " in rows[0]
    assert all(row.endswith(" 40") for row in rows)
    said = " ".join(text.split())
    assert "Not covered is the spread between training seeds" in said
    assert "give --block-size; otherwise intervals are too narrow" in said


def test_json_holds_fractions(run, runs):
    known = json.loads(run(*runs, "--json"))
    assert known["a"] == {"path": str(runs[0]), "split": "val", "step": 1600}
    assert known["b"]["step"] == 800
    assert 0 < known["difference"]["low"] < known["difference"]["value"] < 1
    assert known["verdict"].startswith("B is better")
    assert known["classes"][0]["name"] == "traffic light"
    assert known["num_blocks"] == known["num_pictures"] == 40


def test_files_and_blocks(run, runs):
    files = [next(folder.glob("evaluation/*.npz")) for folder in runs]
    text = run(*files, "--block-size", 4)
    assert "40 pictures in 10 blocks of 4" in text
    said = " ".join(text.split())
    assert "There are only 10 blocks, so that every interval and p is rough." in said
    assert "Blocks of neighbouring pictures are taken for independent" in said
    assert json.loads(run(*files, "--block-size", 4, "--json"))["num_blocks"] == 10


def test_run_with_itself(run, runs):
    text = run(runs[0], runs[0])
    assert "A and B are the same: every count of every picture agrees." in text
    known = json.loads(run(runs[0], runs[0], "--json"))
    assert known["difference"] == {"value": 0, "low": 0, "high": 0}
    assert known["p_value"] == 1


def test_absent_and_rare_classes_are_named(run, runs, tmp_path):
    names = [*NAMES, "boat", "<ghost>", "rare"]
    changed = []
    for folder in runs:
        (file,) = folder.glob("evaluation/*.npz")
        with np.load(file) as archive:
            arrays = dict(archive)
        arrays["counts"] = np.pad(arrays["counts"], ((0, 0), (0, 3), (0, 0)))
        arrays["counts"][:4, 5] = 10
        arrays["class_names"] = np.array(names)
        arrays["confusion"] = np.zeros((6, 6), np.int64)
        if folder == runs[1]:
            arrays["counts"][3, 4, 2] = 7
        changed.append(tmp_path / f"{folder.parent.name}.npz")
        np.savez(changed[-1], **arrays)
    said = " ".join(run(*changed).split())
    assert "Absent in both: boat." in said
    assert "<ghost> is labelled nowhere and predicted by B alone, so that it counts as 0" in said
    assert "1 of 6 classes have labels in fewer than 10 pictures" in said
    json.loads(run(*changed, "--json"), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pictures": 39}, "39 pictures in common, but 1 of A are missing in B"),
        ({"labelled": 99}, "labels of 40 of 40 pictures are not the same"),
        ({"names": ["road", "wall", "sky"]}, "only A has 'traffic light', only B 'sky'"),
    ],
)
def test_runs_that_cannot_be_compared(runs, tmp_path, changes, message):
    other = plant(tmp_path / "other", [0.8, 0.4, 0.5], **changes)
    with pytest.raises(ValueError, match=r"give two runs|validate both") as error:
        compare([str(runs[0]), str(other)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run_a"),
        (["--block-size", "0"], "block"),
        (["--blocks", "2"], "unrecognized arguments: --blocks"),
    ],
)
def test_wrong_arguments_in_one_sentence(capsys, runs, arguments, message):
    given = [*map(str, runs), *arguments] if arguments else []
    with pytest.raises(SystemExit) as exit_:
        compare(given)
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_missing_run(runs, tmp_path):
    with pytest.raises(ValueError, match="there is no run folder or file"):
        compare([str(runs[0]), str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="holds no evaluation/"):
        compare([str(tmp_path), str(runs[1])])


def test_help_mentions_videos_and_seeds(capsys):
    with pytest.raises(SystemExit):
        compare(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Neighbouring pictures of a video" in said
    assert "the spread between training seeds" in said
