"""The argument parser of every command."""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl import models
from segformer_pl.errors import UserError, find_user_error
from segformer_pl.models.segmenter import Segmenter

PROG = "python -m segformer_pl"

# Options as the project's own commands had them in the release before, and as they have them now:
# with underscores, and by the names that `fit` has for the same thing.
OLD_SPELLINGS = {
    "--batch-size": "--batch_size",
    "--block-size": "--block_size",
    "--data": "--data.dataset",
    "--num-classes": "--num_classes",
    "--num-images": "--num_images",
    "--num-workers": "--data.num_workers",
    "--path": "--data.path",
}


def current_spelling(arguments: list[str]) -> list[str]:
    """Replace old spellings of options in the arguments of a command, with a notice for each."""
    current = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in OLD_SPELLINGS:
            sys.stderr.write(f"{option} is now {OLD_SPELLINGS[option]}\n")
        current.append(OLD_SPELLINGS.get(option, option) + equals + value)
    return current


def segmenter_names() -> list[str]:
    """The networks that can be named on the command line: functions that take ``num_classes``."""
    return [
        name
        for name in models.__all__
        if inspect.isfunction(build := getattr(models, name))
        and "num_classes" in inspect.signature(build).parameters
    ]


def find_segmenter(name: str) -> Callable[..., Segmenter]:
    """Return the class or function that builds a network.

    Args:
        name: One of :func:`segmenter_names`, or an import path such as ``package.module.Class``.

    Raises:
        UserError: There is nothing of that name, or it cannot be called with ``num_classes``.
    """
    if name in segmenter_names():
        return getattr(models, name)
    try:
        build = pkgutil.resolve_name(name)
        parameters = inspect.signature(build).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"there is no network {name!r} ({error}); give an import path such as "
            f"package.module.Class, or one of {', '.join(segmenter_names())}"
        ) from error
    if "num_classes" not in parameters:
        raise UserError(
            f"{name!r} has no argument num_classes and is no segmentation network of this package; "
            "see segformer_pl.models.segmenter"
        )
    return build


class RunArgumentParser(LightningArgumentParser):
    """The parser of ``fit``, ``validate``, ``test`` and ``doctor``.

    It says what is wrong in one sentence, and lets links reach into a function's arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations, --trainer.max_step would pass for trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        text = str(find_user_error(ex) or message)
        sentence = " ".join(line.strip() for line in text.splitlines())
        sys.stderr.write(f"error: {sentence} (what is accepted: {self.prog} --help)\n")
        self.exit(2)

    # jsonargparse 4.53 passes linked_targets on to this method as it does to
    # add_class_arguments, but only the latter takes it.
    def add_function_arguments(
        self, *args: Any, linked_targets: set[str] | None = None, **kwargs: Any
    ) -> list[str]:
        return super().add_function_arguments(*args, **kwargs)


class SegformerArgumentParser(RunArgumentParser):
    """The parser of the project's own commands, which accepts the old spellings of options too."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_args(current_spelling(given), *others, **kwargs)
