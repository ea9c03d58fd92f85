"""``convert SOURCE DESTINATION --to LAYOUT``: convert weights between layouts."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from segformer_pl.atomic import make_writable_folder
from segformer_pl.checkpoints import export_weights, load_network, read_weights
from segformer_pl.checkpoints.conversion import check_destination


def run(options: Namespace) -> None:
    """Run ``convert SOURCE DESTINATION --to LAYOUT`` and print what was converted.

    Args:
        options: Options as ``options/convert.py`` parses them.

    Raises:
        UserError: The source cannot be read, the destination exists, or the layout cannot express
            the network.
    """
    check_destination(options.destination, options.to)
    make_writable_folder(Path(options.destination).expanduser().parent, "destination")
    weights = read_weights(options.source, options.state)
    network, report = load_network(weights)
    remarks = export_weights(
        network, options.destination, options.to, weights.task, weights.preprocessor
    )
    lines = [str(report), f"written to '{options.destination}': layout {options.to}", *remarks]
    sys.stdout.write("\n  ".join(lines) + "\n")
