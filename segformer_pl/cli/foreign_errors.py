"""Sentences for errors of Lightning, jsonargparse, torch and W&B that users meet.

``tests/cli/test_foreign_errors.py`` lists these errors and lets the libraries raise them. The
libraries are not imported here: an error of theirs comes from a command that has imported them.
"""

import re
import sys
from collections.abc import Iterator

from segformer_pl.commands.options.parse_errors import construction_reason
from segformer_pl.errors import UserError


def explain_foreign(error: Exception) -> str | None:
    """Return the message for a foreign error that the user can mend; None for any other."""
    for explain in (_explain_memory, _explain_wandb, _explain_construction, _explain_lightning):
        if (sentence := explain(error)) is not None:
            return sentence
    return None


def one_line(error: BaseException) -> str:
    """Return the text of an exception without its line breaks."""
    return " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain_memory(error: Exception) -> str | None:
    torch = sys.modules.get("torch")
    for cause in _causes(error):
        is_full = isinstance(cause, MemoryError) or "can't allocate memory: you tried" in str(cause)
        if is_full or (torch is not None and isinstance(cause, torch.OutOfMemoryError)):
            # torch's text goes on with advice about its allocator.
            reason = re.sub(r"^\[.*?\] \.?\s*", "", one_line(cause)).split(". ")[0][:200]
            return (
                f"the memory is full ({reason or type(cause).__name__}); use smaller batches or "
                "images, in a training --data.batch_size with --trainer.accumulate_grad_batches in "
                "return, or --data.crop_size"
            )
    return None


def _explain_wandb(error: Exception) -> str | None:
    if not type(error).__module__.startswith("wandb."):
        return None
    return (
        f"Weights & Biases: {one_line(error).rstrip('.')}; check the login and the network, or set "
        "WANDB_MODE=offline and upload the run later with `wandb sync`"
    )


def _explain_construction(error: Exception) -> str | None:
    """Explain a class of ``class_path`` whose package is missing, or that refuses its arguments.

    Only for classes of Lightning and for missing packages: the constructor of any other class is
    code of this package or of the user, whose errors keep their traceback.
    """
    if not isinstance(error, ValueError) or isinstance(error, UserError):
        return None
    path, reason = construction_reason(str(error))
    if path is None:
        return None
    missing = [cause for cause in _causes(error) if isinstance(cause, ImportError)]
    if path.startswith("lightning.") or missing:
        return f"{path}: {reason}"
    return None


def _explain_lightning(error: Exception) -> str | None:
    if "lightning" not in sys.modules:
        return None
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from segformer_pl.lightning_workarounds import came_from_restoring

    if isinstance(error, MisconfigurationException):  # Lightning's class of user errors
        return one_line(error)
    if came_from_restoring(error):
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return (
            f"the checkpoint cannot be restored ({reason[:200]}); give another, or "
            "start a new run from its weights with --model.weights"
        )
    return None
