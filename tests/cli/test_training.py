"""``fit``, ``validate`` and ``test``: settings, outputs, error messages."""

import csv
import logging
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.analysis.run import Run
from segformer_pl.cli import COMMANDS, main, training
from segformer_pl.cli.training import resolve
from segformer_pl.data import shapes
from segformer_pl.models import segformer_b0
from segformer_pl.task import SegmentationTask


def test_the_data_set_sets_classes_and_palette_and_seed_everything_the_order(
    folder, tmp_path, options
):
    cli = main([*options(folder, tmp_path), "--seed_everything=7"], run=False)
    assert cli.model.network.head.classifier.out_channels == len(shapes.CLASS_NAMES)
    assert cli.model.class_names == list(shapes.CLASS_NAMES)
    assert cli.model.palette == [list(color) for color in shapes.COLORS]
    assert cli.datamodule.seed == 7


@pytest.mark.slow
def test_fit_writes_a_run_that_can_be_reloaded(folder, tmp_path, options, capsys, caplog):
    main(["fit", *options(folder, tmp_path), "--model.lr=0.01"])
    (run,) = tmp_path.glob("*/version_0")
    assert (run / "config.yaml").is_file()
    assert "locality_ceiling" in (run / "metrics.csv").read_text()
    assert "shapes" in (run / "report.html").read_text()
    (checkpoint,) = run.glob("checkpoints/last.ckpt")
    task = SegmentationTask.load_from_checkpoint(checkpoint, weights_only=True)
    assert task.lr == 0.01
    assert task.network.head.classifier.out_channels == len(shapes.CLASS_NAMES)
    (part,) = Run(run).parts
    assert part.command.startswith("python -m segformer_pl fit --model.network")
    # the saved configuration repeats the run, here on a part of the images
    capsys.readouterr()
    arguments = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    with caplog.at_level(logging.INFO):
        main(["validate", *arguments, "--trainer.limit_val_batches=3"])
    assert (run.parent / "version_1" / "report.html").is_file()
    assert re.search(r"^images +3 of 4 images$", capsys.readouterr().out, re.MULTILINE)
    assert re.search(r"^mIoU .* on 3 of 4 images .*report: ", caplog.messages[-1])


@pytest.mark.slow
def test_fit_and_its_report_warn_of_implausible_settings(folder, tmp_path, caplog, options):
    arguments = options(folder, tmp_path, trainer__limit_val_batches=0, trainer__max_steps=2)
    with caplog.at_level(logging.INFO):
        main(["fit", *arguments])
    sentence = "the learning rate warms up for 1500 steps, but training ends after 2"
    assert f"warning: {sentence}" in caplog.text
    assert sentence in (tmp_path / "shapes_SegFormer" / "version_0" / "report.html").read_text()


@pytest.mark.usefixtures("without_figures")
def test_what_a_run_without_options_leaves_and_prints(folder, tmp_path, start_command, options):
    """A name and the best checkpoint; and nothing that tells the user nothing."""
    left_out = ("save_dir", "enable_progress_bar", "num_sanity_val_steps")
    arguments = [o for o in options(folder, "") if not any(name in o for name in left_out)]
    command = start_command(["fit", *arguments], folder=tmp_path, figures=False)
    assert command.wait() == 0, command.output
    run = tmp_path / "runs" / "shapes_SegFormer" / "version_0"
    best = run / "checkpoints" / "best.ckpt"
    assert torch.load(best, weights_only=True)["global_step"] == 2
    lines = command.output.splitlines()
    noise = ("Tip", "deprecated", "Epoch", "FLOPs", "TPU", "-2", "`Trainer", "not empty")
    assert not [line for line in lines for word in noise if word in line]
    assert "SegFormer: 11,262 parameters are trained" in lines
    (bar,) = {line.strip() for line in lines if line.lstrip().startswith("step: 100%")} & {
        lines[-2].strip()
    }
    assert "2/2 [" in bar
    assert "loss=" in bar
    assert "mIoU=" in bar
    assert lines[-1].startswith("mIoU ")
    assert lines[-1].endswith("report: none")


@pytest.mark.slow
def test_run_folders_are_below_the_root_folder(capsys, folder, tmp_path, options, fail):
    rooted = [f"--trainer.default_root_dir={tmp_path / 'root'}"]
    default = [o for o in options(folder, tmp_path) if "save_dir" not in o]
    cli = main([*default, *rooted], run=False)
    assert cli.trainer.loggers[0].log_dir == str(
        tmp_path / "root" / "shapes_SegFormer" / "version_0"
    )
    error = fail(capsys, ["fit", *options(folder, tmp_path / "other"), *rooted])
    assert f"save_dir is '{tmp_path / 'other'}', which is outside of it" in error


@pytest.mark.slow
def test_settings_in_epochs_are_refused(capsys, folder, tmp_path, options, fail):
    for setting in ("max_epochs=3", "check_val_every_n_epoch=1"):
        error = fail(capsys, ["fit", *options(folder, tmp_path), f"--trainer.{setting}"])
        assert f"trainer.{setting.replace('=', ' is ')}, but training reads a stream" in error


def test_a_wrong_data_set_name(capsys, folder, tmp_path, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path), "--data.dataset=shape"])
    assert "there is no data set 'shape' in the catalogue; did you mean 'shapes'?" in error
    assert "usage:" not in error


def test_a_missing_path(capsys, tmp_path, options, fail):
    nowhere = tmp_path / "nowhere"
    error = fail(capsys, ["fit", *options(nowhere, tmp_path)])
    assert error == (
        f"error: data.path: there is no folder '{nowhere}'; give the folder that holds "
        "images/ and labels/ or Parquet shards, a hub name owner/name, or a pattern with {split} "
        "of files or URLs"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_run_writes_a_checkpoint_to_resume_from(folder, tmp_path, options):
    arguments = [*options(folder, tmp_path, trainer__max_steps=3), "--trainer.limit_val_batches=0"]
    main(["fit", *arguments, "--last_checkpoint.every_n_train_steps=2"])
    (last,) = tmp_path.rglob("*.ckpt")
    assert last.name == "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 3  # at the end, and every 2 steps before
    assert checkpoint["StreamingSegmentationData"]["consumed"] == 3 * 2
    main(["fit", *arguments, "--trainer.enable_checkpointing=false"])
    assert list(tmp_path.rglob("*.ckpt")) == [last]


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_loss_and_inference_are_stored_in_the_checkpoint(
    capsys, folder, tmp_path, caplog, options, fail
):
    parts = [
        "--model.loss=segformer_pl.losses.WeightedSum",
        "--model.loss.losses=[{class_path: segformer_pl.losses.CrossEntropy, init_args: "
        "{average: valid}}, {class_path: segformer_pl.losses.Dice}]",
        "--model.loss.weights=[1.0, 0.5]",
        "--model.inference.pad_to=32",
        "--model.inference.flip=true",
    ]
    main(["fit", *options(folder, tmp_path), *parts])
    (checkpoint,) = tmp_path.glob("*/version_0/checkpoints/last.ckpt")
    task = SegmentationTask.load_from_checkpoint(checkpoint, weights_only=True)
    assert (task.inference.pad_to, task.inference.flip) == (32, True)
    assert [type(loss).__name__ for loss in task.loss.losses] == ["CrossEntropy", "Dice"]
    assert task.loss.losses[0].average == "valid"
    # Another loss is logged on resume; layer-wise rates need another optimiser state.
    resumed = [*options(folder, tmp_path, trainer__max_steps=4), f"--ckpt_path={checkpoint}"]
    with caplog.at_level(logging.INFO):
        main(["fit", *resumed])
    assert "model.loss.class_path is not given here and was segformer_pl.losses" in caplog.text
    assert "model.inference.init_args.flip is not given here and was True" in caplog.text
    error = fail(capsys, ["fit", *resumed, "--model.layer_decay=0.9"])
    assert (
        "the optimiser's state for 1 does not fit that for less than 1; start a new run with"
        in error
    )
    error = fail(capsys, ["fit", *options(folder, tmp_path), "--model.inference.scales=[]"])
    assert error.startswith("error: inference: scales is empty; give at least one, such as [1.0]")


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_moving_average_of_the_weights_is_evaluated_and_saved(folder, tmp_path, options):
    """Lightning's callback works on a stream without epochs, and in a resumed run."""
    average = "lightning.pytorch.callbacks.EMAWeightAveraging"
    arguments = [
        *options(folder, tmp_path, trainer__max_steps=4, trainer__val_check_interval=4),
        f"--trainer.callbacks+={average}",
        "--trainer.callbacks.decay=0.5",
        "--last_checkpoint.every_n_train_steps=4",
        "--model.lr=0.01",
        "--model.warmup_steps=0",
    ]
    main(["fit", *arguments])
    (last,) = tmp_path.glob("*/version_0/checkpoints/last.ckpt")
    state = torch.load(last, weights_only=True)
    current = state["current_model_state"]["network.head.classifier.weight"]
    averaged = state["state_dict"]["network.head.classifier.weight"]
    assert not torch.equal(current, averaged)
    # The weights that were evaluated in the training are those of the checkpoint.
    (metrics,) = tmp_path.glob("*/version_0/metrics.csv")
    (validated,) = (row for row in csv.DictReader(metrics.open()) if row["val/loss"])
    cli = main(["validate", *arguments, f"--ckpt_path={last}"])
    assert cli.trainer.callback_metrics["val/loss"].item() == pytest.approx(
        float(validated["val/loss"]), rel=1e-5
    )
    resumed = [argument.replace("max_steps=4", "max_steps=6") for argument in arguments]
    assert main(["fit", *resumed, f"--ckpt_path={last}"]).trainer.global_step == 6


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_weights_to_start_from(capsys, folder, tmp_path, options, fail):
    state = segformer_b0(2).state_dict()
    torch.save(state, tmp_path / "w.pth")
    runs = options(folder, tmp_path / "runs", trainer__max_steps=1, model__lr=0.0)[2:]
    runs.append("--model.network=segformer_pl.models.segformer_b0")
    cli = main(["fit", *runs, f"--model.weights={tmp_path / 'w.pth'}"])
    ours = cli.model.network.state_dict()
    assert torch.equal(ours["head.fuse.weight"], state["head.fuse.weight"])
    assert ours["head.classifier.bias"].shape == (len(shapes.CLASS_NAMES),)
    error = fail(capsys, ["fit", *runs, f"--model.weights={tmp_path / 'x.pth'}"])
    assert error.startswith(f"error: there is no file or folder '{tmp_path / 'x.pth'}'; give")


def test_a_misspelt_key_on_the_command_line_and_in_a_file(capsys, folder, tmp_path, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path), "--model.lrr=0.1"])
    assert "model.lrr" in error
    assert "usage:" not in error
    config = tmp_path / "config.yaml"
    config.write_text("model: {learning_rate: 0.1}\n")
    error = fail(capsys, ["fit", *options(folder, tmp_path), f"--config={config}"])
    assert "learning_rate" in error
    assert "usage:" not in error


@pytest.mark.parametrize("abbreviation", ["--trainer.max_step", "--model.warmup"])
def test_abbreviated_keys_are_refused(capsys, folder, tmp_path, abbreviation, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path), f"{abbreviation}=1"])
    assert error.startswith(
        f"error: there is no option {abbreviation} (did you mean {abbreviation}"
    )


def test_a_number_of_classes_that_contradicts_the_data_set(capsys, folder, tmp_path, options, fail):
    given = ["--model.network.num_classes=5"]
    error = fail(capsys, ["fit", *options(folder, tmp_path), *given])
    assert "model.network.num_classes is 5, but data set 'shapes' has 6 classes" in error
    config = tmp_path / "config.yaml"
    network = "segformer_pl.models.segformer_b0"
    config.write_text(
        f"model: {{network: {{class_path: {network}, init_args: {{num_classes: 5}}}}}}"
    )
    arguments = ["fit", f"--config={config}", *options(folder, tmp_path)[2:]]
    assert "num_classes is 5" in fail(capsys, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["batch_size=0", "num_workers=-1", "crop_size=[0,32]"])
def test_numbers_out_of_range(capsys, folder, tmp_path, value, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path), f"--data.{value}"])
    assert value.split("=")[0] in error


def test_a_run_without_max_steps(capsys, folder, tmp_path, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path, trainer__max_steps=-1)])
    assert error.startswith("error: trainer.max_steps is not set")


def test_overfit_batches_is_refused(capsys, folder, tmp_path, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path), "--trainer.overfit_batches=2"])
    assert error.startswith("error: trainer.overfit_batches is 2, but training reads a stream")
    assert "a data set with few images by --data.path" in error


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_resumed_run_without_time_left_is_an_error(capsys, folder, tmp_path, options, fail):
    arguments = options(folder, tmp_path, trainer__max_steps=1, trainer__limit_val_batches=0)
    main(["fit", *arguments, "--trainer.max_time=00:01:00:00"])
    (checkpoint,) = tmp_path.glob("*/version_0/checkpoints/last.ckpt")
    resumed = [*arguments, f"--ckpt_path={checkpoint}", "--trainer.max_time=00:00:00:00"]
    error = fail(capsys, ["fit", *resumed, "--trainer.max_steps=3"])
    assert error.startswith(
        "error: no step was made, training is at step 1 of 3: trainer.max_time counts the "
        "training time since the first start of the run, which is 0:00:"
    )
    # A run that has made all its steps ends without an error.
    main(["fit", *resumed])


def test_a_misspelt_key_of_the_network(capsys, folder, tmp_path, options, fail):
    error = fail(capsys, ["fit", *options(folder, tmp_path), "--model.network.sr_ratio=[1,1,1,1]"])
    assert "sr_ratio" in error


def test_an_impossible_network(capsys, folder, tmp_path, options, fail):
    arguments = ["--model.network.encoder.patch_sizes=[3,3,3,3]"]
    error = fail(capsys, ["fit", *options(folder, tmp_path), *arguments])
    assert "stage 1: patch_size 3 is smaller than stride 4" in error
    assert "use a patch_size of at least 4" in error


@pytest.fixture
def broken_copy(folder, tmp_path, png, write_shards):
    """Function that copies the shards and replaces one cell in the fourth row of a split."""

    def write(column, cell, broken="train"):
        for split in ("train", "validation"):
            (file,) = folder.glob(f"{split}*.parquet")
            rows = pq.read_table(file).to_pylist()
            if split == broken:
                rows[3][column] = png(cell) if isinstance(cell, np.ndarray) else cell
            write_shards(tmp_path / "broken", split, [rows])
        return tmp_path / "broken"

    return write


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (None, "column 'label': the row holds no image; remove the row"),
        (
            np.full((shapes.IMAGE_SIZE, shapes.IMAGE_SIZE), 99, np.uint8),
            "label value 99 in 4096 pixels is not among the data set's labels",
        ),
    ],
    ids=["missing", "outside the spec"],
)
@pytest.mark.slow
def test_a_broken_row(capsys, broken_copy, tmp_path, num_workers, label, sentence, options, fail):
    folder = broken_copy("label", label)
    arguments = options(folder, tmp_path, data__num_workers=num_workers, trainer__max_steps=8)
    error = fail(capsys, ["fit", *arguments])
    assert error.startswith("error: data set 'shapes', split train, sample 'train-00003'")
    assert sentence in error
    assert "\n" not in error


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_broken_row_of_the_validation_says_how_to_resume(
    capsys, broken_copy, tmp_path, options, fail
):
    changes = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    changes = {f"trainer__{name}": value for name, value in changes.items()}
    error = fail(
        capsys, ["fit", *options(broken_copy("label", None, "validation"), tmp_path, **changes)]
    )
    sentence, command = error.split("; then resume with\n")
    assert sentence.startswith(
        "error: data set 'shapes', split validation, sample 'validation-0000"
    )
    assert command.rstrip().endswith("last.ckpt")
    (file,) = tmp_path.glob("*/version_*/provenance.json")
    (part,) = Run(file.parent).parts
    assert (part.end, part.last_step) == (sentence, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_data_whose_labels_are_all_ignored(
    capsys, folder, tmp_path, row, write_shards, options, fail
):
    size = (shapes.IMAGE_SIZE, shapes.IMAGE_SIZE)
    for split in ("train", "validation"):
        write_shards(tmp_path / "all", split, [[row(f"u{i}", 255, size) for i in range(4)]])
    arguments = options(tmp_path / "all", tmp_path, trainer__limit_val_batches=0)
    error = fail(capsys, ["fit", *arguments])
    assert error.startswith("error: data set 'shapes': none of the first 4 training samples has a")
    error = fail(capsys, ["validate", *options(tmp_path / "all", tmp_path)])
    assert error.startswith("error: no pixel of the val images is labelled, so the metrics are")
    assert "\n" not in error


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_skipped_images_are_left_out_of_the_metrics(broken_copy, tmp_path, options):
    folder = broken_copy("image", None, broken="validation")
    arguments = [*options(folder, tmp_path), "--data.on_bad_sample=skip"]
    with pytest.warns(UserWarning, match=r"skipped, 1 so far: .*'validation-00003'"):
        main(["validate", *arguments])
    (metrics,) = tmp_path.glob("*/version_*/metrics.csv")
    (row,) = csv.DictReader(metrics.open())
    assert 0 < float(row["val/loss"]) < 10
    evaluation = Run(metrics.parent).last_evaluation()
    assert evaluation.ids == [f"validation-{n:05d}" for n in range(3)]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_help_of_fit_lists_options_and_not_every_module(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert {"--model.network", "--data.path", "--trainer.max_steps"} <= set(text.split())
    assert text.startswith("usage: python -m segformer_pl fit [--config FILE] ")
    assert not [word for word in ("torch.nn", "Namespace", ":mod:", "``") if word in text]
    assert len(text.splitlines()) < 300
    options = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert options[0] == "--data.dataset"
    order = list(dict.fromkeys(option.partition(".")[0] for option in options if "." in option))
    assert order[:4] == ["--data", "--model", "--last_checkpoint", "--trainer"]


@pytest.mark.slow
@pytest.mark.parametrize("order", [(int, float), (float, int)])
def test_two_batches_are_no_share_whatever_was_imported_before(order, tmp_path, monkeypatch):
    # typing takes one order of a union for the other if a module has used it before.
    add_class_args = LightningArgumentParser.add_lightning_class_args

    def add_with_order(parser, *args, **kwargs):
        added = add_class_args(parser, *args, **kwargs)
        for action in parser._actions:
            if action.dest == "trainer.limit_val_batches":
                action._typehint = order[0] | order[1] | None
        return added

    monkeypatch.setattr(LightningArgumentParser, "add_lightning_class_args", add_with_order)
    monkeypatch.setattr(training, "parser", training.parser.__wrapped__)
    file = tmp_path / "settings.yaml"
    settings = {
        "model": {"network": {"class_path": "segformer_pl.models.segformer_b0"}},
        "data": {"dataset": "shapes"},
    }
    for value in (1, 2, 0.5, 1.0):
        file.write_text(yaml.safe_dump(settings | {"trainer": {"limit_val_batches": value}}))
        read = resolve([str(file)])["trainer"]["limit_val_batches"]
        assert (read, type(read)) == (value, type(value))
