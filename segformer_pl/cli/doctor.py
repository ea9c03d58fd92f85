"""``doctor [CONFIG]``: check the settings of a run before its first step."""

import json
import sys
import warnings

from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.cli.training import SegformerCLI
from segformer_pl.doctor import examine


class DoctorCLI(SegformerCLI):
    """Builds task, data and trainer of a run, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
        parser.set_defaults({"model.network": "segformer_pl.models.segformer_b0"})


def doctor(arguments: list[str]) -> None:
    """Run ``doctor [CONFIG]``: print what is wrong with a run, and exit with 1 if it is an error.

    Args:
        arguments: Command-line arguments after ``doctor``: options of ``fit``, which a YAML file
            can precede.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    with warnings.catch_warnings():
        # The arguments do come from the command line; only the command is removed.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        cli = DoctorCLI(arguments, run=False)
    examination = examine(cli.model, cli.datamodule, cli.trainer)
    in_json = cli.config["json"]
    text = json.dumps(examination.as_dict(), indent=2) if in_json else str(examination)
    sys.stdout.write(text + "\n")
    sys.exit(1 if examination.has_errors else 0)
