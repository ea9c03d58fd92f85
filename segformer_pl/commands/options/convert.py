"""Options of ``convert``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser
from segformer_pl.commands.options.weights import add_state_option

# Those of segformer_pl.checkpoints.conversion, which needs torch (checked by a test).
LAYOUTS = ("huggingface", "nvlabs", "smp", "native")


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``convert``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} convert",
        description="Convert the weights of a network from one layout (naming scheme of a state "
        "dict) to another. The layout of the source is detected from its key names: that of this "
        "package, NVlabs/SegFormer, Hugging Face transformers (SegFormer and MaskFormer), "
        "mmsegmentation or segmentation_models_pytorch.",
    )
    parser.add_argument(
        "source",
        help="weights to convert: a file (.pth, .bin, .safetensors, or .ckpt of Lightning), a "
        "folder written by save_pretrained, or a hub name owner/name@commit",
    )
    parser.add_argument(
        "destination",
        help="where to write: a folder for huggingface and smp, a .pth file for nvlabs, a "
        ".safetensors file for native; must not exist",
    )
    parser.add_argument(
        "--to",
        choices=list(LAYOUTS),
        required=True,
        help="layout to write: that of Hugging Face transformers (SegFormer, MiT, MaskFormer), "
        "NVlabs/SegFormer (SegFormer, MiT), segmentation_models_pytorch (SegFormer), or this "
        "package (native, every network)",
    )
    add_state_option(parser)
    return parser.parse_args(arguments)
