"""Options of the commands that evaluate a checkpoint on its validation images."""

from jsonargparse.typing import NonNegativeInt, PositiveInt

from segformer_pl.commands.options.device import add_device_option
from segformer_pl.commands.options.parser import SegformerArgumentParser


def add_evaluation_options(parser: SegformerArgumentParser) -> None:
    """Add the options of a command that evaluates a checkpoint on its validation split."""
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run of `fit`")
    parser.add_argument("--output", required=True, help="folder that the files are written to")
    parser.add_argument(
        "--data.path",
        type=str,
        help="folder, hub name or URL pattern of the data set. Default: the path of the run",
    )
    parser.add_argument(
        "--num_images",
        type=PositiveInt,
        help="number of validation images, evenly spaced over the split. Default: all",
    )
    parser.add_argument(
        "--data.num_workers",
        type=NonNegativeInt,
        help="number of data-loader processes. Default: that of the run",
    )
    add_device_option(parser, "device of the network")
