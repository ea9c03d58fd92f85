"""Options of ``compare``."""

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``compare``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} compare",
        description="Compare the mIoU of trained networks. Two runs: test whether the networks "
        "differ by more than the choice of images explains, in mIoU and in the IoU of each class "
        "(95 % confidence intervals by a paired bootstrap, p by a paired permutation test). More "
        "runs: list the mIoU of each, grouped by configuration, with mean and standard deviation "
        "over training seeds. The input is the counts per image that every validation writes to "
        "its run folder, so all runs must have been validated on the same images. One run of each "
        "configuration gives no estimate of the spread between training seeds.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="two or more runs, each a run folder (its last evaluation is compared) or one .npz "
        "file of its evaluation folder; runs whose config.yaml differs only in seed, paths, "
        "loggers, checkpoints or the number of workers count as one configuration",
    )
    parser.add_argument(
        "--block_size",
        type=PositiveInt,
        default=1,
        help="number of consecutive images, in stored order, that are resampled together. "
        "Neighbouring images of a video resemble each other; treating them as independent makes "
        "intervals too narrow and p too small. For a video, give the number of images over which "
        "they resemble each other",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON, with values as fractions, instead of a table in percent",
    )
    return parser.parse_args(arguments)
