"""Options of ``app``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.device import add_device_option
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser
from segformer_pl.commands.options.weights import add_state_option


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``app``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} app",
        description="Serve a page on which one drops an image or a video and sees what the network "
        "predicts: the classes over the image, their share of the pixels, and how certain the "
        "network is. The page is served to this machine alone and asks no other server for "
        "anything. Needs the extra `app`. Ctrl-C ends it and deletes the files that were dropped.",
    )
    parser.add_argument(
        "--weights",
        required=True,
        help="checkpoint of a run, or weights of a whole network in any layout that `convert` "
        "reads: a file, a folder, or a hub name owner/name@commit. Class names, colours, "
        "normalisation and size of the images are those that it states",
    )
    add_state_option(parser)
    add_device_option(parser, "device of the network")
    parser.add_argument(
        "--server_name",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets everybody in the network use the page",
    )
    parser.add_argument(
        "--server_port", type=int, help="port to listen on. Default: the first free one from 7860"
    )
    return parser.parse_args(arguments)
