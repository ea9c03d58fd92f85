"""Runs at Weights & Biases: their login, and the continuation of a resumed run."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from segformer_pl.analysis.run import Run


def continue_wandb(loggers: Any, run: Run) -> None:
    """Give a WandbLogger without an id that of a run's, in settings of ``trainer.logger``.

    Args:
        loggers: Settings of a logger or of several, changed in place.
        run: The run that is continued.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if hasattr(logger, "get") and logger.get("class_path", "").endswith(".WandbLogger"):
            arguments = logger["init_args"]
            if not arguments.get("id") and not arguments.get("version"):
                arguments["id"] = run.wandb_id


@rank_zero_only
def log_in_to_wandb(loggers: Any) -> None:
    """Log in to W&B if a logger uploads to it.

    ``wandb.init`` does so too, but after the run folder has been made. In a terminal, W&B asks for
    its key here.

    Args:
        loggers: A logger, a sequence of loggers, a bool, or None.

    Raises:
        wandb.errors.Error: There is no login. The command line prints it as one sentence.
    """
    loggers = loggers if isinstance(loggers, Sequence) else [loggers]
    if not any(isinstance(logger, WandbLogger) and not logger._offline for logger in loggers):
        return
    import wandb

    if wandb.setup().settings.mode == "online":
        wandb.login()
