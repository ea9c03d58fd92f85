"""``MODEL`` and the options of the network that it names."""

import inspect

from jsonargparse import Namespace

from segformer_pl.commands.options.parser import SegformerArgumentParser

# The functions of segformer_pl.models that take num_classes. They are listed because the import of
# the networks takes several seconds, which --help does not need (checked by a test).
SEGMENTERS = (
    "deeplabv3plus",
    "deeplabv3plus_mmseg",
    "maskformer",
    "maskformer_swin",
    "segformer_b0",
    "segformer_b1",
    "segformer_b2",
    "segformer_b3",
    "segformer_b4",
    "segformer_b5",
    "semask_fpn",
    "setr_mla",
    "setr_naive",
    "setr_pup",
)


def add_network_argument(parser: SegformerArgumentParser, description: str) -> None:
    """Add ``MODEL``.

    Args:
        parser: Parser of the command.
        description: What the network is for, for the help.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{description}: {', '.join(SEGMENTERS)}, or an import path such as "
        "package.module.Class",
    )


def parse_with_network(parser: SegformerArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the arguments of a command, and those of the network that it names first.

    Args:
        parser: Parser of the command with all its own options.
        arguments: Command-line arguments, ``MODEL`` first.

    Returns:
        The command's own options; ``build``, the class or function that builds the network; and
        ``network``, its arguments without ``num_classes``.

    Raises:
        UserError: There is no such network.
    """
    own = {action.dest for action in parser._actions}
    build = None
    if arguments and not arguments[0].startswith("-"):
        from segformer_pl.commands.networks import find_segmenter

        build = find_segmenter(arguments[0])
        if inspect.isclass(build):
            parser.add_class_arguments(build, skip={"num_classes"}, instantiate=False)
        else:
            parser.add_function_arguments(build, skip={"num_classes"})
    options = parser.instantiate_classes(parser.parse_args(arguments))
    if build is None:
        parser.error("give MODEL first, then its options")
    network = {key: value for key, value in options.as_dict().items() if key not in own}
    for key in network:
        del options[key]
    options["build"], options["network"] = build, network
    return options
