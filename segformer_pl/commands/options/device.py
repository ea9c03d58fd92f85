"""The option ``--device``."""

from segformer_pl.commands.options.parser import SegformerArgumentParser


def add_device_option(parser: SegformerArgumentParser, description: str) -> None:
    """Add ``--device``, whose value :func:`segformer_pl.commands.device.resolve_device` reads.

    Args:
        parser: Parser of the command.
        description: What is done on the device, for the help.
    """
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help=f"{description}; auto is cuda if available, else cpu",
    )
