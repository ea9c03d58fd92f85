"""Options of ``scaling``."""

from typing import Literal, get_args

from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from segformer_pl.analysis.cluster_node import Algorithm, Node
from segformer_pl.commands.options.device import add_device_option
from segformer_pl.commands.options.networks import add_network_argument, parse_with_network
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser

# Larger local batches are extrapolated unless --batches asks for them.
MAX_MEASURED_BATCH = {"cpu": 4, "cuda": 16}


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``scaling``; see :func:`parse_with_network`."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} scaling",
        description="Predict the training speed on 1, 2, 4, ... devices with "
        "DistributedDataParallel, from a step that is measured on one device and stated speeds of "
        "links. The assumptions are printed above the table. Arguments of the network follow MODEL "
        "as options; scaling MODEL --help lists them.",
    )
    add_network_argument(parser, "network to train")
    parser.add_argument(
        "--global_batch",
        type=PositiveInt,
        required=True,
        help="images of a step on all devices together (16 in the paper, on ADE20K)",
    )
    parser.add_argument(
        "--size",
        type=PositiveInt,
        nargs=2,
        default=[512, 512],
        metavar=("H", "W"),
        help="height and width of the training crop in pixels",
    )
    parser.add_argument("--num_classes", type=PositiveInt, default=150, help="number of classes")
    parser.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed"],
        default="32-true",
        help="precision of the training, as trainer.precision",
    )
    add_device_option(parser, "device on which the step is measured")
    parser.add_argument(
        "--batches",
        type=PositiveInt,
        nargs="+",
        help="local batches to measure (default: those of the table, up to "
        f"{MAX_MEASURED_BATCH['cuda']} on a GPU and {MAX_MEASURED_BATCH['cpu']} on the CPU)",
    )
    parser.add_argument(
        "--repetitions",
        type=PositiveInt,
        default=10,
        help="measured steps of each local batch; their median counts",
    )
    parser.add_argument(
        "--max_devices", type=PositiveInt, default=1024, help="largest number of devices"
    )
    parser.add_class_arguments(Node, "node")
    parser.add_argument(
        "--all_reduce",
        choices=list(get_args(Algorithm)),
        default="fastest",
        help="algorithm of the gradients' all-reduces; fastest: the faster one for each bucket, as "
        "NCCL chooses",
    )
    parser.add_argument(
        "--gradient_bytes",
        type=Literal[4, 2],
        default=4,
        help="bytes of a gradient value on the links, 2 with GradientCompression bf16 or fp16",
    )
    parser.add_argument(
        "--bucket_cap_mb",
        type=PositiveFloat,
        help="DDP's bucket_cap_mb in MiB (default: 25, and 1 for the first bucket)",
    )
    parser.add_argument(
        "--sync_batchnorm",
        type=bool,
        default=True,
        help="whether BatchNorms are synchronised, as by trainer.sync_batchnorm true, which the "
        "recipes of experiments/ give and `fit` alone does not",
    )
    parser.add_argument(
        "--worker_images_per_s",
        type=PositiveFloat,
        help="images that one data-loader worker delivers in a second; `doctor` measures it",
    )
    parser.add_argument(
        "--workers_per_device",
        type=PositiveInt,
        default=2,
        help="data-loader workers of each device, as data.num_workers",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parse_with_network(parser, arguments)
