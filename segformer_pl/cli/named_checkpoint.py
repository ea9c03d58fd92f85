"""The file that ``--ckpt_path last`` or ``best`` stands for."""

from pathlib import Path
from typing import Any

from segformer_pl.analysis.configuration import changes
from segformer_pl.analysis.run import LAST_CHECKPOINT, Run
from segformer_pl.checkpoints.run_checkpoint import read_checkpoint
from segformer_pl.errors import UserError

NAMED = ("last", "best")
# Settings that must agree for two runs to be one experiment: the network, its training and data.
SAME_EXPERIMENT = (
    "seed_everything",
    "model.",
    "data.",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_",
    "trainer.limit_train_batches",
    "trainer.precision",
)
# Those of them that only affect how batches are read and how the network is evaluated.
FREE = ("model.inference.", "data.eval_batch_size", "data.num_workers", "data.on_bad_sample")
# Those of them that change with the number of devices.
DIVISION = ("data.batch_size", "trainer.accumulate_grad_batches")
# Settings that must agree for a command that only evaluates.
EVALUATED = ("model.network.", "data.dataset")


def named_checkpoint(name: str, config: Any, settings: dict[str, Any], is_fit: bool) -> Path:
    """Return the checkpoint of an earlier run with the same configuration.

    =========  ===================================================================================
    ``last``   The newest ``last.ckpt`` below the logger's folder and name, or the one in
               ``last_checkpoint.dirpath``.
    ``best``   The checkpoint with the best monitored metric of that same run.
    =========  ===================================================================================

    Args:
        name: One of the two names.
        config: Settings of the command, as parsed.
        settings: Settings of the command as plain data, in the form that a run folder stores.
        is_fit: Whether the command trains.

    Raises:
        UserError: There is no such checkpoint, or the newest run is another experiment.
    """
    last = _last(name, config)
    compared = SAME_EXPERIMENT if is_fit else EVALUATED
    remedy = f"give the path of the checkpoint that is meant, such as {last}"
    _refuse_another_experiment(last, "ckpt_path: the newest run", settings, compared, FREE, remedy)
    return last if name == "last" else _best(last)


def _last(name: str, config: Any) -> Path:
    last_checkpoint = config.get("last_checkpoint")
    if last_checkpoint is not None and last_checkpoint.dirpath is not None:
        folder = Path(last_checkpoint.dirpath)
        expected = folder / LAST_CHECKPOINT
        files = [expected]
    else:
        folder = _run_folders(config.trainer)
        expected = Run(folder / "*").last_checkpoint
        files = [Run(run_dir).last_checkpoint for run_dir in folder.glob("*")]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(
            f"ckpt_path: {name!r} needs the last.ckpt of an earlier run, but there is no "
            f"{str(expected)!r}; give the checkpoint's path, or leave ckpt_path out to train from "
            "the start"
        )
    return max(files, key=lambda file: file.stat().st_mtime_ns)


def own_checkpoint(run_dir: Path, config: Any, settings: dict[str, Any]) -> Path | None:
    """Return the last checkpoint of the run that ``fit --run_name`` names; None if there is none.

    Args:
        run_dir: Run folder.
        config: Settings of the command, as parsed.
        settings: Settings of the command as plain data, in the form that a run folder stores.

    Raises:
        UserError: The run is another experiment.
    """
    last_checkpoint = config.get("last_checkpoint")
    dirpath = None if last_checkpoint is None else last_checkpoint.dirpath
    last = Run(run_dir).last_checkpoint if dirpath is None else Path(dirpath) / LAST_CHECKPOINT
    if not last.is_file():
        return None
    # The run may have been given other devices than at its start.
    free = (*FREE, *DIVISION)
    remedy = "give another --run_name, or the settings of that run"
    _refuse_another_experiment(
        last, "run_name: the run of this name", settings, SAME_EXPERIMENT, free, remedy
    )
    return last


def _refuse_another_experiment(
    last: Path,
    name: str,
    here: dict[str, Any],
    compared: tuple[str, ...],
    free: tuple[str, ...],
    remedy: str,
) -> None:
    """Raise UserError if the run of a checkpoint has other settings than the command.

    The logger's name has a default, so runs of different experiments can share a folder.

    Args:
        last: Last checkpoint of the run.
        name: Option that gave the run, and what the run is called, for the message.
        here: Settings of the command.
        compared: Beginnings of the settings that must agree.
        free: Beginnings of those that need not.
        remedy: What to do, for the message.
    """
    run = Run.of(last)
    if run is None:
        return
    try:
        there = run.config
    except UserError:  # an unreadable configuration cannot be compared
        return
    if not there:
        return
    different = {
        key: values
        for key, values in changes(there, here).items()
        if f"{key}.".startswith(compared)
        and not f"{key}.".startswith(free)
        and not (key == "data.path" and _is_same_path(*values))
    }
    if different:
        differences = ", ".join(
            f"{key.replace('.init_args', '').replace('.class_path', '')} is {now} here and "
            f"{then} there"
            for key, (then, now) in different.items()
        )
        raise UserError(
            f"{name}, {str(last.parent.parent)!r}, is another experiment: {differences}; {remedy}"
        )


def _is_same_path(then: Any, now: Any) -> bool:
    return None not in (then, now) and Path(str(then)).resolve() == Path(str(now)).resolve()


def _run_folders(trainer: Any) -> Path:
    """Return the folder in which the first logger creates its run folders."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    settings = loggers[0].get("init_args", {}) if hasattr(loggers[0], "get") else {}
    folder = settings.get("save_dir") or settings.get("dir") or trainer.default_root_dir or "."
    name = settings.get("project") or settings.get("name") or "lightning_logs"
    return Path(folder) / str(name)


def _best(last: Path) -> Path:
    states = read_checkpoint(last, "ckpt_path").get("callbacks", {}).values()
    best = {
        state["monitor"]: Path(state["best_model_path"])
        for state in states
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path")
    }
    if len(best) != 1:
        monitors = f"those of {', '.join(sorted(best))}" if best else "none"
        raise UserError(
            f"ckpt_path: 'best' needs one ModelCheckpoint with a monitor in the run of "
            f"{str(last)!r}, which has {monitors}; give the checkpoint's path"
        )
    (file,) = best.values()
    # The stored path is wrong if the run folder was moved, or is relative to another working
    # directory. So try the folder of last.ckpt first.
    for candidate in (last.parent / file.name, file):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"ckpt_path: the best checkpoint of the run, {str(file)!r}, does not exist; give another"
    )
