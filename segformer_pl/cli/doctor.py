"""``doctor [CONFIG]``: check the settings of a run before its first step."""

import json
import sys
import warnings
from typing import ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.cli.training import SegformerCLI
from segformer_pl.commands.options.parser import PROG
from segformer_pl.doctor import Examination, examine


class DoctorCLI(SegformerCLI):
    """Builds task, data and trainer of a run, and runs nothing.

    Attributes:
        lacks_normalization: Whether images have four bands, and mean and standard deviation are not
            given for as many. Images then stay in 0 to 1.
    """

    lacks_normalization = False
    parser_texts: ClassVar = {
        "prog": f"{PROG} doctor",
        "usage": "%(prog)s [CONFIG] [--SECTION.OPTION VALUE ...] [--json]",
        "description": "Check the settings of a run and its data before the first step: files, "
        "labels, classes, sizes, throughput, memory and recipe, with a remedy for each problem. "
        "CONFIG is a YAML file of settings, and the options are those of `fit`. The exit status is "
        "1 if training would fail or be meaningless.",
    }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
        parser.set_defaults({"model.network": "segformer_pl.models.segformer_b0"})

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        model, num_bands = self.config.model, self.config.data.num_bands
        if num_bands == 4 and {len(model.image_mean), len(model.image_std)} != {4}:
            self.lacks_normalization = True
            model.image_mean, model.image_std = [0.0] * num_bands, [1.0] * num_bands


def _examine_normalization(examination: Examination, num_bands: int) -> None:
    """Add the error that the images are not normalised, with what to give."""
    remedy = "give one value of each for every band"
    if train := examination.facts.get("train"):
        remedy = "give those of the training images, " + " ".join(
            f"--model.image_{name}=[{','.join(map(str, values))}]"
            for name, values in (
                ("mean", train["mean of each band"]),
                # A band that is constant is divided by 1.
                ("std", [std or 1.0 for std in train["standard deviation of each band"]]),
            )
        )
    examination.error(
        "normalisation",
        f"model.image_mean and model.image_std are not those of {num_bands} bands; {remedy}",
    )


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
    if cli.lacks_normalization:
        _examine_normalization(examination, cli.datamodule.num_bands)
    in_json = cli.config["json"]
    text = json.dumps(examination.as_dict(), indent=2) if in_json else str(examination)
    sys.stdout.write(text + "\n")
    sys.exit(1 if examination.has_errors else 0)
