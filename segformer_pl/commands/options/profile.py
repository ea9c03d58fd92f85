"""Options of ``profile``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.device import add_device_option
from segformer_pl.commands.options.networks import add_network_argument, parse_with_network
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``profile``; see :func:`parse_with_network`."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} profile",
        description="Count the parameters, multiply-adds (as executed, and as the network's paper "
        "counts them) and activation memory of a network, in total and by part, and measure its "
        "latency. Arguments of the network follow MODEL as options, such as --sr_ratios [4,4,2,1]; "
        "profile MODEL --help lists them.",
    )
    add_network_argument(parser, "network to profile")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[512, 512],
        metavar=("H", "W"),
        help="height and width of the image in pixels",
    )
    parser.add_argument(
        "--num_classes",
        type=int,
        default=150,
        help="number of classes (150 in the paper's tables, for ADE20K)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_device_option(parser, "device on which latency is measured; all else is counted")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="data type of weights and image when latency is measured",
    )
    return parse_with_network(parser, arguments)
