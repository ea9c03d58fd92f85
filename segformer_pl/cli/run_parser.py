"""The parser of ``fit``, ``validate``, ``test`` and ``doctor``."""

import operator
from argparse import Action
from functools import reduce, wraps
from typing import Any, get_args

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse._typehints import NestedArg
from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.commands.options.parser import OneSentenceParser
from segformer_pl.errors import UserError, did_you_mean

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


def accept_short_names(parser: LightningArgumentParser, argument: str) -> None:
    """Let an argument that takes a network also take the names that other commands take.

    ``segformer_b0`` stands for ``segformer_pl.models.segformer_b0``. jsonargparse finds classes by
    their names, and these are functions.

    Args:
        parser: The parser.
        argument: Name of the argument.
    """
    action: Any = next(action for action in parser._actions if action.dest == argument)
    check = action._check_type

    @wraps(check)  # jsonargparse passes what is in the signature
    def check_named(value: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return check(_with_class_path(value), *args, **kwargs)
        except (TypeError, ValueError) as error:
            name = _class_path(value)
            is_unknown = isinstance(name, str) and "." not in name and name not in SEGMENTERS
            suggestion = did_you_mean(name, SEGMENTERS) if is_unknown else ""
            if not suggestion:
                raise
            raise UserError(
                f"{argument}: there is no network {name!r}{suggestion}; give an import path such "
                f"as package.module.Class, or one of {', '.join(SEGMENTERS)}"
            ) from error

    action._check_type = check_named


def _class_path(value: Any) -> Any:
    """Return the class path in a value of the command line or of a file."""
    if isinstance(value, NestedArg):
        return value.val if value.key == "class_path" else None
    return value.get("class_path") if isinstance(value, dict | Namespace) else value


def _with_class_path(value: Any) -> Any:
    """Return the value with the whole class path in place of a short name."""
    name = _class_path(value)
    if not isinstance(name, str) or name not in SEGMENTERS:
        return value
    class_path = f"segformer_pl.models.{name}"
    if isinstance(value, NestedArg):
        return value._replace(val=class_path)
    if isinstance(value, Namespace):
        return Namespace({**vars(value), "class_path": class_path})
    return {**value, "class_path": class_path} if isinstance(value, dict) else class_path


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
