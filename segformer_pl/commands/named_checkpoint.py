"""Which file ``--ckpt_path last``, ``best`` or ``hpc`` means."""

import re
from pathlib import Path
from typing import Any

from segformer_pl.analysis.configuration import changes
from segformer_pl.analysis.run import LAST_CHECKPOINT, Run
from segformer_pl.checkpoints.run_checkpoint import read_checkpoint
from segformer_pl.errors import UserError

NAMED = ("last", "best", "hpc")
# What makes two runs one experiment: what trains, on what, and how each step is made.
SAME_EXPERIMENT = (
    "seed_everything",
    "model.",
    "data.",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_",
    "trainer.limit_train_batches",
    "trainer.precision",
)
# Of them, what only tells how batches are read and how the network is scored.
FREE = ("model.inference.", "data.eval_batch_size", "data.num_workers", "data.on_bad_sample")
# All that matters to a command that only scores.
SCORED = ("model.network.", "data.dataset")


def named_checkpoint(name: str, config: Any, settings: dict[str, Any], is_fit: bool) -> Path:
    """The checkpoint of an earlier run with the same configuration.

    ``last``: the newest ``last.ckpt`` below the logger's folder and name, or the one in
    ``last_checkpoint.dirpath``. ``best``: the one that the best metric of that same run chose.
    ``hpc``: the newest that a requeued SLURM job left in ``trainer.default_root_dir``.

    Args:
        name: One of the three.
        config: The settings of the command, as parsed.
        settings: The same as plain data, as they are saved with a run.
        is_fit: Whether the command trains.

    Raises:
        UserError: There is none, and the sentence says where it was expected; or the newest run is
            another experiment.
    """
    if name == "hpc":
        return _hpc(Path(config.trainer.default_root_dir or "."))
    last = _last(name, config)
    _refuse_another_experiment(last, settings, is_fit)
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
            f"ckpt_path: {name!r} needs the last.ckpt of an earlier run, and there is no "
            f"{str(expected)!r}; give the checkpoint's path, or leave ckpt_path out to start anew"
        )
    return max(files, key=lambda file: file.stat().st_mtime_ns)


def _refuse_another_experiment(last: Path, here: dict[str, Any], is_fit: bool) -> None:
    """Runs of one folder are not always of one experiment: the folder's name has a default."""
    run = Run.of(last)
    if run is None:
        return
    try:
        there = run.config
    except UserError:  # nothing is known of it, so that nothing speaks against it
        return
    if not there:
        return
    compared = SAME_EXPERIMENT if is_fit else SCORED
    different = {
        key: values
        for key, values in changes(there, here).items()
        if f"{key}.".startswith(compared)
        and not f"{key}.".startswith(FREE)
        and not (key == "data.path" and _is_same_place(*values))
    }
    if different:
        told = ", ".join(
            f"{key.replace('.init_args', '').replace('.class_path', '')} is {now} here and "
            f"{then} there"
            for key, (then, now) in different.items()
        )
        raise UserError(
            f"ckpt_path: the newest run is that in {str(last.parent.parent)!r}, which is another "
            f"experiment: {told}; give the path of the checkpoint that is meant, such as {last}"
        )


def _is_same_place(then: Any, now: Any) -> bool:
    return None not in (then, now) and Path(str(then)).resolve() == Path(str(now)).resolve()


def _run_folders(trainer: Any) -> Path:
    """Where the first logger puts the folders of its runs."""
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
        found = f"those of {', '.join(sorted(best))}" if best else "none"
        raise UserError(
            f"ckpt_path: 'best' needs one ModelCheckpoint with a monitor in the run of "
            f"{str(last)!r}, which has {found}; give the checkpoint's path"
        )
    (file,) = best.values()
    # Beside the other if the run's folder was moved, or was given relative to another place.
    for candidate in (last.parent / file.name, file):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"ckpt_path: the best checkpoint of the run is {str(file)!r}, which is not there; give "
        "another"
    )


def _hpc(folder: Path) -> Path:
    numbered = {
        int(match[1]): file
        for file in folder.glob("hpc_ckpt_*.ckpt")
        if (match := re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", file.name))
    }
    if not numbered:
        raise UserError(
            f"ckpt_path: there is no {str(folder / 'hpc_ckpt_*.ckpt')!r}; give the checkpoint's "
            "path, or leave ckpt_path out to start anew"
        )
    return numbered[max(numbered)]
