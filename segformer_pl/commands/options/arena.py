"""Options of ``arena``."""

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from segformer_pl.commands.options.study import parse_study, study_parser

DESCRIPTION = (
    "Compare systems, which are the variants of a study: train each with every seed on the "
    "same data, budget and protocol as `ablate` does, measure robustness and receptive fields "
    "of every finished run, and write two reports: the study's into report_BUDGET, and one "
    "with costs, accuracy, robustness and receptive fields side by side into arena_BUDGET."
)
NUM_IMAGES = 20


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``arena``; see :func:`parse_study`."""
    parser = study_parser("arena", DESCRIPTION)
    parser.add_argument(
        "--num_images",
        type=PositiveInt,
        default=NUM_IMAGES,
        help="number of validation images, evenly spaced over the split, on which robustness and "
        "receptive fields are measured",
    )
    return parse_study(parser, arguments)
