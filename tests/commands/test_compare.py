"""The command ``compare``: run folders and files, caveats, tests and groups of seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.commands import compare as command
from segformer_pl.commands.options.compare import parse

NAMES = ["road", "traffic light", "wall"]


def plant(folder, accuracy, num_images=40, step=1600, labelled=100, names=NAMES):
    """Write an evaluation to a run folder.

    Args:
        folder: Run folder.
        accuracy: Share of the pixels of each class that are predicted right, before a jitter of
            up to 0.1 in each image.
        num_images: Number of images.
        step: Training steps of the evaluated network.
        labelled: Number of pixels of each class in each image.
        names: Names of the classes.
    """
    shape = (num_images, len(names))
    labels = np.full(shape, labelled)
    jitter = np.random.default_rng(0).uniform(-0.1, 0.1, shape)
    intersection = (labels * (np.array(accuracy) + jitter)).astype(np.int64)
    wrong = labels - intersection
    counts = np.stack([intersection, labels, intersection + np.roll(wrong, 1, axis=1)], axis=-1)
    evaluation = Evaluation(
        split="val",
        step=step,
        class_names=names,
        ids=[f"image {n}" for n in range(num_images)],
        counts=counts,
        loss=np.full(num_images, 0.5),
        confusion=np.zeros((len(names), len(names)), np.int64),
        calibration=np.zeros((15, 3)),
    )
    evaluation.save(folder / "evaluation" / f"val_step_{step:07d}.npz")
    return folder


def configure(folder, seed=0, lr=3e-3, **changes):
    """Write the part of a ``fit``'s config.yaml that is compared, as Lightning writes it."""
    config = {
        "seed_everything": seed,
        "trainer": {
            "max_steps": 1600,
            "logger": {"class_path": "CSVLogger", "init_args": {"name": folder.parent.name}},
            "callbacks": [{"class_path": "Checkpoint", "init_args": {"dirpath": str(folder)}}],
        },
        "model": {"network": {"class_path": "segformer_b0"}, "lr": lr, "inference": None},
        "data": {"dataset": "shapes", "path": f"/scratch/{seed}", "num_workers": seed},
        "last_checkpoint": {"dirpath": str(folder)},
        "ckpt_path": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
    return trained_on(folder)


def trained_on(folder, num_rows=16, fingerprint="names-contents"):
    """Write the training_data.json of a ``fit``."""
    training_data = {"dataset": "shapes", "num_rows": num_rows, "fingerprint": fingerprint}
    (folder / "training_data.json").write_text(json.dumps(training_data))
    return folder


@pytest.fixture
def runs(tmp_path):
    a = plant(tmp_path / "base" / "version_0", [0.8, 0.4, 0.5])
    b = plant(tmp_path / "wide" / "version_0", [0.8, 0.6, 0.5], step=800)
    return a, b


def compare(arguments):
    command.run(parse(arguments))


@pytest.fixture
def run(capsys):
    """Function that runs the command and returns its output."""

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
    # The caveat comes before the results.
    assert lines[3].startswith(
        "The training configuration of A and B is unknown: there is no config.yaml"
    )
    assert "not whether one way of training is better" in " ".join(lines[3:8])
    start = lines.index("", 3) + 1
    assert lines[start].startswith("B scores higher than A on images like these: B - A = +")
    start = lines.index("", start) + 1
    assert lines[start].endswith("95 % CI, 40 images")
    assert lines[start + 1].startswith("A ")
    rows = [line for line in lines if line.startswith(tuple(NAMES))]
    assert rows[0].startswith("traffic light")
    assert " * " in rows[0]
    assert all(row.endswith(" 40") for row in rows)
    text = " ".join(text.split())
    assert "is better:" not in text
    assert "give --block_size; otherwise intervals are too narrow" in text


def test_json_holds_fractions(run, runs):
    results = json.loads(run(*runs, "--json"))
    assert results["a"] == {"path": str(runs[0]), "split": "val", "step": 1600, "seed": None}
    assert "not of training seeds" in results["caveat"]
    assert results["b"]["step"] == 800
    assert 0 < results["difference"]["low"] < results["difference"]["value"] < 1
    assert results["verdict"].startswith("B scores higher than A")
    assert results["classes"][0]["name"] == "traffic light"
    assert results["num_blocks"] == results["num_images"] == 40


def test_files_and_blocks(run, runs):
    files = [next(folder.glob("evaluation/*.npz")) for folder in runs]
    text = run(*files, "--block_size", 4)
    assert "40 images in 10 blocks of 4" in text
    text = " ".join(text.split())
    assert "There are only 10 blocks, so every interval and p is rough." in text
    assert "Blocks of neighbouring images are treated as independent" in text
    assert json.loads(run(*files, "--block_size", 4, "--json"))["num_blocks"] == 10


def test_run_with_itself(run, runs):
    text = run(runs[0], runs[0])
    assert "A and B are the same: every count of every image agrees." in text
    results = json.loads(run(runs[0], runs[0], "--json"))
    assert results["difference"] == {"value": 0, "low": 0, "high": 0}
    assert results["p_value"] == 1


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
    text = " ".join(run(*changed).split())
    assert "Absent in both: boat." in text
    assert "<ghost> has no labels and is predicted by B alone, so it counts as 0" in text
    assert "1 of 6 classes have labels in fewer than 10 images" in text
    json.loads(run(*changed, "--json"), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 39}, "39 images in common, but 1 of A are missing in B"),
        ({"labelled": 99}, "labels of 40 of 40 images are not the same"),
        ({"names": ["road", "wall", "sky"]}, "only A has 'traffic light', only B 'sky'"),
    ],
)
def test_runs_that_cannot_be_compared(runs, tmp_path, changes, message):
    other = plant(tmp_path / "other", [0.8, 0.4, 0.5], **changes)
    with pytest.raises(ValueError, match=r"give runs on|validate both") as error:
        compare([str(runs[0]), str(other)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN is not given"),
        (["--block_size", "0"], "block"),
        (["--blocks", "2"], "there is no option --blocks"),
    ],
)
def test_wrong_arguments_in_one_sentence(capsys, runs, arguments, message):
    given = [*map(str, runs), *arguments] if arguments else []
    with pytest.raises(SystemExit) as exit_:
        compare(given)
    text = capsys.readouterr().err
    assert exit_.value.code == 2
    assert text.startswith("error: ")
    assert message in text
    assert text.count("\n") == 1


def test_missing_run(runs, tmp_path):
    with pytest.raises(ValueError, match="there is no run folder or file"):
        compare([str(runs[0]), str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="holds no evaluation/"):
        compare([str(tmp_path), str(runs[1])])


def test_help_mentions_videos_and_seeds(capsys):
    with pytest.raises(SystemExit):
        compare(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Neighbouring images of a video" in text
    assert "the spread between training seeds" in text


# Configurations and seeds


def test_two_seeds_of_one_configuration_are_called_that(run, runs):
    """The difference is significant, but neither configuration is called better."""
    for seed, folder in enumerate(runs):
        configure(folder, seed)
    lines = run(*runs).splitlines()
    assert lines[0] == f"A  {runs[0]}: val, step 1,600, seed 0"
    text = " ".join(lines[2:5])
    assert text.startswith(" A and B are two seeds of one configuration (seed 0, seed 1): ")
    assert "neither is a better way of training" in text
    results = json.loads(run(*runs, "--json"))
    assert (results["a"]["seed"], results["b"]["seed"]) == (0, 1)
    assert results["caveat"].startswith("A and B are two seeds of one configuration")
    assert results["p_value"] < 0.01
    assert "better" not in results["verdict"]


def test_two_configurations_are_distinguished_by_their_settings(run, runs):
    configure(runs[0], lr=3e-3)
    configure(runs[1], seed=1, lr=6e-3)
    caveat = json.loads(run(*runs, "--json"))["caveat"]
    assert caveat.startswith("A and B differ in model.lr (0.003; 0.006). With one run of each")


def test_a_run_with_itself_has_one_seed(run, runs):
    configure(runs[0])
    assert "have one configuration and one seed (0)" in run(runs[0], runs[0])


def test_the_configuration_of_a_validation_is_that_of_its_checkpoints_run(run, runs, tmp_path):
    """``validate`` has a seed of its own that is ignored; its evaluation protocol counts."""
    (tmp_path / "trained").mkdir()
    trained = configure(tmp_path / "trained", seed=7)
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    configure(runs[0], seed=3)
    evaluates = {"verbose": True, "ckpt_path": checkpoint}
    configure(runs[1], seed=0, lr=1.0, **evaluates)
    assert "two seeds of one configuration (seed 3, seed 7)" in run(*runs)
    slide = {"inference": {"window": [64, 64]}, "lr": 1.0}
    configure(runs[1], model=slide, **evaluates)
    assert "A and B differ in model.inference" in run(*runs)
    configure(runs[1], verbose=True, ckpt_path=str(tmp_path / "gone" / "checkpoints" / "x.ckpt"))
    assert "The training configuration of B is unknown" in " ".join(run(*runs).split())
    configure(runs[1], verbose=True)  # weights of unknown origin
    assert "The training configuration of B is unknown" in " ".join(run(*runs).split())


def test_runs_with_different_training_data_differ_in_more_than_the_seed(run, runs):
    """Training data are compared by the fingerprint of their contents, not by name or path."""
    for seed, folder in enumerate(runs):
        configure(folder, seed)
    trained_on(runs[1], fingerprint="moved-contents")
    assert "two seeds of one configuration" in run(*runs)
    trained_on(runs[1], num_rows=4, fingerprint="names-others")
    text = " ".join(run(*runs).split())
    assert (
        "A and B differ in training data (16 images of shapes, fingerprint contents; 4 images of "
        "shapes, fingerprint others). With one run of each" in text
    )


def test_unknown_training_data_at_another_path_may_differ(run, runs, study):
    for seed, folder in enumerate(runs):
        configure(folder, seed)
    (runs[1] / "training_data.json").unlink()
    text = " ".join(run(*runs).split())
    assert "two seeds" not in text
    assert (
        "A and B differ in data.path (/scratch/0; /scratch/1). Whether runs with different" in text
    )
    assert "trained on the same data is unknown" in text
    configure(runs[1], seed=1, data=yaml.safe_load((runs[0] / "config.yaml").read_text())["data"])
    (runs[1] / "training_data.json").unlink()
    assert "two seeds of one configuration" in run(*runs)  # of one path
    few = [study["a", seed] for seed in range(3)]
    (few[2] / "training_data.json").unlink()
    text = " ".join(run(*few).split())
    assert text.startswith("3 runs of 2 configurations")
    assert "trained on the same data is unknown" in text
    assert "B data.path /scratch/2" in text


def test_settings_that_a_resumption_changed_are_compared(run, runs):
    """Unless it came after the evaluated step, here 1600 and 800."""
    for seed, folder in enumerate(runs):
        configure(folder, seed)
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    config["ckpt_path"] = "runs/wide/version_0/checkpoints/last.ckpt"
    resumed = runs[1] / "config_resumed_at_step_0000400.yaml"
    resumed.write_text(yaml.safe_dump(config))
    assert "two seeds of one configuration" in run(*runs)
    config["model"]["lr"] = 0.5
    config["trainer"]["max_steps"] = 3200
    resumed.write_text(yaml.safe_dump(config))
    text = " ".join(run(*runs).split())
    assert (
        "A and B differ in model.lr (0.003; 0.003, 0.5 from step 400 on), "
        "trainer.max_steps (1600; 1600, 3200 from step 400 on). " in text
    )
    resumed.rename(runs[1] / "config_resumed_at_step_0000800.yaml")
    assert "two seeds of one configuration" in run(*runs)


def test_a_run_continued_from_another_differs_from_one_trained_from_the_start(run, runs):
    configure(runs[0])
    configure(runs[1], seed=1, ckpt_path="runs/other/version_0/checkpoints/last.ckpt")
    assert "A and B differ in ckpt_path (null; runs/other/" in " ".join(run(*runs).split())


def with_callbacks(*callbacks):
    given = [{"class_path": path, "init_args": arguments} for path, arguments in callbacks]
    return {"trainer": {"max_steps": 1600, "callbacks": given}}


def test_callbacks_that_affect_training_are_compared(run, runs):
    lightning = "lightning.pytorch.callbacks."
    monitor = (f"{lightning}LearningRateMonitor", {"logging_interval": "step"})
    best = (f"{lightning}ModelCheckpoint", dict.fromkeys("abcdefghijklmnop"))
    panel = ("segformer_pl.callbacks.PredictionPanel", {"num_images": 4})
    ema = (f"{lightning}EMAWeightAveraging", {"decay": 0.99, "device": None})

    def differ(one, other):
        configure(runs[0], 0, **with_callbacks(*one))
        configure(runs[1], 1, **with_callbacks(*other))
        return " ".join(run(*runs).split())

    assert "two seeds of one configuration" in differ([monitor], [best, monitor, panel])
    assert (
        "differ in trainer.callbacks.EMAWeightAveraging (not stated; "
        "lightning.pytorch.callbacks.EMAWeightAveraging). " in differ([monitor], [monitor, ema])
    )
    other = (ema[0], {"decay": 0.9, "device": None})
    assert "differ in trainer.callbacks.EMAWeightAveraging.decay (0.99; 0.9). " in differ(
        [ema], [monitor, other]
    )
    unknown = ("mine.Mixup", {"alpha": 0.1})
    assert "differ in trainer.callbacks.Mixup (not stated; mine.Mixup). " in differ([], [unknown])
    assert "two seeds" in differ([unknown], [monitor, ("mine.Mixup", {"alpha": 0.2})])


def test_few_settings_are_shown(run, study):
    model = {f"setting_{n}": n for n in range(20)}
    configure(study["b", 0], 0, model=model | {"long": "x" * 500})
    configure(study["b", 1], 1, model=model | {"long": "x" * 500})
    text = run(*study.values())
    stated = text[text.index("\nB  ") :].split("   seed")[0]
    assert " and 19 more" in " ".join(stated.split())
    assert len(stated) < 500


@pytest.fixture
def study(tmp_path):
    """Three seeds with a learning rate of 0.003 and two with 0.006, whose mIoU is higher."""
    accuracies = {("a", 0): 0.50, ("a", 2): 0.54, ("a", 1): 0.52, ("b", 0): 0.60, ("b", 1): 0.57}
    folders = {}
    for (name, seed), accuracy in accuracies.items():
        folder = plant(tmp_path / f"{name}{seed}" / "version_0", [0.8, accuracy, 0.5])
        folders[name, seed] = configure(folder, seed, {"a": 3e-3, "b": 6e-3}[name])
    return folders


def test_runs_are_grouped_by_configuration(run, study):
    results = json.loads(run(*study.values(), "--json"))
    a, b = results["groups"]
    assert (a["settings"], b["settings"]) == ({"model.lr": 0.003}, {"model.lr": 0.006})
    assert [one["seed"] for one in a["runs"]] == [0, 1, 2]
    assert [Path(one["path"]).parent.name for one in b["runs"]] == ["b0", "b1"]
    mious = [one["miou"]["value"] for one in a["runs"]]
    assert a["mean"] == pytest.approx(sum(mious) / 3)
    # np.std(ddof=1) of two values is their difference divided by sqrt(2)
    first, second = (one["miou"]["value"] for one in b["runs"])
    assert b["standard_deviation"] == pytest.approx(abs(first - second) / np.sqrt(2))
    assert all(one["miou"]["low"] < one["miou"]["value"] < one["miou"]["high"] for one in a["runs"])
    assert results["caveat"].startswith("Nothing is tested here: ")
    assert results["differences"] == {"B - A": pytest.approx(b["mean"] - a["mean"])}
    text = run(*study.values())
    assert text.startswith(
        "5 runs of 2 configurations, evaluated on 40 images\n\nNothing is tested"
    )
    assert "A  model.lr 0.003\n" in text
    assert " over 3 seeds\n" in text
    assert "Every run of B has a higher mIoU than every run of A." in " ".join(text.split())
    assert "better." in text.split("\n\n")[1]  # in the caveat, and nowhere else
    assert text.count("better") == 1
    assert "in blocks of 4" in run(*study.values(), "--block_size", 4)


def test_groups_that_overlap_or_have_one_run(run, study, tmp_path):
    low = configure(plant(tmp_path / "b9" / "version_0", [0.8, 0.51, 0.5]), 9, 6e-3)
    assert "Their runs overlap." in run(*study.values(), low)
    few = [study["a", 0], study["a", 1], study["b", 0]]
    text = " ".join(run(*few).split())
    assert "There is only one run of B, so the spread between its seeds is unknown" in text
    assert "runs overlap" not in text
    assert "Every run" not in text
    assert json.loads(run(*few, "--json"))["groups"][1]["standard_deviation"] is None
    three = [study["a", seed] for seed in range(3)]
    text = run(*three)
    assert text.startswith("3 runs of one configuration")
    assert "of the means" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["road", "wall", "sky"]}, "version_0' has 3 classes and "),
        ({"num_images": 39}, "39 images in common"),
        ({"labelled": 99}, "with the same labels and label mapping"),
        ({"step": 800}, "after 800, but they are runs of one configuration"),
    ],
    ids=str,
)
def test_groups_that_cannot_be_formed(study, tmp_path, changes, message):
    other = plant(tmp_path / "c" / "version_0", [0.8, 0.4, 0.5], **changes)
    configure(other, 5)
    with pytest.raises(ValueError, match=r"give|validate both") as error:
        compare([*map(str, study.values()), str(other)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_seed_twice_and_unknown_configurations_are_refused(study, tmp_path):
    again = configure(plant(tmp_path / "d" / "version_0", [0.8, 0.4, 0.5]), 1)
    with pytest.raises(ValueError, match="are both seed 1 of one configuration"):
        compare([*map(str, study.values()), str(again)])
    (again / "config.yaml").unlink()
    with pytest.raises(ValueError, match="was trained with is not known"):
        compare([*map(str, study.values()), str(again)])
    (again / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml' cannot be read as YAML"):
        compare([*map(str, study.values()), str(again)])


def test_groups_over_one_block_are_refused(study):
    with pytest.raises(ValueError, match="40 images in blocks of 40 make one block"):
        compare([*map(str, study.values()), "--block_size", "40"])


def test_one_run_is_nothing_to_compare(runs):
    with pytest.raises(ValueError, match="give two or more runs"):
        compare([str(runs[0])])


@pytest.mark.slow
def test_configurations_as_the_command_line_writes_them(run, runs, tmp_path):
    """In complete files, seed, logger, folder and loader do not distinguish configurations."""
    from segformer_pl.cli.training import resolve

    file = tmp_path / "run.yaml"
    for seed, folder in enumerate(runs):
        file.write_text(
            yaml.safe_dump(
                {
                    "seed_everything": seed,
                    "model": {"network": "segformer_pl.models.segformer_b0"},
                    "data": {"dataset": "shapes", "num_workers": seed},
                    "trainer": {
                        "max_steps": 10,
                        "default_root_dir": str(folder),
                        "logger": {
                            "class_path": "lightning.pytorch.loggers.CSVLogger",
                            "init_args": {"save_dir": str(folder)},
                        },
                    },
                }
            )
        )
        (folder / "config.yaml").write_text(yaml.safe_dump(resolve([str(file)])))
        trained_on(folder)
    assert "two seeds of one configuration (seed 0, seed 1)" in run(*runs)
