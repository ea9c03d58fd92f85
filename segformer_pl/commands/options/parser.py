"""The argument parser of the commands."""

import sys
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser, Namespace

from segformer_pl.commands.options.parse_errors import readable
from segformer_pl.errors import UserError, find_user_error
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


def _arguments(parser: ArgumentParser) -> Iterator[Action]:
    """Yield the arguments of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            for subparser in action.choices.values():
                yield from _arguments(subparser)
        else:
            yield action


def one_sentence(parser: ArgumentParser, message: str, error: BaseException | None) -> str:
    """Return a message of a parser, or the text of the user's error that caused it, as one line."""
    if (user_error := find_user_error(error)) is not None:
        return " ".join(str(user_error).split())
    return readable(message, list(_arguments(parser)), getattr(parser, "examples", {}))


class OneSentenceParser(ArgumentParser):
    """A parser whose errors are one sentence, also those about the files of settings.

    Option names may have hyphens in place of underscores, and links can set arguments of a function
    as well as of a class.

    Attributes:
        examples: Values of some options, by name, which messages about them show.
    """

    examples: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviations would accept a misspelt --trainer.max_step as trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        text = one_sentence(self, message, ex)
        program = self.prog.replace(" [options]", "")  # of a subcommand
        sys.stderr.write(f"error: {text}; see {program} --help\n")
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


class SegformerArgumentParser(OneSentenceParser):
    """The parser of the project's own commands, which also accepts old option names."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        given = with_underscores(sys.argv[1:] if args is None else args)
        return super().parse_args(current_names(given), *others, **kwargs)
