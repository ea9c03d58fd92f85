"""Options of ``recipe``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``recipe``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} recipe",
        description="List every setting of a run that differs from the paper's training recipe for "
        "the same network and data set, with the section or file that states the paper's value.",
    )
    parser.add_argument("what", choices=["diff"], help="list the departures from the recipe")
    parser.add_argument(
        "sources",
        nargs="+",
        help="run to compare with the recipe: a run folder, or a checkpoint in one; or YAML files "
        "of settings, merged in this order as `fit --config` merges them",
    )
    return parser.parse_args(arguments)
