"""``convert SOURCE DESTINATION --to LAYOUT``: convert weights between layouts."""

import sys
from pathlib import Path

from segformer_pl.atomic import make_writable_folder
from segformer_pl.checkpoints import export_weights, load_network, read_weights
from segformer_pl.checkpoints.conversion import LAYOUTS, check_destination
from segformer_pl.commands.parser import PROG, SegformerArgumentParser


def convert(arguments: list[str]) -> None:
    """Run ``convert SOURCE DESTINATION --to LAYOUT`` and print what was converted.

    Args:
        arguments: Command-line arguments after ``convert``.

    Raises:
        UserError: The source cannot be read, the destination exists, or the layout cannot express
            the network.
    """
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
    options = parser.parse_args(arguments)
    check_destination(options.destination, options.to)
    make_writable_folder(Path(options.destination).expanduser().parent, "destination")
    weights = read_weights(options.source)
    network, report = load_network(weights)
    remarks = export_weights(
        network, options.destination, options.to, weights.task, weights.preprocessor
    )
    lines = [str(report), f"written to '{options.destination}': layout {options.to}", *remarks]
    sys.stdout.write("\n  ".join(lines) + "\n")
