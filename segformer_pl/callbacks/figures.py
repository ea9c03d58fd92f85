"""Publication of the callbacks' figures: PNG files in the run folder, and loggers."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure

from segformer_pl.atomic import atomic_write
from segformer_pl.callbacks.media import send_figure

DPI = 110


def run_folder(trainer: Trainer) -> Path:
    """Return the run folder. It may be called on a single rank."""
    # trainer.log_dir would wait for the other ranks.
    log_dir = trainer.logger.log_dir if trainer.logger else None
    return Path(log_dir or trainer.default_root_dir)


def leaves_files(trainer: Trainer) -> bool:
    """Return whether the run writes files; ``fast_dev_run`` does not."""
    return not getattr(trainer, "fast_dev_run", False)


def publish(trainer: Trainer, draw: Callable[[], Figure], name: str, step: int) -> None:
    """Write ``<run folder>/<name>/step_<n>.png`` and log it as ``val/<name>``; on rank 0 only.

    If the figure cannot be drawn or written, there is a warning and the run continues.

    Args:
        trainer: Trainer of the run.
        draw: Function that returns the figure.
        name: Folder of the figure below the run folder.
        step: Number of training steps.
    """
    if not leaves_files(trainer):
        return
    file = run_folder(trainer) / name / f"step_{step:07d}.png"
    try:
        with atomic_write(file) as stream:
            draw().savefig(stream, format="png", dpi=DPI)
    except Exception as error:
        rank_zero_warn(f"no figure {file}: {type(error).__name__}: {error}; the run continues")
        return
    send_figure(trainer, run_folder(trainer), f"val/{name}", file, step)
