"""Settings of ``fit`` and ``validate``, checked by building what these commands build."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer

from segformer_pl.cli.exits import explain
from segformer_pl.cli.trainer_settings import check_trainer
from segformer_pl.cli.training import check_bands, parse_files, parser, plain_settings
from segformer_pl.errors import UserError
from segformer_pl.models.forward_check import class_maps_of

# Arguments of the trainer that concern the machine on which it runs, or that would act on this
# process or on files.
ELSEWHERE: dict[str, Any] = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": None,
    "plugins": None,
    "logger": False,
    "profiler": None,
    "deterministic": None,
    "benchmark": None,
    "detect_anomaly": False,
    "sync_batchnorm": False,
    "enable_progress_bar": False,
}
NOISY = "lightning.pytorch.utilities.rank_zero"


def resolve_and_build(files: list[str], command: str = "fit") -> dict[str, Any]:
    """Return the complete settings of a command, after building all that it would build.

    Many values are checked where they are used: by the task, the network, the loss, the data
    module, the callbacks and the trainer, when they are built. So this builds them, on the CPU and
    without data, files or loggers, and then the optimiser of a ``fit``. A mistake that would end
    each of several runs is found before the first one.

    Args:
        files: Files to merge, in the order of ``--config`` options.
        command: ``fit``, ``validate`` or ``test``.

    Raises:
        UserError: The command would refuse a setting, or end in an error while it builds.
    """
    config = parse_files(files, command)
    settings = plain_settings(config, command)
    try:
        with _aside():
            _build(config, command)
    except Exception as error:  # any type: networks and callbacks may be the user's
        sentence = explain(error) or f"`{command}` ends with {type(error).__name__}: {error}"
        raise UserError(" ".join(sentence.split())) from error
    return settings


def _build(config: Namespace, command: str) -> None:
    check_trainer(config[command]["trainer"])
    for name, value in ELSEWHERE.items():
        config[command]["trainer"][name] = value
    built = parser(command).instantiate(config)[command]
    check_bands(built["model"].network, built["data"])
    environment = LightningEnvironment()  # and not that of a Slurm job in which this may run
    trainer = Trainer(**{**built["trainer"], "plugins": [environment]})
    if command == "fit":
        built["model"].trainer = built["data"].trainer = trainer
        trainer.datamodule = built["data"]  # type: ignore[attr-defined]
        built["model"].configure_optimizers()
        _try_forward(built, lambda: parser(command).instantiate(config)[command]["model"].network)


def _try_forward(built: Mapping[str, Any], build_again: Callable[[], Any]) -> None:
    """Run the network on one image of the size of training.

    Raises:
        UserError: It fails, or returns no class maps.
    """
    network, data = built["model"].network, built["data"]
    size = data.train_transforms.crop_size or data.entry.size
    if size is None or min(size) < network.min_size:  # the study refuses smaller ones
        return
    shape = (1, network.in_channels, *size)
    with torch.no_grad():
        try:
            # Shapes without values take a fraction of the time.
            class_maps_of(network.to("meta").eval(), torch.zeros(shape, device="meta"))
        except Exception:  # any type: the forward pass may need values
            class_maps_of(build_again().eval(), torch.zeros(shape))


@contextmanager
def _aside() -> Iterator[None]:
    """Keep the random numbers of this process, and what the trainer tells about its devices."""
    logger = logging.getLogger(NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
