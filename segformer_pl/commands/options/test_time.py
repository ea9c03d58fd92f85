"""Options of ``test_time``, and the files that it writes."""

from jsonargparse import Namespace

from segformer_pl.commands.options.evaluation import add_evaluation_options
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser

RESULTS_FILE, TABLE_FILE, JSON_FILE, FIGURE_FILE = (
    f"test_time.{kind}" for kind in ("csv", "md", "json", "png")
)
COUNTS_FOLDER = "counts"  # per image, of each setting


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``test_time``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} test_time",
        description="Evaluate a trained network under settings that need no training, such as "
        "larger reduction ratios of its attention, merged queries, other image sizes or sliding "
        "windows: mIoU on the validation images with paired differences to the network as it was "
        "trained, the share of the pixels that keep their class, multiply-adds, and latency "
        "measured in turn in one process. Impossible settings are refused before anything runs. "
        f"Writes {RESULTS_FILE}, {TABLE_FILE}, {JSON_FILE}, {FIGURE_FILE}, and the counts per "
        f"image in {COUNTS_FOLDER}/SETTING.npz, which `compare` reads. Every finished evaluation "
        "is stored, so the same command continues after an interruption.",
    )
    parser.add_argument(
        "--settings",
        required=True,
        help="YAML file of named settings, such as experiments/ablations/test_time.yaml",
    )
    add_evaluation_options(parser)
    return parser.parse_args(arguments)
