"""The command line, ``python -m segformer_pl COMMAND``.

``fit``, ``validate`` and ``test`` are LightningCLI's (training.py), ``doctor`` builds what they
would run (doctor.py), the other commands are in the package ``commands``.
"""

import sys

from segformer_pl.cli.doctor import doctor
from segformer_pl.cli.exits import exits
from segformer_pl.cli.training import SegformerCLI, resolve
from segformer_pl.commands import COMMANDS
from segformer_pl.commands.recipe import recipe

__all__ = ["SegformerCLI", "main", "resolve"]


def main(args: list[str] | None = None, run: bool = True) -> SegformerCLI | None:
    """Parse the arguments, build task, data and trainer, and run the command.

    Args:
        args: Command-line arguments; default those of the process.
        run: Whether ``args`` start with a command to run. With False they are the options of a
            run, and what was built is returned with nothing run: ``main([...], run=False).model``.
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
        else:
            return SegformerCLI(args, run)
    return None
