"""The parser of ``fit``, ``validate``, ``test`` and ``doctor``."""

import operator
import re
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Mapping
from functools import reduce, wraps
from typing import Any, ClassVar, get_args

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath
from jsonargparse._link_arguments import ActionLink
from jsonargparse._typehints import NestedArg
from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.commands.options.parser import OneSentenceParser
from segformer_pl.errors import UserError, did_you_mean

# Order of the groups of options in the help; those without a section come third.
SECTIONS = ("data", "model", "", "last_checkpoint", "trainer")
# Options of the trainer that mean nothing for a stream, or that `fit` and its like do not have.
USELESS = (
    "max_epochs",
    "min_epochs",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
    "overfit_batches",
    "limit_predict_batches",
    "use_distributed_sampler",
    "barebones",
    "model_registry",
)
DESCRIPTIONS = {
    "fit": "Train a network, with validations, checkpoints and a report in the run folder. "
    "--run_name and --ckpt_path continue an earlier training.",
    "validate": "Evaluate a checkpoint (--ckpt_path) or other weights (--model.weights) on the "
    "validation split: prints the metrics, and writes the counts per image that `compare` reads.",
    "test": "Evaluate a checkpoint (--ckpt_path) or other weights (--model.weights) on the test "
    "split: prints the metrics, and writes the counts per image.",
}
FOOT = """
An option that takes a class takes its import path, and --OPTION.help CLASS lists its arguments:
  --model.network.help segformer_pl.models.segformer_b0
The documentation of SegmentationTask, StreamingSegmentationData and Lightning's Trainer says more.
"""


class RunHelpFormatter(DefaultHelpFormatter):
    """Shows the first sentence on every option that a user can set, and its default.

    In full the help has 500 lines, most of them on the trainer.
    """

    def add_usage(
        self, usage: Any, actions: Iterable[Action], groups: Any, prefix: str | None = None
    ) -> None:
        if usage is not None:
            super().add_usage(usage, actions, groups, prefix)
            return
        program = self._prog.replace(" [options]", "")
        # With an empty prefix, the text becomes the name of the program in a subcommand.
        options = "" if prefix == "" else " [--config FILE] [--SECTION.OPTION VALUE ...]"
        super().add_usage(program + options, actions, groups, prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(_plain(heading or ""))

    def add_argument(self, action: Action) -> None:
        section, _, name = action.dest.partition(".")
        hidden = isinstance(action, ActionLink | _ActionConfigLoad | _ActionHelpClassPath)
        if not hidden and not (section == "trainer" and name in USELESS):
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        # Lightning repeats the default in the text.
        sentence = re.split(r"\.\s|[.;]$|\s+Default: ", _plain(action.help or ""), maxsplit=1)[0]
        sentence, default = sentence.replace("%", "%%"), action.default
        if default is None or isinstance(default, Mapping | Namespace) or default == SUPPRESS:
            return sentence
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{sentence} (default: {shown})"


def _plain(text: str) -> str:
    """Return a text without the markup of docstrings."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")


class RunArgumentParser(OneSentenceParser, LightningArgumentParser):
    """Lightning's parser with errors of one sentence and a help of readable length."""

    examples: ClassVar = {
        "model.network": "--model.network=segformer_b0",
        "data.crop_size": "--data.crop_size '[512,512]', height and width",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": RunHelpFormatter} | kwargs)

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        # A group of its own would have the first line of the docstring of Trainer.fit as its title.
        return super().add_method_arguments(*args, **kwargs, as_group=False)

    def format_help(self, *args: Any) -> str:
        self._action_groups.sort(key=_position)  # type: ignore[attr-defined]
        return super().format_help(*args) + FOOT


def _position(group: Any) -> int:
    sections = {a.dest.partition(".")[0] for a in group._group_actions if "." in a.dest}
    section = min(sections, default="")
    return SECTIONS.index(section) if section in SECTIONS else len(SECTIONS)


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
