"""Where the callbacks' figures go: a PNG beside the run, and the loggers that take images."""

from pathlib import Path

from lightning.pytorch import Trainer
from matplotlib.figure import Figure

DPI = 110


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run, also where only one rank asks for it."""
    # Not trainer.log_dir, which waits for the other ranks.
    log_dir = trainer.logger.log_dir if trainer.logger else None
    return Path(log_dir or trainer.default_root_dir)


def publish(trainer: Trainer, figure: Figure, name: str) -> None:
    """Write ``<run folder>/<name>/step_<n>.png`` and log it as ``val/<name>``. Rank 0 only."""
    folder = run_folder(trainer) / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step_{trainer.global_step:07d}.png"
    figure.savefig(file, dpi=DPI)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B's, online and offline
            logger.log_image(key=f"val/{name}", images=[str(file)])
