"""Stored ``--help`` of the commands whose options follow from the trainer, the task and the data.

To build their parsers, torch and lightning are imported, which takes ten seconds of CPU time. So
their help is stored in ``help/``, together with the versions that it depends on; with others it is
built anew. A test compares the files with the parsers. After a change, write them again::

    python -c 'from segformer_pl.cli.help_texts import store_help; store_help()'
"""

import io
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).with_name("help")
PACKAGES = ("lightning", "jsonargparse")
COLUMNS = "80"


def stored_help(command: str) -> str | None:
    """Return the help of a training command; None if it was stored with other versions."""
    header, _, text = (FOLDER / f"{command}.txt").read_text().partition("\n")
    return text if header == _versions() else None


def build_help(command: str) -> str:
    """Return the help that the parser of a training command prints in a narrow terminal."""
    from unittest import mock

    from segformer_pl.cli.doctor import doctor
    from segformer_pl.cli.training import SegformerCLI

    output = io.StringIO()
    with (
        mock.patch.dict("os.environ", COLUMNS=COLUMNS),
        redirect_stdout(output),
        suppress(SystemExit),
    ):
        if command == "doctor":
            doctor(["--help"])
        else:
            SegformerCLI([command, "--help"])
    return output.getvalue()


def store_help(commands: Iterable[str] = ("fit", "validate", "test", "doctor")) -> None:
    """Write the help of the training commands."""
    for command in commands:
        (FOLDER / f"{command}.txt").write_text(f"{_versions()}\n{build_help(command)}")


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)
