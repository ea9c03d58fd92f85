"""The run folder of a training: a new one, or that of the run that is resumed."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

from segformer_pl.analysis.run import LAST_CHECKPOINT, Run
from segformer_pl.errors import UserError

CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
# Without a name, runs are named after their data set and network, see place_run.
DEFAULT_LOGGER = {"class_path": CSV_LOGGER, "init_args": {"save_dir": "runs", "name": None}}


class Continuation(NamedTuple):
    """The folder in which a resumed run continues.

    Attributes:
        run_dir: Run folder of the checkpoint; None for a new folder.
        sentence: Message for the user: the folder, and the reason if it is a new one.
    """

    run_dir: Path | None
    sentence: str


def place_run(trainer: Any, default_name: str) -> bool:
    """Make the first logger a CSVLogger, whose folder is the run folder, and give it a name.

    Configuration, checkpoints, evaluations and report are in the run folder, whatever other loggers
    there are. ``trainer.logger=false`` is left as it is.

    Args:
        trainer: Settings of the trainer, changed in place.
        default_name: Name of a run whose logger has none.

    Returns:
        Whether the settings do not say where the run is, so that it has the default folder.

    Raises:
        UserError: The logger's ``save_dir`` lies outside of ``trainer.default_root_dir``.
    """
    logger = trainer["logger"]
    if logger is False:
        return False
    loggers = logger if isinstance(logger, list) else [logger]
    loggers = [logger for logger in loggers if not isinstance(logger, bool | None)]
    first = [logger for logger in loggers if logger.get("class_path") == CSV_LOGGER][:1]
    if not first:
        save_dir = loggers[0].get("init_args", {}).get("save_dir") if loggers else None
        first = [Namespace(class_path=CSV_LOGGER, init_args=Namespace(DEFAULT_LOGGER["init_args"]))]
        if save_dir not in (None, "."):
            first[0]["init_args"]["save_dir"] = str(save_dir)
    others = [logger for logger in loggers if logger is not first[0]]
    trainer["logger"] = [*first, *others] if others else first[0]
    arguments = first[0]["init_args"]
    default = {**DEFAULT_LOGGER["init_args"], "version": None}  # type: ignore[dict-item]
    is_default = all(arguments.get(key) == value for key, value in default.items())
    if not arguments.get("name"):
        arguments["name"] = default_name
    _place_below_root(trainer)
    return is_default and trainer["default_root_dir"] is None


def _place_below_root(trainer: Any) -> None:
    """Set the logger's ``save_dir`` to ``trainer.default_root_dir``, if that is given.

    A ``save_dir`` that equals the default counts as not given.

    Args:
        trainer: Settings of the trainer, changed in place.

    Raises:
        UserError: The logger's ``save_dir`` lies outside of ``trainer.default_root_dir``.
    """
    root, logger = trainer["default_root_dir"], trainer["logger"]
    first = logger[0] if isinstance(logger, list) and logger else logger
    if root is None:
        return
    save_dir = first.get("init_args", {}).get("save_dir")
    if save_dir == DEFAULT_LOGGER["init_args"]["save_dir"]:  # type: ignore[index]
        first["init_args"]["save_dir"] = str(root)
    elif save_dir is not None and not Path(save_dir).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(
            f"trainer.default_root_dir is {str(root)!r}, but trainer.logger.init_args.save_dir is "
            f"{str(save_dir)!r}, which is outside of it; give one of them"
        )


def named_folder(name: str, logger: Any) -> Path:
    """Return the run folder of ``fit --run_name NAME``: ``NAME`` below the first logger's folder.

    Args:
        name: Name of the run.
        logger: Value of ``trainer.logger`` as plain data.

    Raises:
        UserError: The first logger is no CSVLogger or has a version, or the name is no file name.
    """
    first = logger[0] if isinstance(logger, list) and logger else logger
    if not isinstance(first, dict) or first.get("class_path") != CSV_LOGGER:
        raise UserError(
            f"run_name: {name!r} is a folder of the first logger, but that is no CSVLogger; use one"
        )
    arguments = first.get("init_args") or {}
    if arguments.get("version") is not None:
        raise UserError(
            f"run_name: the run is called {name!r} here and {arguments['version']!r} in "
            "trainer.logger.init_args.version; give one of them"
        )
    if name in ("", "..") or Path(name).name != name:  # Path(".").name is empty
        raise UserError(f"run_name: {name!r} is no name of a folder; give one without slashes")
    return Path(arguments.get("save_dir") or ".", arguments.get("name") or "", name)


def find_continuation(
    ckpt_path: str,
    step: int,
    logger: Any,
    damaged: Path | None = None,
    is_default: bool = False,
) -> Continuation:
    """Decide whether ``fit --ckpt_path`` continues the run folder of the checkpoint.

    It does if the checkpoint is the newest of its run folder and the logger's folder is unchanged.
    Otherwise the run gets a new folder, since rows of later steps or another run's files would be
    mixed with its own.

    Args:
        ckpt_path: File of the checkpoint.
        step: Number of training steps in the checkpoint.
        logger: Value of ``trainer.logger`` as plain data.
        damaged: Damaged file that ``ckpt_path`` replaces.
        is_default: Whether ``logger`` has been given no folder, see :func:`place_run`.
    """
    run = Run.of(ckpt_path)
    new = "this run gets a folder and a history of its own"
    if run is None:
        return Continuation(None, f"{ckpt_path} is not in a run folder: {new}")
    try:
        config = run.configs[0]
    except UserError as error:
        return Continuation(None, f"{error}: {new}")
    before = (config.get("trainer") or {}).get("logger")
    first = logger[0] if isinstance(logger, list) and logger else logger
    is_csv = isinstance(first, dict) and first.get("class_path") == CSV_LOGGER
    if not is_csv or not (logger == before or is_default or _folder(first) == run.folder):
        return Continuation(None, f"trainer.logger names another folder than {run.folder}: {new}")
    elsewhere = (config.get("last_checkpoint") or {}).get("dirpath")
    last = Path(elsewhere or run.checkpoint_folder).absolute() / LAST_CHECKPOINT
    last_step = step if last == damaged else _step_of(last)
    if last_step is None:
        return Continuation(None, f"{last} cannot be read and may be of a later step: {new}")
    if last_step > step:
        return Continuation(
            None,
            f"{ckpt_path} is of step {step}, but its run has continued to step {last_step}: {new}",
        )
    return Continuation(run.folder, f"the run in {run.folder} continues from step {step}")


def refuse_used_folder(logger: Any) -> None:
    """Raise UserError if the logger's version is a folder with the history of another run."""
    first = logger[0] if isinstance(logger, list) and logger else logger
    folder = _folder(first) if isinstance(first, dict) else None
    if folder is not None and Run(folder).metrics_file.is_file():
        raise UserError(
            f"trainer.logger.init_args.version: {folder} already holds the history of a run; leave "
            "the version out, or resume that run with --ckpt_path"
        )


def _folder(logger: dict[str, Any]) -> Path | None:
    """Return the run folder of a CSVLogger that has a version; None for other loggers."""
    arguments = logger.get("init_args") or {}
    version = arguments.get("version")
    if version is None or logger.get("class_path") != CSV_LOGGER:
        return None
    name = version if isinstance(version, str) else f"version_{version}"
    return Path(arguments.get("save_dir") or ".", arguments.get("name") or "", name).absolute()


def _step_of(checkpoint: Path) -> int | None:
    """Return the training steps of a checkpoint; -1 if the file is missing, None if unreadable."""
    if not checkpoint.exists():
        return -1
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"])
    except Exception:  # torch raises various exceptions for a damaged file
        return None
