"""Options of ``erf``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.device import add_device_option
from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser
from segformer_pl.commands.options.weights import add_state_option


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``erf``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} erf",
        description="Measure the effective receptive field (ERF) of the central unit of every "
        "layer (stages 1 to 4 and the head; Figure 3 of the paper), averaged over validation "
        "images. The network is given by exactly one of --ckpt, --weights and --model. Writes the "
        "figures erf, erf_profile and erf_area as .png and .pdf, the maps as erf.npz and the "
        "numbers as erf.json; with --against also the figure erf_difference, and against.npz and "
        "against.json of the second network.",
    )
    parser.add_argument(
        "--ckpt", help="checkpoint of a run, which also determines the data set and its path"
    )
    parser.add_argument(
        "--weights",
        help="weights in any layout that `convert` reads: a file, a folder, or a hub name "
        "owner/name@commit",
    )
    add_state_option(parser)
    parser.add_argument(
        "--model",
        help=f"network with random weights: {', '.join(SEGMENTERS)}, or an import path "
        "such as package.module.Class",
    )
    parser.add_argument(
        "--against",
        help="second network, for comparison: a checkpoint of a run; a name that --model lists "
        "(random weights); or a network of timm, given as timm:NAME (random weights), "
        "timm:NAME:pretrained or timm:NAME:FILE",
    )
    parser.add_argument(
        "--data.dataset",
        help="data set of the catalogue, or a YAML file that describes one; required without "
        "--ckpt. Default: the data set of the checkpoint",
    )
    parser.add_argument(
        "--data.path",
        help="folder, hub name or URL pattern of the data set. Default: the path of the "
        "checkpoint's data set, or that of the catalogue",
    )
    parser.add_argument(
        "--data.num_bands",
        type=int,
        choices=[3, 4],
        help="number of bands that images are read with; it has to be in_channels of the networks. "
        "Default: that of the checkpoint's data, or 3 (RGB)",
    )
    parser.add_argument(
        "--num_images",
        type=int,
        default=100,
        help="number of validation images to average over, evenly spaced over the split (the "
        "paper: 100)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="height and width in pixels that images are resized to, bicubically and without "
        "keeping the aspect ratio (RepLKNet: 1024 1024). Default: the images' own size",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        help="layers to measure: names of feature maps or of modules. Default: all feature maps",
    )
    parser.add_argument(
        "--reduction",
        default="relu",
        help="reduction of the unit's channels to the scalar that is differentiated: relu, l1, "
        "sum, random, or the number of one channel",
    )
    parser.add_argument(
        "--gradient",
        default="abs",
        choices=["abs", "relu"],
        help="part of the gradient of the image that is averaged: its absolute value or its "
        "positive part",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help="number of images in one forward and backward pass, which bounds the memory. "
        "Default: as many as have 512x512 pixels together on the CPU, eight times as many on a GPU",
    )
    parser.add_argument(
        "--explore",
        action="store_true",
        help="also write erf_explorer.html: a page on which one points at the first image and sees "
        "the receptive field of the unit there in every layer. It measures up to 100 units of each "
        "layer",
    )
    add_device_option(parser, "device of the network")
    parser.add_argument("--output", default="erf", help="folder that the files are written to")
    return parser.parse_args(arguments)
