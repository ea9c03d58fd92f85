"""Errors that jsonargparse, Lightning, torch and W&B raise at a user's mistake: one sentence each.

The libraries themselves raise them here, so that a release that words or wraps one in another way
fails these tests.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
import yaml

from segformer_pl.cli import main
from segformer_pl.cli.exits import explain
from segformer_pl.cli.training import resolve
from segformer_pl.errors import UserError
from tests.tiny_network import TINY_OPTION, TINY_SEGFORMER

# Python's and jsonargparse's words for what a user never wrote
JARGON = ("Namespace", "<class", "typing.", "Union", "Traceback", "Parser key", "\n")
LIGHTNING = "lightning.pytorch"

# Option -> message, of values that the parser refuses
PARSED = {
    "--model.lrr=1": "there is no option --model.lrr (did you mean --model.lr?)",
    "--model.lr=abc": "model.lr is abc, which is not accepted; give a number; see ",
    "--model.optimizer=adam": "model.optimizer is adam, which is not accepted; give adamw or sgd; ",
    "--data.batch_size=two": "data.batch_size is two, which is not accepted; give a whole ",
    "--last_checkpoint.keep=0": "last_checkpoint.keep is 0, which is not accepted; give a whole nu",
    "--data.crop_size=512": (
        "data.crop_size is 512, which is not accepted; give [a whole number above 0, a whole "
        "number above 0] (such as --data.crop_size '[512,512]', height and width) or null; see "
    ),
    "--data.crop_size=[a,b]": "data.crop_size is ['a', 'b'], which is not accepted; give [a whole ",
    "--trainer.precision=fp17": "trainer.precision is fp17, which is not accepted; give 64, 32, 16",
    "--trainer.max_steps=abc": "trainer.max_steps is abc, which is not accepted; give a whole numb",
    "--trainer.logger=NeptuneLogger": (
        "trainer.logger is NeptuneLogger, which is not accepted; give the import path of a Logger, "
    ),
    "--trainer.logger=[{class_path: x.y}]": "trainer.logger: x.y: No module named 'x'; see ",
    "--trainer.callbacks=Nope": "trainer.callbacks is Nope, which is not accepted; give a list, ",
    f"--trainer.callbacks={LIGHTNING}.callbacks.EarlyStopping": (
        f"trainer.callbacks: {LIGHTNING}.callbacks.EarlyStopping: the following arguments are requ"
    ),
    "--model.network=NotThere": "model.network is NotThere, which is not accepted; give the ",
    "--model.network=segformer_pl.models.segformer_b9": (
        "model.network: segformer_pl.models.segformer_b9: module 'segformer_pl.models' has no attri"
    ),
    "--model.network=torch.nn.Linear": (
        "model.network: Import path torch.nn.Linear does not correspond to a subclass of Segmenter"
    ),
    "--model.network.encoder=torch.nn.Identity": (
        "model.network.encoder: Import path torch.nn.Identity does not correspond to a subclass of "
    ),
    "--model.network.sr_ratio=[1]": (
        "model.network.sr_ratio: segformer_pl.models.SegFormer has no such argument; see "
    ),
    "--model.network.decoder_dim=x": (
        "model.network.decoder_dim is x, which is not accepted; give a whole number; see "
    ),
    "--model.loss=segformer_pl.losses.Dice2": (
        "model.loss: segformer_pl.losses.Dice2: module 'segformer_pl.losses' has no attribute 'Dic"
    ),
    "--model.inference.scales=x": "model.inference.scales is x, which is not accepted; give a list",
    "--config=nope.yaml": "config: File does not exist: ",
}
# Option -> message, of values that the trainer or a class of Lightning's refuses when it is built
BUILT = {
    "--trainer.accelerator=gpus": "trainer.accelerator is 'gpus', which does not exist; give auto,",
    "--trainer.strategy=dpp": "trainer: You selected an invalid strategy name: `strategy='dpp'`. ",
    "--trainer.strategy=fsdp": "trainer: The strategy `fsdp` requires a GPU accelerator, but ",
    "--trainer.devices=two": "trainer: `devices` selected with `CPUAccelerator` should be an int",
    "--trainer.profiler=nope": "trainer: When passing string value for the `profiler` parameter of",
    "--trainer.max_time=soon": "trainer: `Timer(duration='soon')` is not a valid duration. ",
    "--trainer.val_check_interval=0.5": "trainer: `val_check_interval` should be an integer or a ",
    "--trainer.limit_val_batches=-1": "trainer: You have passed invalid value -1 for limit_val_bat",
    "--trainer.gradient_clip_algorithm=x": "trainer: `gradient_clip_algorithm` x is invalid. ",
    # What an endless stream cannot honour
    "--trainer.limit_train_batches=0.5": "trainer.limit_train_batches is 0.5, but training reads a",
    "--trainer.overfit_batches=2": "trainer.overfit_batches is 2, but training reads a stream, ",
    "--trainer.max_epochs=2": "trainer.max_epochs is 2, but training reads a stream, which has no ",
    "--trainer.reload_dataloaders_every_n_epochs=1": "trainer.reload_dataloaders_every_n_epochs is",
    "--trainer.barebones=true": "trainer.barebones is true, but a run writes logs, checkpoints and",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches is 0; give a number of",
    # Classes
    "--trainer.callbacks={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{mode: x, monitor: y}}": f"{LIGHTNING}.callbacks.ModelCheckpoint: `mode` can be min, max but",
}
LOGGERS = {"TensorBoardLogger": "tensorboard", "CometLogger": "comet_ml", "MLFlowLogger": "mlflow"}


@pytest.fixture
def refused(capsys, folder, tmp_path, options, fail):
    """Function (options, command) -> message of a command, which leaves no file behind."""

    def call(*given, command="fit", without=()):
        before = set(tmp_path.rglob("*"))
        network, value, *arguments = options(folder, tmp_path / "runs")
        arguments = [f"{network}={value}", *arguments]
        # An option that is refused replaces that of the other settings.
        names = (*without, *(option.partition("=")[0] for option in given))
        kept = [o for o in arguments if o.partition("=")[0] not in names]
        error = fail(capsys, [command, *kept, *map(str, given)]).rstrip("\n")
        error = error[error.index("error: ") :]
        assert not any(word in error for word in JARGON), error
        assert set(tmp_path.rglob("*")) == before
        return error.removeprefix("error: ")

    return call


@pytest.mark.parametrize("option", PARSED)
def test_values_that_the_parser_refuses(refused, option):
    error = refused(option)
    assert error.startswith(PARSED[option])
    assert error.endswith("; see python -m segformer_pl fit --help") or ("EarlyStopping" in option)


@pytest.mark.parametrize("option", BUILT)
def test_values_that_lightning_refuses(refused, option):
    assert refused(option).startswith(BUILT[option])


def test_files_of_settings_are_refused_in_the_same_words(tmp_path):
    file = tmp_path / "settings.yaml"
    settings = {"model": {"network": TINY_SEGFORMER, "lr": "high"}}
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"^model\.lr is high, .*; give a number$"):
        resolve([str(file)])


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_command_without_a_network(capsys, command, fail):
    error = fail(capsys, [command, "--data.dataset", "camvid"])
    assert error.startswith(
        "error: model.network is not given; give the import path of a Segmenter (such as "
        "--model.network=segformer_b0); see "
    )


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_the_machine_lacks(refused, name):
    from lightning.pytorch.accelerators import AcceleratorRegistry

    kinds = ("cuda", "mps") if name == "gpu" else (name,)
    if any(AcceleratorRegistry[kind]["accelerator"].is_available() for kind in kinds):
        pytest.skip("this machine has one")
    error = refused(f"--trainer.accelerator={name}")
    assert error.startswith(f"trainer.accelerator is '{name}', but ")
    assert error.endswith("; give --trainer.accelerator=auto")


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_logger_whose_package_is_missing(refused, logger):
    if importlib.util.find_spec(LOGGERS[logger]) is not None:
        pytest.skip("its package is installed")
    error = refused(f"--trainer.logger={logger}", without=["--trainer.logger.save_dir"])
    assert error.startswith(f"{LIGHTNING}.loggers.{logger}: ")
    assert "pip install" in error


@pytest.mark.slow
def test_wandb_without_a_login_leaves_no_folder(folder, tmp_path, options, start_command):
    loggers = [
        {"class_path": f"{LIGHTNING}.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        {"class_path": f"{LIGHTNING}.loggers.WandbLogger"},
    ]
    arguments = [o for o in options(folder, "runs") if "logger" not in o]
    command = start_command(
        ["fit", *arguments, f"--trainer.logger={json.dumps(loggers)}"],
        folder=tmp_path,
        HOME=str(tmp_path),
        NETRC=str(tmp_path / "none"),
        WANDB_MODE="online",
        WANDB_API_KEY="",
    )
    assert command.wait() == 1
    assert command.output.splitlines()[-1].startswith(
        "error: Weights & Biases: No API key configured. Use `wandb login` to log in; check "
    )
    assert "Traceback" not in command.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_a_wandb_logger_alone_has_a_run_folder_with_everything(
    folder, tmp_path, options, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = [o for o in options(folder, "runs") if "logger" not in o]
    cli = main(["fit", *arguments, "--trainer.logger=WandbLogger"])
    run = tmp_path / "runs" / "shapes_SegFormer" / "version_0"
    assert {"config.yaml", "metrics.csv", "checkpoints", "evaluation"} <= {
        path.name for path in run.iterdir()
    }
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["RunLogger", "WandbLogger"]
    assert not (tmp_path / "config.yaml").exists()
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert saved[0]["class_path"] == f"{LIGHTNING}.loggers.CSVLogger"


def test_a_network_of_four_channels(refused):
    network = yaml.safe_load(TINY_OPTION)
    network["init_args"]["encoder"]["init_args"]["in_channels"] = 4
    given = [f"--model.network={json.dumps(network)}"]
    error = refused(*given)
    assert "the network takes 4 channels, but model.image_mean has 3 values" in error
    assert error.endswith("or for RGB images leave the network's in_channels out")
    error = refused(*given, *(f"--model.image_{m}=[0.5,0.5,0.5,0.5]" for m in ("mean", "std")))
    assert error == (
        "model.network takes images of 4 channels, but those of the data set are read as RGB, 3; "
        "leave in_channels out, or give --data.num_bands 4 for images that store four bands"
    )


@pytest.fixture(scope="module")
def weights_alone(folder, tmp_path_factory, options):
    """A checkpoint that Lightning has written with ``save_weights_only``, and one that resumes."""
    runs = tmp_path_factory.mktemp("runs")
    callback = {
        "class_path": f"{LIGHTNING}.callbacks.ModelCheckpoint",
        "init_args": {"filename": "w", "save_weights_only": True, "every_n_train_steps": 1},
    }
    arguments = options(folder, runs, trainer__max_steps=1, trainer__limit_val_batches=0)
    main(["fit", *arguments, f"--trainer.callbacks+={json.dumps(callback)}"])
    (folder,) = runs.glob("*/version_0/checkpoints")
    return folder / "w.ckpt", folder / "last.ckpt"


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_checkpoints_that_cannot_be_resumed(refused, weights_alone, tmp_path):
    alone, whole = weights_alone
    error = refused(f"--ckpt_path={alone}", "--trainer.max_steps=3")
    assert error == (
        f"ckpt_path: '{alone}' has no 'optimizer_states', so training cannot resume from it; give "
        "another checkpoint, or start a new run from its weights with --model.weights"
    )
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(alone, weights_only=True)["state_dict"], bare)
    assert "holds bare weights and is no checkpoint" in refused(f"--ckpt_path={bare}")
    spec = {"name": "mine", "image_column": "image", "label_column": "label"}
    data = tmp_path / "mine.yaml"
    data.write_text(yaml.safe_dump(spec | {"labels": {"names": ["a", "b", "c"]}}))
    error = refused(f"--ckpt_path={whole}", f"--data.dataset={data}")
    assert "was trained on other classes: it has 6 classes" in error
    assert "train from its weights with --model.encoder_weights" in error


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_the_shell_of_a_slurm_job_starts_one_process(folder, tmp_path, options, monkeypatch):
    """Lightning would take it for a task of `srun`, and wait for the others or refuse it."""
    for name, value in {"NTASKS": "4", "JOB_ID": "1", "JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    arguments = options(folder, tmp_path, trainer__max_steps=1, trainer__limit_val_batches=0)
    assert main(["fit", *arguments]).trainer.world_size == 1


def test_full_memory():
    def sentence(allocate):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        return explain(raised.value)

    for allocate in (lambda: torch.empty(1 << 60), lambda: np.empty(1 << 60, np.uint8)):
        text = sentence(allocate)
        assert text.startswith("the memory is full (")
        assert "--data.batch_size" in text
        assert "\n" not in text
    assert explain(RuntimeError("anything else")) is None


@pytest.mark.gpu
def test_full_memory_of_a_gpu():
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(1 << 50, device="cuda")
    text = explain(raised.value)
    assert text.startswith("the memory is full (CUDA out of memory")
    assert "\n" not in text
