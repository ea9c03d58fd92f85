"""The network and the data of a run, from its checkpoint."""

import os
from pathlib import Path
from typing import Any

from segformer_pl.checkpoints import WeightsError, load_file
from segformer_pl.checkpoints.facts import class_difference
from segformer_pl.checkpoints.training_state import check_content, check_tensors
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.task import SegmentationTask


def load_task(ckpt: str | Path) -> SegmentationTask:
    """The task of a run of the command line, in evaluation mode, on the CPU.

    Raises:
        ValueError: there is no such file, it is no checkpoint, not one of a run of the command
            line, damaged, or from a training that diverged; one sentence says which.
    """
    checkpoint = _read(ckpt)
    try:
        task = SegmentationTask.load_from_checkpoint(
            ckpt, map_location="cpu", weights_only=True, strict=False
        )
    except WeightsError as error:
        raise ValueError(f"--ckpt: {str(ckpt)!r}: {error}") from error
    except Exception as error:  # of its hyperparameters, from whatever they are given to
        raise ValueError(
            f"--ckpt: {str(ckpt)!r} describes a task that cannot be built here ({_brief(error)}); "
            "give a checkpoint of this version's `fit`"
        ) from error
    check_tensors(checkpoint["state_dict"], task.state_dict(), f"--ckpt: {str(ckpt)!r}")
    return task.eval()


def load_data(ckpt: str | Path, **changes: Any) -> StreamingSegmentationData:
    """The data that the run was trained on.

    Args:
        ckpt: The checkpoint.
        changes: Arguments of :class:`~segformer_pl.data.StreamingSegmentationData` to use instead
            of the run's; None keeps the run's.

    Raises:
        ValueError: see :func:`load_task`; or the data set's classes are others than those that
            the run was trained on.
        DataError: its labels mean something else than they did then, or are not there.
    """
    checkpoint = _read(ckpt)
    given = {key: value for key, value in changes.items() if value is not None}
    settings = checkpoint["datamodule_hyper_parameters"] | given
    settings.pop("_instantiator", None)
    try:
        data = StreamingSegmentationData(**settings)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"--ckpt: {str(ckpt)!r} describes data that cannot be opened here ({_brief(error)}); "
            "give a checkpoint of this version's `fit`"
        ) from error
    if "dataset" not in given:
        trained = checkpoint["hyper_parameters"].get("class_names", data.entry.labels.names)
        if difference := class_difference(trained, data.entry.labels.names):
            raise ValueError(
                f"--ckpt: {str(ckpt)!r} was trained on other classes than data set "
                f"{settings['dataset']!r} has now: {difference}; restore its description"
            )
        data.check_labels(checkpoint.get(type(data).__name__, {}))
    return data


def read_checkpoint(ckpt: str | Path, option: str) -> dict[str, Any]:
    """What a checkpoint of a run holds, on the CPU, as it was written.

    Raises:
        ValueError: there is no such file, it is damaged, or no checkpoint, or holds nan; the
            sentence names the option that it was given by.
    """
    try:
        os.stat(ckpt)  # not that of Path, for which '' is the current folder
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{option}: there is no file {str(ckpt)!r}; give a run's checkpoint"
        ) from error
    except (OSError, ValueError):
        pass  # load_file says why
    try:
        return check_content(load_file(Path(ckpt)), f"'{ckpt}'")
    except WeightsError as error:
        raise ValueError(f"{option}: {error}") from error


def _read(ckpt: str | Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(ckpt, "--ckpt")
    described = checkpoint.keys() >= {"hyper_parameters", "datamodule_hyper_parameters"}
    if not described or "network" not in checkpoint["hyper_parameters"]:
        raise ValueError(
            f"--ckpt: {str(ckpt)!r} does not describe its network and data, as checkpoints of "
            "`python -m segformer_pl fit` do; give one of those"
        )
    return checkpoint


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
