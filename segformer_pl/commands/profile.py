"""``profile MODEL``: what a network costs."""

import json
import sys

import torch

from segformer_pl import models
from segformer_pl.analysis.complexity import as_dict, complexity, measure_latency, table
from segformer_pl.commands.parser import PROG, SegformerArgumentParser, segmenter_names


def profile(arguments: list[str]) -> None:
    """``profile MODEL``: parameters, multiply-adds, activation memory and latency of a network."""
    segmenters = segmenter_names()
    parser = SegformerArgumentParser(
        prog=f"{PROG} profile",
        description="Parameters, multiply-adds (executed, and by the paper's recipe), activation "
        "memory and latency of a network, in total and part by part. After MODEL, every argument "
        "of the model can be given too, such as --sr_ratios [4,4,2,1]; profile MODEL --help lists "
        "them.",
    )
    parser.add_argument("model", choices=segmenters, help="network to profile")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[512, 512],
        metavar=("H", "W"),
        help="picture in pixels",
    )
    parser.add_argument("--num_classes", type=int, default=150, help="the paper's tables have 150")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where latency is measured",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of weights and picture while latency is measured",
    )
    build = None
    if arguments and arguments[0] in segmenters:
        build = getattr(models, arguments[0])
        parser.add_function_arguments(build, skip={"num_classes"})
    options = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    if build is None:
        parser.error("give MODEL first, then its options")
    name, (height, width), in_json = options.pop("model"), options.pop("size"), options.pop("json")
    device, dtype = options.pop("device"), getattr(torch, options.pop("dtype"))
    if min(height, width, options["num_classes"]) < 1:
        raise ValueError("--size and --num_classes: give integers of at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use")
    network = build(**options)
    cost = complexity(network, height, width, options["in_channels"])
    sys.stderr.write("measuring latency ...\n")
    latency = measure_latency(network, height, width, options["in_channels"], device, dtype)
    text = json.dumps(as_dict(cost, latency), indent=2) if in_json else table(name, cost, latency)
    sys.stdout.write(text + "\n")
