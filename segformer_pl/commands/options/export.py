"""Options of ``export``."""

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser
from segformer_pl.commands.options.weights import add_network_option, add_state_option
from segformer_pl.inference.protocol import Inference

# Those of segformer_pl.inference.targets, which needs torch (checked by a test).
TARGETS = ("torch-export", "onnx", "openvino", "aoti")
SPLIT = "validation"


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``export``; ``changes`` holds those of inference."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} export",
        description="Write a checkpoint as one graph for other runtimes: preprocessing, network, "
        "upsampling and argmax, from 8-bit images (batch, height, width, channels) of any size to "
        "class indices (batch, height, width). Then run the file, and keep it only if at least "
        "99.9 % of the pixels of every image get the class that the checkpoint predicts. The "
        "file states normalisation, class names and palette; see docs/export.md. The network is "
        "the checkpoint's own, folded for inference.",
    )
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="checkpoint of a run, or other weights that `convert` reads",
    )
    add_state_option(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=list(TARGETS),
        help="torch-export (.pt2, for Python), onnx (.onnx), openvino (.xml and .bin), or aoti "
        "(.pt2, compiled by AOTInductor for this machine's CPU)",
    )
    parser.add_argument(
        "--output",
        type=str,
        help="file to write; must not exist. Default: beside CKPT, under its name with another "
        "suffix",
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        const=None,
        type=str,
        metavar="IMAGES",
        help="images to compare predictions on: a file, a folder, a quoted pattern, or "
        f"`{SPLIT}` for that split of the run's data. Without it, four generated images of "
        "different sizes are used, which cannot replace images of your own",
    )
    parser.add_argument(
        "--num_images",
        type=PositiveInt,
        default=20,
        help="number of images to compare, evenly spaced over those of --verify",
    )
    parser.add_argument(
        "--network_only",
        action="store_true",
        help="leave preprocessing, upsampling and argmax out: from normalised float images (batch, "
        "channels, height, width) to class maps (batch, classes, h, w)",
    )
    parser.add_argument(
        "--size",
        type=PositiveInt,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fixed size of the images in pixels, for networks and runtimes that need one. Images "
        "of --verify are resized to it. Default: any size",
    )
    add_network_option(parser)
    parser.add_class_arguments(Inference, "inference")
    options = parser.parse_args(arguments)
    given = parser.parse_args(arguments, defaults=False).get("inference")
    options["changes"] = given.as_dict() if given else {}
    return options
