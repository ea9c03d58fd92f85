"""The argument parsers of all commands, and the networks that can be named on the command line."""

import inspect
import operator
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn, get_args

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl import models
from segformer_pl.errors import UserError, brief, find_user_error
from segformer_pl.models.segmenter import Segmenter, check_segmenter
from segformer_pl.yaml_file import check_sections, read_mapping, read_yaml

PROG = "python -m segformer_pl"
SETTINGS = "settings"  # what the files that a parser reads hold, for messages
YAML_SUFFIXES = (".yaml", ".yml")
OWN_READERS = ("--data.dataset", "--settings")  # options whose files the parser does not read

# Option names of the previous release -> present ones, which agree with the options of `fit`. The
# old names are still accepted.
OLD_NAMES = {
    "--data": "--data.dataset",
    "--num_workers": "--data.num_workers",
    "--path": "--data.path",
}


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Replace hyphens in option names by underscores, so that all commands accept both.

    Options are documented with underscores, as they are the arguments of Python functions. A key
    with a hyphen can be given in a dict: ``--option '{a-b: 1}'``.
    """
    spelled = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
        spelled.append(option + equals + value)
    return spelled


def current_names(arguments: list[str]) -> list[str]:
    """Replace old option names in the arguments of a command, with a notice on stderr for each."""
    current = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in OLD_NAMES:
            sys.stderr.write(f"{option} is now {OLD_NAMES[option]}\n")
        current.append(OLD_NAMES.get(option, option) + equals + value)
    return current


def segmenter_names() -> list[str]:
    """Return the names in :mod:`segformer_pl.models` of functions that take ``num_classes``."""
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
        UserError: The name does not exist, or its function or class has no argument
            ``num_classes``.
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
            f"{name!r} has no argument num_classes, so it is not a segmentation network of this "
            "package; see segformer_pl.models.segmenter"
        )
    return build


def add_network_options(
    parser: LightningArgumentParser, arguments: Sequence[str]
) -> Callable[..., Segmenter] | None:
    """Add the arguments of the network that a command names first, without ``num_classes``.

    Args:
        parser: Parser of the command.
        arguments: Command-line arguments, ``MODEL`` first.

    Returns:
        The class or function that builds the network; None if no network is named.

    Raises:
        UserError: There is no such network.
    """
    if not arguments or arguments[0].startswith("-"):
        return None
    build = find_segmenter(arguments[0])
    if inspect.isclass(build):
        parser.add_class_arguments(build, skip={"num_classes"}, instantiate=False)
    else:
        parser.add_function_arguments(build, skip={"num_classes"})
    return build


def build_network(name: str, build: Callable[..., Segmenter], **arguments: Any) -> Segmenter:
    """Build the network that a command names, and check that it is a segmenter.

    Args:
        name: Name of the network, for messages.
        build: Its class or function.
        arguments: Arguments of ``build``.

    Raises:
        UserError: The arguments do not fit, or the result is no segmenter.
    """
    try:
        network = build(**arguments)
    except Exception as error:  # any type: the constructor may be the user's
        raise UserError(f"{name} cannot be built with these arguments: {brief(error)}") from error
    check_segmenter(network)
    return network


def _files_among(arguments: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield the options whose value is a file, ``--option FILE`` or ``--option=FILE``."""
    option = ""
    for argument in arguments:
        value = argument
        if argument.startswith("--"):
            option, _, value = argument.partition("=")
        with suppress(OSError, ValueError):  # too long a text, or one with a zero byte
            if option and value and Path(value).is_file():
                yield option, Path(value)


class RunArgumentParser(LightningArgumentParser):
    """The parser of ``fit``, ``validate``, ``test`` and ``doctor``.

    Errors are one sentence, option names may have hyphens in place of underscores, and links can
    set arguments of a function as well as of a class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviations would accept a misspelt --trainer.max_step as trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        text = str(find_user_error(ex) or message)
        sentence = " ".join(line.strip() for line in text.splitlines())
        sys.stderr.write(f"error: {sentence} (what is accepted: {self.prog} --help)\n")
        self.exit(2)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        given = with_underscores(sys.argv[1:] if args is None else args)
        # jsonargparse's messages name neither the file nor, for groups of arguments, the mistake.
        for option, file in _files_among(given):
            if file.suffix in YAML_SUFFIXES and option not in OWN_READERS:
                # The trainer has arguments that are lists, such as callbacks.
                read = read_yaml if option.startswith("--trainer.") else read_mapping
                read(file, SETTINGS)
        try:
            return super().parse_args(given, *others, **kwargs)
        except UnicodeDecodeError as error:
            for _, file in _files_among(given):
                if file.read_bytes() == error.object:
                    read_mapping(file, SETTINGS)
            raise

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a file of settings, after a check that it is one."""
        if Path(path).is_file():  # a pipe can be read only once
            content = read_mapping(path, SETTINGS)
            sections = {a.dest.partition(".")[0] for a in self._actions if "." in a.dest}
            check_sections(path, content, sections)
            if "config" in content:
                raise UserError(
                    f"'{path}' has the key config, which is an option of the command line alone; "
                    "give several files as several --config"
                )
        return super().parse_path(path, *args, **kwargs)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Return arguments as text. They were checked when they were parsed, and not again here.

        Settings are dumped several times at the start of a run, and the check takes much longer.
        """
        return super().dump(namespace, *args, **{"skip_validation": True} | kwargs)

    # jsonargparse 4.53 passes linked_targets to this method as it does to add_class_arguments, but
    # only the latter accepts it. So drop it here.
    def add_function_arguments(
        self, *args: Any, linked_targets: set[str] | None = None, **kwargs: Any
    ) -> list[str]:
        return super().add_function_arguments(*args, **kwargs)


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


class SegformerArgumentParser(RunArgumentParser):
    """The parser of the other commands, which also accepts old option names."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        given = with_underscores(sys.argv[1:] if args is None else args)
        return super().parse_args(current_names(given), *others, **kwargs)
