"""Where a run is kept: a folder of its own, or that of the run that it goes on with."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from segformer_pl.analysis.run import LAST_CHECKPOINT, Run
from segformer_pl.errors import UserError

CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
DEFAULT_LOGGER = {"class_path": CSV_LOGGER, "init_args": {"save_dir": "runs", "name": "unnamed"}}


class Continuation(NamedTuple):
    """Whether a run goes on in the folder of its checkpoint.

    Attributes:
        run_dir: That folder; None for a folder of its own.
        sentence: What the user should know.
    """

    run_dir: Path | None
    sentence: str


def place_below_root(trainer: Any) -> None:
    """Keep runs below ``trainer.default_root_dir``, if it is given.

    The default place of the logger counts as not given.

    Raises:
        UserError: The logger was given another place.
    """
    root, logger = trainer["default_root_dir"], trainer["logger"]
    first = logger[0] if isinstance(logger, list) and logger else logger
    if root is None or isinstance(first, bool | list | None):
        return
    place = first.get("init_args", {}).get("save_dir")
    if place == DEFAULT_LOGGER["init_args"]["save_dir"]:  # type: ignore[index]
        first["init_args"]["save_dir"] = str(root)
    elif place is not None and not Path(place).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(
            f"trainer.default_root_dir is {str(root)!r}, but the run would be kept in "
            f"{str(place)!r}, which trainer.logger.init_args.save_dir asks for; give one of them"
        )


def find_continuation(ckpt_path: str, step: int, logger: Any) -> Continuation:
    """Whether ``fit --ckpt_path`` goes on with the history of the run that the checkpoint is of.

    It does if the checkpoint is the newest of its run folder, and if no other place is named for
    the run than it had before.

    Args:
        ckpt_path: The checkpoint.
        step: Its training steps.
        logger: ``trainer.logger`` as plain data.
    """
    run = Run.of(ckpt_path)
    new = "this run has a folder and a history of its own"
    if run is None:
        return Continuation(None, f"{ckpt_path} does not lie in the folder of a run: {new}")
    try:
        config = run.configs[0]
    except UserError as error:
        return Continuation(None, f"{error}: {new}")
    before = (config.get("trainer") or {}).get("logger")
    first = logger[0] if isinstance(logger, list) and logger else logger
    is_csv = isinstance(first, dict) and first.get("class_path") == CSV_LOGGER
    if not is_csv or not (logger == before or _is_default(logger) or _folder(first) == run.folder):
        return Continuation(
            None, f"trainer.logger names another place than that of {run.folder}: {new}"
        )
    elsewhere = (config.get("last_checkpoint") or {}).get("dirpath")
    last = Path(elsewhere or run.checkpoint_folder) / LAST_CHECKPOINT
    last_step = _step_of(last)
    if last_step is None:
        return Continuation(None, f"{last} cannot be read, which may be of a later step: {new}")
    if last_step > step:
        return Continuation(
            None,
            f"{ckpt_path} is of step {step}, and its run has gone on to step {last_step}: {new}",
        )
    return Continuation(run.folder, f"the run in {run.folder} goes on from step {step}")


def refuse_used_folder(logger: Any) -> None:
    """Raise UserError if the logger names, as a version, a folder that holds a history."""
    first = logger[0] if isinstance(logger, list) and logger else logger
    folder = _folder(first) if isinstance(first, dict) else None
    if folder is not None and Run(folder).metrics_file.is_file():
        raise UserError(
            f"trainer.logger.init_args.version: {folder} holds the history of a run already; "
            "leave the version out, or go on with that run by --ckpt_path"
        )


def _is_default(logger: Any) -> bool:
    if not isinstance(logger, dict) or logger.get("class_path") != CSV_LOGGER:
        return False
    given = logger.get("init_args") or {}
    default: Any = DEFAULT_LOGGER["init_args"]
    return given.get("version") is None and default.items() <= given.items()


def _folder(logger: dict[str, Any]) -> Path | None:
    """The folder of a CSVLogger with a version."""
    given = logger.get("init_args") or {}
    version = given.get("version")
    if version is None or logger.get("class_path") != CSV_LOGGER:
        return None
    name = version if isinstance(version, str) else f"version_{version}"
    return Path(given.get("save_dir") or ".", given.get("name") or "", name).absolute()


def _step_of(checkpoint: Path) -> int | None:
    """Training steps of a checkpoint; -1 if there is none, None if it cannot be read."""
    if not checkpoint.exists():
        return -1
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"])
    except Exception:  # whatever torch makes of a broken file
        return None
