"""Options of the commands that read weights: ``--state`` and ``--network``."""

from typing import Any

from segformer_pl.commands.options.parser import SegformerArgumentParser


def add_state_option(parser: SegformerArgumentParser) -> None:
    """Add ``--state``, the copy of the weights to read from a file that holds several."""
    parser.add_argument(
        "--state",
        help="copy of the weights to read from a file that holds several, such as "
        "`ema_state_dict`. Such a file is refused without it, with the names of its copies",
    )


def add_network_option(parser: SegformerArgumentParser) -> None:
    """Add ``--network``, the arguments of the network to change at equal weights."""
    parser.add_argument(
        "--network",
        type=dict[str, Any],
        default={},
        help="arguments of the network, or of its encoder, to change without training, such as "
        "'{merged_queries: [0.5, 0.5, 0.5, 0.5]}'; `test_time` measures what a change costs",
    )
