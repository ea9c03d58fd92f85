"""``convert SOURCE DEST --to LAYOUT``: weights of any known layout into another."""

import sys
from pathlib import Path

from segformer_pl.atomic import make_writable_folder
from segformer_pl.checkpoints import export_weights, load_network, read_weights
from segformer_pl.checkpoints.export import LAYOUTS, check_destination
from segformer_pl.commands.parser import PROG, SegformerArgumentParser


def convert(arguments: list[str]) -> None:
    """``convert SOURCE DEST --to LAYOUT``: weights of any known layout into another."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} convert",
        description="Write weights of any known layout in another one.",
    )
    parser.add_argument(
        "source",
        help="file (.pth, .bin, .safetensors, Lightning .ckpt), folder written by save_pretrained, "
        "or hub name owner/name@commit",
    )
    parser.add_argument(
        "destination",
        help="folder for huggingface and smp, .pth file for nvlabs, .safetensors file for native; "
        "must not exist",
    )
    parser.add_argument("--to", choices=list(LAYOUTS), required=True, help="whose layout")
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
