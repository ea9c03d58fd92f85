"""Weights and data set have to agree, for every option and command that takes weights."""

import csv
import json
import math

import pytest
import torch
import yaml
from PIL import Image

from segformer_pl.cli import main
from segformer_pl.commands.erf import subject_from_file
from segformer_pl.data import shapes
from segformer_pl.inference import Predictor
from tests.tiny_network import TINY_OPTION

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_figures")]
NAMES = list(shapes.CLASS_NAMES)
# Class i of the reordered description is class ORDER[i] of the original.
ORDER = [0, 2, 1, 4, 3, 5]


def describe(file, names=NAMES, **labels):
    columns = {"image_column": "image", "label_column": "label", "name": "mine"}
    labels = {"names": names, "ignored": [255]} | labels
    file.write_text(yaml.safe_dump(columns | {"labels": labels}))
    return file


def options(folder, runs, **changes):
    settings = {
        "model.network": TINY_OPTION,
        "data.dataset": folder / "mine.yaml",
        "data.path": folder / "data",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 4,
        "trainer.val_check_interval": 2,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": runs,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of two steps, with ``data``, ``mine.yaml`` and ``last.ckpt``."""
    folder = tmp_path_factory.mktemp("run")
    shapes.generate(folder / "data", {"train": 8, "validation": 4})
    describe(folder / "mine.yaml")
    main(["fit", *options(folder, folder / "runs")])
    (file,) = (folder / "runs").rglob("last.ckpt")
    content = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)  # a classifier that predicts every class
    content["state_dict"]["network.head.classifier.weight"].normal_(generator=generator)
    torch.save(content, folder / "last.ckpt")
    return folder


@pytest.fixture
def described(run):
    """Function: change the description of the data set until the test ends."""
    yield lambda **changes: describe(run / "mine.yaml", **changes)
    describe(run / "mine.yaml")


def reorder(described):
    """Describe the same data with its classes in another order."""
    described(
        names=[NAMES[index] for index in ORDER],
        raw_to_train={index: number for number, index in enumerate(ORDER)},
    )


def metrics_of(folder):
    (file,) = folder.rglob("metrics.csv")
    (row,) = csv.DictReader(file.open())
    return {key: float(value) for key, value in row.items() if value and "/" in key}


def test_classes_in_another_order_are_refused_unless_matched_by_name(
    run, described, fail, tmp_path
):
    ckpt = run / "last.ckpt"
    main(["validate", *options(run, tmp_path / "a"), f"--ckpt_path={ckpt}"])
    expected = metrics_of(tmp_path / "a")
    assert expected["val/miou"] > 0
    reorder(described)
    for command, option in (
        ("validate", "--ckpt_path"),
        ("fit", "--ckpt_path"),
        ("validate", "--model.weights"),
        ("fit", "--model.weights"),
    ):
        message = fail(command, *options(run, tmp_path / "b"), f"{option}={ckpt}")
        assert "of its 6 classes 4 differ from the data set's" in message
        assert f"1: {NAMES[1]!r} there, {NAMES[2]!r} here" in message
        assert "match_classes" in message
    message = fail("robustness", "--ckpt", ckpt, "--output", tmp_path / "r", "--device=cpu")
    assert "was trained on other classes than data set" in message
    by_name = [f"--model.weights={ckpt}", "--model.match_classes=by_name"]
    main(["validate", *options(run, tmp_path / "c"), *by_name])
    assert metrics_of(tmp_path / "c") == pytest.approx(expected, rel=1e-6, nan_ok=True)
    message = fail("validate", *options(run, tmp_path / "d"), "--model.match_classes=by_name")
    assert "no model.weights whose classes could be matched" in message


def test_a_reinitialised_classifier_can_be_trained_and_not_evaluated(
    run, described, fail, tmp_path
):
    # The last class becomes an ignored label.
    described(names=NAMES[:5], ignored=[5, 255])
    weights = f"--model.weights={run / 'last.ckpt'}"
    message = fail("validate", *options(run, tmp_path), weights)
    reason = "the classifier would be re-initialised (6 classes in the source, 5 in the model)"
    assert reason in message
    main(["fit", *options(run, tmp_path, trainer__limit_val_batches=0), weights])
    message = fail("validate", *options(run, tmp_path), f"--ckpt_path={run / 'last.ckpt'}")
    assert "it has 6 classes" in message


def test_a_changed_meaning_of_the_labels_is_refused(run, described, fail, tmp_path):
    swapped = {0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 5}
    described(raw_to_train=swapped)
    ckpt = run / "last.ckpt"
    for command in ("fit", "validate"):
        message = fail(command, *options(run, tmp_path), f"--ckpt_path={ckpt}")
        assert f"raw value 1 was {NAMES[1]!r} and is {NAMES[2]!r}" in message
        assert f"raw value 2 was {NAMES[2]!r} and is {NAMES[1]!r}" in message
        assert "restore `labels`" in message
    message = fail("robustness", "--ckpt", ckpt, "--output", tmp_path / "r", "--device=cpu")
    assert "raw value 1 was" in message
    # The same holds for the file as weights, in training and evaluation, even matched by index.
    for command, *more in (["fit"], ["validate"], ["validate", "--model.match_classes=by_index"]):
        message = fail(command, *options(run, tmp_path), f"--model.weights={ckpt}", *more)
        assert f"raw value 1 was {NAMES[1]!r} and is {NAMES[2]!r}" in message
    encoder = f"--model.encoder_weights={ckpt}"
    main(["fit", *options(run, tmp_path / "e", trainer__limit_val_batches=0), encoder])
    # In another data set the values may differ; with the same classes this is a warning.
    other = describe(tmp_path / "other.yaml", raw_to_train=swapped)
    other.write_text(other.read_text().replace("name: mine\n", ""))
    for option in ("--ckpt_path", "--model.weights"):
        place = options(run, tmp_path / option, data__dataset=other)
        with pytest.warns(UserWarning, match=f"raw value 1 was {NAMES[1]!r} and is {NAMES[2]!r}"):
            main(["validate", *place, f"{option}={ckpt}"])
    # A raw value without a meaning would have ended the run, so it may get one now.
    described(ignored=[99, 255])
    main(["validate", *options(run, tmp_path / "b"), f"--ckpt_path={ckpt}"])


def test_another_normalisation_is_refused(run, fail, tmp_path):
    mean = "--model.image_mean=[0.5,0.5,0.5]"
    for option in ("--ckpt_path", "--model.weights", "--model.encoder_weights"):
        ckpt = f"{option}={run / 'last.ckpt'}"
        message = fail("fit", *options(run, tmp_path), mean, ckpt)
        assert "give --model.image_mean=[0.485,0.456,0.406]" in message


def test_an_encoder_alone_is_not_evaluated(run, fail, tmp_path):
    encoder = f"--model.encoder_weights={run / 'last.ckpt'}"
    message = fail("validate", *options(run, tmp_path), encoder)
    assert "model.encoder_weights leaves the head untrained" in message


def test_other_arguments_of_the_network_are_refused(run, fail, tmp_path):
    heads = "--model.network.encoder.num_heads=[1,1,1,1]"
    ckpt = run / "last.ckpt"
    message = fail("validate", *options(run, tmp_path), heads, f"--ckpt_path={ckpt}")
    assert "model.network.num_heads is [1, 1, 1, 1] here and was [1, 2, 2, 4]" in message
    message = fail("validate", *options(run, tmp_path), heads, f"--model.weights={ckpt}")
    assert "trained with num_heads (1, 2, 2, 4), and the model has (1, 1, 1, 1)" in message
    for other, was, here in (
        ("paddings=[2,1,1,1]", (3, 1, 1, 1), (2, 1, 1, 1)),
        ("strides=[4,2,2,1]", (4, 2, 2, 2), (4, 2, 2, 1)),
    ):
        other, key = f"--model.network.encoder.{other}", other.split("=")[0]
        for command in ("fit", "validate"):
            message = fail(command, *options(run, tmp_path), other, f"--ckpt_path={ckpt}")
            assert f"model.network.{key} is {list(here)} here and was {list(was)}" in message
        message = fail("validate", *options(run, tmp_path), other, f"--model.weights={ckpt}")
        assert f"{key} is {here} here and {was} in the source" in message
    same = "--model.network.encoder.paddings=[3,1,1,1]"  # equals the derived default
    main(["validate", *options(run, tmp_path / "a"), same, f"--ckpt_path={ckpt}"])


def test_a_refused_resume_leaves_the_run_as_it_was(run, fail, tmp_path):
    (config,) = (run / "runs").rglob("config.yaml")
    before = {f: f.stat().st_mtime_ns for f in config.parent.rglob("*") if f.is_file()}
    ckpt = config.parent / "checkpoints" / "last.ckpt"
    place = ["--trainer.max_steps=4", f"--ckpt_path={ckpt}"]
    fail("fit", *options(run, run / "runs"), "--model.image_mean=[0.5,0.5,0.5]", *place)
    fail("fit", *options(run, run / "runs"), "--data.seed=7", *place)  # detected by the data module
    assert before == {f: f.stat().st_mtime_ns for f in config.parent.rglob("*") if f.is_file()}


def test_non_finite_weights_are_refused_by_every_command(run, fail, tmp_path):
    content = torch.load(run / "last.ckpt", weights_only=True)
    name = "network.encoder.stages.1.norm.weight"
    content["state_dict"][name][:3] = torch.nan
    bad = tmp_path / "bad.ckpt"
    torch.save(content, bad)
    for arguments in (
        ("fit", *options(run, tmp_path), f"--ckpt_path={bad}"),
        ("validate", *options(run, tmp_path), f"--ckpt_path={bad}"),
        ("validate", *options(run, tmp_path), f"--model.weights={bad}"),
        ("predict", "--ckpt", bad, "--input", __file__, "--output", tmp_path / "p"),
        ("robustness", "--ckpt", bad, "--output", tmp_path / "r"),
        ("erf", "--ckpt", bad, "--output", tmp_path / "e"),
        ("erf", "--weights", bad, "--data=shapes", "--output", tmp_path / "e"),
        ("convert", bad, tmp_path / "n.safetensors", "--to=native"),
    ):
        message = fail(*arguments)
        assert "nan or infinity in 3 values of " in message, arguments
        assert name.removeprefix("network.") in message


def test_non_finite_outputs_are_not_evaluated(run, fail, tmp_path):
    # Every weight is finite, and the outputs overflow.
    content = torch.load(run / "last.ckpt", weights_only=True)
    for name in ("network.head.classifier.weight", "network.head.bn.weight"):
        content["state_dict"][name].fill_(3e38)
    bad = tmp_path / "bad.ckpt"
    torch.save(content, bad)
    for option in ("--ckpt_path", "--model.weights"):
        message = fail("validate", *options(run, tmp_path), f"{option}={bad}")
        assert "outputs for the val images hold nan or infinity" in message
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    place = ["--input", tmp_path / "a.png", "--output", tmp_path / "p"]
    with pytest.raises(SystemExit):
        main([str(argument) for argument in ("predict", "--ckpt", bad, *place)])
    assert not list((tmp_path / "p").rglob("*.png"))


def test_a_resume_refuses_incomplete_or_wrong_states(run, fail, tmp_path):
    def remove(*path):
        def change(content):
            for key in path[:-1]:
                content = content[key]
            del content[path[-1]]

        return change

    def put(value, *path):
        def change(content):
            for key in path[:-1]:
                content = content[key]
            content[path[-1]] = value

        return change

    norm = "network.encoder.stages.1.norm.weight"
    classifier = "network.head.classifier.weight"
    for change, expected in (
        (remove("state_dict", norm), f"lacks {norm}"),
        (put(torch.zeros(3), "state_dict", norm), f"has {norm} of another shape, (3,) and not"),
        (put(torch.zeros(3), "state_dict", "more"), "has more, which the model lacks"),
        (remove("optimizer_states"), "has no 'optimizer_states'"),
        (remove("lr_schedulers"), "has no 'lr_schedulers'"),
        (remove("loops"), "has no 'loops'"),
        (put({}, "loops"), "does not hold the counters of a training"),
        (put(-1, "global_step"), "holds -1 as global_step"),
        (put(7, "global_step"), "written after 7 steps, but its trainer counted 2"),
        (put(1, "lr_schedulers", 0, "last_epoch"), "its schedule is at step 1"),
        (remove("optimizer_states", 0, "state", 0, "exp_avg"), "exp_avg of parameter 0"),
        (put(torch.tensor(1e6), "optimizer_states", 0, "state", 0, "step"), "counted 1000000 for"),
        (put([math.nan], "lr_schedulers", 0, "_last_lr"), "holds nan as the schedule's _last_lr.0"),
        (
            put(["x", 0.9], "optimizer_states", 0, "param_groups", 0, "betas"),
            "holds 'x' as group 0.betas.0",
        ),
        (
            put(torch.zeros(6, 16, 1, 1, dtype=torch.int8), "state_dict", classifier),
            f"has {classifier} as int8, no floating-point numbers",
        ),
        (put([], "callbacks"), "holds a list as callbacks"),
        (put(None, "StreamingSegmentationData", "labels", "raw"), "does not describe its labels"),
    ):
        content = torch.load(run / "last.ckpt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "w.ckpt")
        message = fail("fit", *options(run, tmp_path), f"--ckpt_path={tmp_path / 'w.ckpt'}")
        assert expected in message


def test_a_diverged_training_ends_with_a_message_and_a_report(run, fail, tmp_path, monkeypatch):
    monkeypatch.undo()  # with its report
    rate = ["--model.lr=1e30", "--model.warmup_steps=0", "--last_checkpoint.every_n_train_steps=1"]
    message = fail("fit", *options(run, tmp_path, trainer__max_steps=9), *rate)
    assert message.startswith("error: the training diverged: after step ")
    assert "smaller --model.lr" in message
    (report,) = tmp_path.rglob("report.html")
    assert "mine" in report.read_text()
    (last,) = tmp_path.rglob("last.ckpt")
    state = torch.load(last, weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_the_erf_of_weights_uses_their_normalisation(run, tmp_path):
    main(["convert", str(run / "last.ckpt"), str(tmp_path / "hf"), "--to", "huggingface"])
    file = tmp_path / "hf" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.4, 0.3]}))
    normalization = subject_from_file(str(tmp_path / "hf")).normalization
    assert normalization == Predictor.load(tmp_path / "hf").normalization
    assert normalization.mean == (0.5, 0.4, 0.3)
