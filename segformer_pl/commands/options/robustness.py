"""Options of ``robustness``, and the files that it writes."""

from jsonargparse import Namespace

from segformer_pl.commands.options.evaluation import add_evaluation_options
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser

NUM_EVALUATIONS = 73  # of all corruptions and severities (checked by a test)
SCORES_FILE, TABLE_FILE, JSON_FILE, FIGURE_FILE = (
    f"robustness.{kind}" for kind in ("csv", "md", "json", "png")
)


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``robustness``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} robustness",
        description="Measure the mIoU of a network on the validation images, clean and under 16 "
        "corruptions at the severities of the paper (Table 5, after ImageNet-C): "
        f"{NUM_EVALUATIONS} evaluations of the split in all. Writes {SCORES_FILE} (mIoU of each "
        f"evaluation), {TABLE_FILE} (the paper's table), {JSON_FILE} and {FIGURE_FILE}. Every "
        "finished evaluation is stored, so the same command continues after an interruption.",
    )
    add_evaluation_options(parser)
    return parser.parse_args(arguments)
