"""The command line, ``python -m segformer_pl COMMAND``.

``fit``, ``validate`` and ``test`` come from LightningCLI (training.py; run_folder.py,
named_checkpoint.py and resumption.py look after the files of earlier runs). ``doctor`` takes the
same settings and checks them (doctor.py), and ``ablate`` and ``arena`` run many of them (ablate.py,
arena.py, study_command.py). The other commands are in the package ``commands``.
"""

import importlib
import sys
from collections.abc import Callable

from segformer_pl.cli.doctor import doctor
from segformer_pl.cli.exits import exits
from segformer_pl.cli.training import SegformerCLI, resolve
from segformer_pl.commands import COMMANDS
from segformer_pl.commands.recipe import recipe
from segformer_pl.errors import UserError

__all__ = ["SegformerCLI", "main", "resolve"]

STUDY_COMMANDS = ("ablate", "arena")


def main(args: list[str] | None = None, run: bool = True) -> SegformerCLI | None:
    """Parse the arguments, build task, data and trainer, and run the command.

    Args:
        args: Command-line arguments. Default: those of the process.
        run: Whether ``args`` start with a command to run. With False, ``args`` are options of
            ``fit``; task, data and trainer are built and nothing is run:
            ``main([...], run=False).model``.

    Returns:
        The command line with its ``model``, ``datamodule`` and ``trainer``, for the commands of
        LightningCLI; None for the others.
    """
    arguments = sys.argv[1:] if args is None else args
    command, options = (arguments[0], arguments[1:]) if run and arguments else ("", [])
    with exits():
        if command in COMMANDS:
            COMMANDS[command](options)
        elif command == "doctor":
            doctor(options)
        elif command == "recipe":
            recipe(options, resolve)
        elif command in STUDY_COMMANDS:
            _find_study_command(command)(options)
        else:
            return SegformerCLI(args, run)
    return None


def _find_study_command(name: str) -> Callable[[list[str]], None]:
    """Return a command that runs a study, whose packages and locks the others do not need."""
    try:
        return getattr(importlib.import_module(f"segformer_pl.cli.{name}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("segformer_pl"):
            raise
        raise UserError(
            f"{name} needs the package {error.name}, which is not installed; install it with "
            "pip install 'segformer_pl[ablation]' (fcntl exists on Linux and macOS alone)"
        ) from error
