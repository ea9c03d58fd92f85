"""Options of ``ablate``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.study import parse_study, study_parser

DESCRIPTION = (
    "Run an ablation study: train every variant with every seed, each as an ordinary `fit` "
    "with a run folder of its own, evaluate them, and write a report that says which "
    "differences are resolved."
)


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``ablate``; see :func:`parse_study`."""
    return parse_study(study_parser("ablate", DESCRIPTION), arguments)
