"""Options of ``push``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``push``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} push",
        description="Upload the network of a run to the Hugging Face hub, with a model card that "
        "is written from the run: data, recipe and departures from the paper's, metrics with "
        "intervals, receptive fields, provenance. The weights are safetensors, in the layout of "
        "transformers where it has such a network. The token is that of `hf auth login` or "
        "HF_TOKEN. A further upload is a further commit.",
    )
    parser.add_argument(
        "source",
        help="run folder, whose best checkpoint is taken, or its last one if there is no best; or "
        "a checkpoint of `fit`",
    )
    parser.add_argument("repository", help="repository on the hub, owner/name; created if missing")
    parser.add_argument(
        "--private", action="store_true", help="make the repository private if it is created"
    )
    parser.add_argument(
        "--license",
        help="licence of the weights for the card, as the hub spells it, such as apache-2.0 or "
        "cc-by-nc-4.0. It depends on the data and on the initial weights too. Default: none is "
        "stated",
    )
    parser.add_argument(
        "--output",
        help="write the files to this folder, which must not exist, and upload nothing",
    )
    return parser.parse_args(arguments)
