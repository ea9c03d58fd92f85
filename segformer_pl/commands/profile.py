"""``profile MODEL``: parameters, multiply-adds, memory and latency of a network."""

import json
import sys

import torch

from segformer_pl.analysis.complexity import as_dict, complexity, measure_latency, table
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.parser import (
    PROG,
    SegformerArgumentParser,
    add_network_options,
    build_network,
    segmenter_names,
)
from segformer_pl.errors import UserError


def profile(arguments: list[str]) -> None:
    """Run ``profile MODEL`` and print parameters, multiply-adds, activation memory and latency.

    Args:
        arguments: Command-line arguments after ``profile``, the model first.

    Raises:
        UserError: There is no such network, or an argument does not fit it.
    """
    parser = SegformerArgumentParser(
        prog=f"{PROG} profile",
        description="Count the parameters, multiply-adds (as executed, and as the network's paper "
        "counts them) and activation memory of a network, in total and by part, and measure its "
        "latency. Arguments of the network follow MODEL as options, such as --sr_ratios [4,4,2,1]; "
        "profile MODEL --help lists them.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"network to profile: {', '.join(segmenter_names())}, or an import path such as "
        "package.module.Class",
    )
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
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device on which latency is measured; all else is counted",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="data type of weights and image when latency is measured",
    )
    build = add_network_options(parser, arguments)
    options = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    if build is None:
        parser.error("give MODEL first, then its options")
    name, (height, width), in_json = options.pop("model"), options.pop("size"), options.pop("json")
    device, dtype = options.pop("device"), getattr(torch, options.pop("dtype"))
    if min(height, width, options["num_classes"]) < 1:
        raise UserError("--size and --num_classes: give integers of at least 1")
    device = resolve_device(device)
    network = build_network(name, build, **options)
    cost = complexity(network, height, width)
    sys.stderr.write("measuring latency ...\n")
    latency = measure_latency(network, height, width, device, dtype)
    text = json.dumps(as_dict(cost, latency), indent=2) if in_json else table(name, cost, latency)
    sys.stdout.write(text + "\n")
