"""The command line, ``python -m segformer_pl COMMAND``.

``fit``, ``validate`` and ``test`` come from LightningCLI (training.py; run_folder.py,
named_checkpoint.py and resumption.py look after the files of earlier runs). ``doctor`` takes the
same settings and checks them (doctor.py), and ``ablate`` and ``arena`` run many of them (ablate.py,
arena.py, study_command.py). The other commands are in the package ``commands``.

What a command needs is imported once its arguments are parsed: torch and Lightning take seconds.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from segformer_pl.cli.exits import exits, plain_warnings
from segformer_pl.cli.help_texts import stored_help
from segformer_pl.commands.options.parser import PROG
from segformer_pl.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from segformer_pl.cli.training import SegformerCLI

__all__ = ["COMMANDS", "main"]

TRAINING_COMMANDS = {
    "fit": "train a network",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "doctor": "check the settings of a run before its first step",
}
STUDY_COMMANDS = {
    "ablate": "train the variants of a study, and report which differences are resolved",
    "arena": "train several systems alike, and compare them in every respect",
}
COMMANDS = {
    **TRAINING_COMMANDS,
    "predict": "segment images and videos",
    "app": "segment images and videos on a page in the browser",
    "compare": "test whether trained networks differ, and list seed statistics",
    **STUDY_COMMANDS,
    "recipe": "list the departures of a run from the paper's recipe",
    "robustness": "measure the mIoU on corrupted images",
    "test_time": "evaluate a checkpoint under settings that need no training",
    "erf": "measure the effective receptive fields of a network's layers",
    "profile": "count and time a network",
    "scaling": "predict the speed of a training on 1 to 1024 devices",
    "convert": "convert weights between layouts",
    "push": "upload the network of a run to the Hugging Face hub",
    "export": "write a network as a graph for other runtimes",
}


def main(args: list[str] | None = None, run: bool = True) -> "SegformerCLI | None":
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
    with exits(), plain_warnings():
        if run and command in ("", "-h", "--help"):
            _explain_commands(is_asked_for=bool(command))
        is_help = command in TRAINING_COMMANDS and options in (["-h"], ["--help"])
        if is_help and (text := stored_help(command)) is not None:
            sys.stdout.write(text)
            sys.exit(0)
        if command == "doctor":
            from segformer_pl.cli.doctor import doctor

            doctor(options)
        elif command in COMMANDS and command not in TRAINING_COMMANDS:
            _run_own_command(command, options)
        elif not run or command in TRAINING_COMMANDS or command.startswith("-"):
            from segformer_pl.cli.training import SegformerCLI

            return SegformerCLI(args, run)
        else:
            _refuse(
                f"there is no command {command!r}{did_you_mean(command, COMMANDS)}; give one of "
                f"{', '.join(COMMANDS)}"
            )
    return None


def _run_own_command(name: str, arguments: list[str]) -> None:
    options = importlib.import_module(f"segformer_pl.commands.options.{name}").parse(arguments)
    if name in STUDY_COMMANDS:
        _study_command(name).run(options)
    elif name == "recipe":
        from segformer_pl.cli.training import resolve
        from segformer_pl.commands import recipe

        recipe.run(options, resolve)
    else:
        importlib.import_module(f"segformer_pl.commands.{name}").run(options)


def _study_command(name: str) -> ModuleType:
    """Import a command that runs a study, whose packages and locks the others do not need."""
    try:
        return importlib.import_module(f"segformer_pl.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("segformer_pl"):
            raise
        raise UserError(
            f"{name} needs the package {error.name}, which is not installed; install it with "
            "pip install 'segformer_pl[ablation]' (fcntl exists on Linux and macOS alone)"
        ) from error


def _explain_commands(is_asked_for: bool) -> NoReturn:
    if not is_asked_for:
        _refuse(f"no command is given; give one of {', '.join(COMMANDS)}")
    lines = [
        f"usage: {PROG} COMMAND ...",
        "",
        "Train, evaluate and apply segmentation networks.",
        "",
        *(f"  {name:<12}{description}" for name, description in COMMANDS.items()),
        "",
        f"{PROG} COMMAND --help explains the options of a command.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(0)


def _refuse(sentence: str) -> NoReturn:
    sys.stderr.write(f"error: {sentence}; see {PROG} --help\n")
    sys.exit(2)
