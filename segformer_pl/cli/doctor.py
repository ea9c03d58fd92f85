"""``doctor``: what is wrong with a run, before its first step."""

import json
import sys
import warnings

from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.cli.training import SegformerCLI
from segformer_pl.doctor import examine


class DoctorCLI(SegformerCLI):
    """What a run would be made of, built but not run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="print findings and figures so")
        parser.set_defaults({"model.network": "segformer_pl.models.segformer_b0"})


def doctor(arguments: list[str]) -> None:
    """``doctor [CONFIG]``: what is wrong with a run, before its first step."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    with warnings.catch_warnings():
        # They are those of the command line, without the command.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        cli = DoctorCLI(arguments, run=False)
    examination = examine(cli.model, cli.datamodule, cli.trainer)
    in_json = cli.config["json"]
    text = json.dumps(examination.as_dict(), indent=2) if in_json else str(examination)
    sys.stdout.write(text + "\n")
    sys.exit(1 if examination.has_errors else 0)
