"""Read YAML files of the user, with errors that name the file and the line."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.errors import UserError

# libyaml's loader, which pyyaml has on most platforms, is ten times as fast.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KINDS = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def read_mapping(file: str | Path, what: str) -> dict[Any, Any]:
    """Read a YAML file whose top level is a mapping.

    Args:
        file: Path of the file.
        what: What the file should hold, for messages.

    Raises:
        UserError: The file cannot be read, is no UTF-8 text or no YAML, or holds something else.
    """
    loaded, line = read_yaml(file, what)
    if loaded is None:
        raise UserError(f"'{file}' is empty; give a YAML file that holds {what}")
    if not isinstance(loaded, dict):
        raise UserError(
            f"'{file}', line {line}: {_kind(loaded)}, where keys with values are expected; give a "
            f"YAML file that holds {what}"
        )
    return loaded


def check_sections(file: str | Path, content: dict[Any, Any], sections: Collection[str]) -> None:
    """Check that the sections of a file hold keys with values, or name another file.

    Args:
        file: Path of the file.
        content: Its content.
        sections: Keys of its top level that are sections. They may be missing.

    Raises:
        UserError: One holds something else.
    """
    for key, value in content.items():
        if key in sections and not isinstance(value, dict | str):
            pairs = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader).value
            line = next(name.start_mark.line for name, _ in pairs if name.value == key) + 1
            kind = "empty" if value is None else _kind(value)
            raise UserError(
                f"'{file}', line {line}: {key} is {kind}; give its settings as keys with values, "
                "or leave it out"
            )


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")


def read_yaml(file: str | Path, what: str) -> tuple[Any, int]:
    """Read a YAML file; -> its content, and the line where it begins, from 1.

    Args:
        file: Path of the file.
        what: What the file should hold, for messages.

    Raises:
        UserError: The file cannot be read, or is no UTF-8 text or no YAML.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(
            f"'{file}' cannot be read ({error.strerror}); give a YAML file that holds {what}"
        ) from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"'{file}', line {line}: not UTF-8 text (byte 0x{content[error.start]:02x}); give a "
            f"YAML file that holds {what}"
        ) from error
    try:
        loaded = yaml.load(text, Loader)
        node = yaml.compose(text, Loader) if not isinstance(loaded, dict) else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of month 13, [[[[...
        raise UserError(f"'{file}'{_problem(error, text)}; correct it") from error
    return loaded, node.start_mark.line + 1 if node else 1


def _problem(error: Exception, text: str) -> str:
    """Return line and description of an error, as a continuation of the name of the file."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        found = error.character  # a number in libyaml's loader
        code = found if isinstance(found, int) else ord(found)
        return f", line {line}: invalid YAML (the character U+{code:04X} is not allowed)"
    mark = getattr(error, "problem_mark", None)
    parts = (getattr(error, "context", None), getattr(error, "problem", None))
    described = ", ".join(filter(None, parts)) or " ".join(str(error).split())
    last = len(text.splitlines())  # libyaml counts the end of a file as a line
    where = f", line {min(mark.line + 1, last)}" if mark else ""
    return f"{where}: invalid YAML ({described})"
