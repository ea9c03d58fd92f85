"""The option ``--state`` of the commands that read weights of other code bases."""

from segformer_pl.commands.options.parser import SegformerArgumentParser


def add_state_option(parser: SegformerArgumentParser) -> None:
    """Add ``--state``, the copy of the weights to read from a file that holds several."""
    parser.add_argument(
        "--state",
        help="copy of the weights to read from a file that holds several, such as "
        "`ema_state_dict`. Such a file is refused without it, with the names of its copies",
    )
