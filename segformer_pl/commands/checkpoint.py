"""The network and the data of a run, from its checkpoint."""

from pathlib import Path
from typing import Any

import torch

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.task import SegmentationTask


def load_task(ckpt: str | Path) -> SegmentationTask:
    """The task of a run of the command line, in evaluation mode, on the CPU.

    Raises:
        ValueError: there is no such file, it is no checkpoint, or not one of a run of the command
            line; one sentence says which.
    """
    _read(ckpt)
    return SegmentationTask.load_from_checkpoint(ckpt, map_location="cpu", weights_only=True).eval()


def load_data(ckpt: str | Path, **changes: Any) -> StreamingSegmentationData:
    """The data that the run was trained on.

    Args:
        ckpt: The checkpoint.
        changes: Arguments of :class:`~segformer_pl.data.StreamingSegmentationData` to use instead
            of the run's; None keeps the run's.

    Raises:
        ValueError: see :func:`load_task`.
    """
    checkpoint = _read(ckpt)
    given = {key: value for key, value in changes.items() if value is not None}
    settings = checkpoint["datamodule_hyper_parameters"] | given
    settings.pop("_instantiator", None)
    return StreamingSegmentationData(**settings)


def read_checkpoint(ckpt: str | Path, option: str) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU.

    Raises:
        ValueError: there is no such file, or it is no checkpoint; the sentence names the option
            that it was given by.
    """
    if not Path(ckpt).is_file():
        raise ValueError(f"{option}: there is no file {str(ckpt)!r}; give a run's checkpoint")
    try:
        checkpoint: dict[str, Any] = torch.load(ckpt, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"{option}: {str(ckpt)!r} is no checkpoint, or is cut short "
            f"({type(error).__name__}); give another"
        ) from error
    return checkpoint


def _read(ckpt: str | Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(ckpt, "--ckpt")
    described = checkpoint.keys() >= {"hyper_parameters", "datamodule_hyper_parameters"}
    if not described or "network" not in checkpoint["hyper_parameters"]:
        raise ValueError(
            f"--ckpt: {str(ckpt)!r} does not describe its network and data, as checkpoints of "
            "`python -m segformer_pl fit` do; give one of those"
        )
    return checkpoint
