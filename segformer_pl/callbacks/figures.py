"""Where the callbacks' figures go: a PNG beside the run, and the loggers that take images."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure

from segformer_pl.atomic import atomic_write

DPI = 110


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run, also where only one rank asks for it."""
    # Not trainer.log_dir, which waits for the other ranks.
    log_dir = trainer.logger.log_dir if trainer.logger else None
    return Path(log_dir or trainer.default_root_dir)


def leaves_files(trainer: Trainer) -> bool:
    """Whether the run leaves anything behind; a trial run does not."""
    return not getattr(trainer, "fast_dev_run", False)


def publish(trainer: Trainer, draw: Callable[[], Figure], name: str, step: int) -> None:
    """Write ``<run folder>/<name>/step_<n>.png`` and log it as ``val/<name>``. Rank 0 only.

    A figure never ends a run: if it cannot be drawn or written, there is a warning in its place.
    """
    if not leaves_files(trainer):
        return
    file = run_folder(trainer) / name / f"step_{step:07d}.png"
    try:
        with atomic_write(file) as stream:
            draw().savefig(stream, format="png", dpi=DPI)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # W&B's, online and offline
                logger.log_image(key=f"val/{name}", images=[str(file)])
    except Exception as error:
        rank_zero_warn(f"no figure {file}: {type(error).__name__}: {error}; the run goes on")
