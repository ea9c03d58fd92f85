"""Results of a command that evaluates one setting after the other: a CSV file with a row for each.

The file is rewritten after every evaluation, so that the same command continues after an
interruption.
"""

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError

Row = TypeVar("Row")


def read_rows(file: Path, row: type[Row], kind: str) -> list[Row]:
    """Read a results file; an empty list if there is none yet.

    Args:
        file: Path of the file.
        row: Dataclass of a row. Its fields have the types str, int and float.
        kind: Kind of the results, for messages.

    Raises:
        UserError: The file was not written by :func:`write_rows`.
    """
    if not file.is_file():
        return []
    columns: Any = fields(row)  # type: ignore[arg-type]
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        try:
            return [
                row(**{column.name: column.type(line[column.name]) for column in columns})
                for line in reader
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}, line {reader.line_num}: not a row of {kind} results ({error}); "
                "remove the file, or give another folder"
            ) from None


def write_rows(file: Path, rows: list[Any], row: type[Any]) -> None:
    """Write a results file atomically.

    Args:
        file: Path of the file.
        rows: Its rows.
        row: Dataclass of a row.

    Raises:
        WriteError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [column.name for column in fields(row)])
    writer.writeheader()
    writer.writerows(asdict(one) for one in rows)
    atomic_write_text(file, text.getvalue())


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is aligned left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
