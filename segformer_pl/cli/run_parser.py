"""The parser of ``fit``, ``validate``, ``test`` and ``doctor``."""

import operator
from argparse import Action
from functools import reduce
from typing import Any, ClassVar, get_args

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.commands.options.parser import OneSentenceParser

SHOWN_SUBCLASSES = 1000  # characters of their import paths


class RunHelpFormatter(DefaultHelpFormatter):
    """Lists the known subclasses of a type where they are few.

    A network can be any ``nn.Module``, of which torch and its libraries define thousands.
    """

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        before, _, names = text.partition(", known subclasses: ")
        return text if len(names) < SHOWN_SUBCLASSES else f"{before})"


class RunArgumentParser(OneSentenceParser, LightningArgumentParser):
    """Lightning's parser with errors of one sentence and a help of readable length."""

    examples: ClassVar = {"model.network": "--model.network=segformer_pl.models.segformer_b0"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": RunHelpFormatter} | kwargs)


def try_int_before_float(parser: LightningArgumentParser) -> None:
    """Let the arguments that take a number or a share, such as limit_val_batches, take 2 as 2.

    jsonargparse tries the types of a union in their order. ``typing`` considers Union[int, float]
    and Union[float, int] equal and returns the one that any module made first, which depends on the
    order of imports. With float first 2 is read as 2.0, which the trainer refuses, and 1 as 1.0,
    which is all batches.
    """
    for action in parser._actions:
        types = get_args(getattr(action, "_typehint", None))
        if int in types and float in types:
            ordered = sorted(types, key=lambda kind: kind is not int)
            # Such unions are not cached.
            action._typehint = reduce(operator.or_, ordered)  # type: ignore[attr-defined]


def leave_elements_unchecked(parser: LightningArgumentParser, *names: str) -> None:
    """Check of computed lists only that they are lists.

    jsonargparse 4.53 copies a whole list for each of its elements, at each of a dozen checks, which
    took most of the start of a training with the 150 classes of ADE20K.

    Args:
        parser: The parser, before the arguments are linked.
        names: Arguments that the command line cannot set.
    """
    for action in parser._actions:
        if action.dest in names:
            action._typehint = list  # type: ignore[attr-defined]
