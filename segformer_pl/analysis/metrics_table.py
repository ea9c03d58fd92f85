"""``metrics.csv`` of a run: its rows as text, and its columns as numbers."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from segformer_pl.errors import UserError


@dataclass(frozen=True)
class Series:
    """One column of ``metrics.csv``.

    Attributes:
        step: (N,), number of training steps done, in ascending order.
        value: (N,), values; some may be nan.
    """

    step: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]

    @property
    def last(self) -> float:
        return float(self.value[-1])


class Row(NamedTuple):
    """A row of ``metrics.csv``: line number, number of training steps done, and cells as text."""

    line: int
    num_steps: int
    cells: list[str]


class Table(NamedTuple):
    """Header and complete rows of ``metrics.csv``."""

    header: list[str]
    rows: list[Row]


def read_table(file: Path) -> Table:
    """Read the complete rows of ``metrics.csv``; rows without a step are left out.

    A last line without a line break was truncated by a crash. It is left out, because its last cell
    can lack digits.

    Raises:
        UserError: A step is not a number.
    """
    text = file.read_bytes().decode("utf-8", errors="replace")
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    header = next(reader, [])
    rows: list[Row] = []
    if "step" not in header:
        return Table(header, rows)
    for cells in reader:
        step = cells[header.index("step")] if len(cells) == len(header) else ""
        if step:
            try:
                rows.append(Row(reader.line_num, int(float(step)) + 1, cells))
            except ValueError:
                raise _not_numbers(file, Row(reader.line_num, 0, cells)) from None
    return Table(header, rows)


def read_columns(file: Path) -> dict[str, Series]:
    """Read the columns that hold at least one value, by name.

    Raises:
        UserError: A cell is not a number.
    """
    # Of two rows of one step the later one counts: a resumption trained the step again.
    values: dict[str, dict[int, float]] = {}
    table = read_table(file)
    for row in table.rows:
        for name, cell in zip(table.header, row.cells, strict=True):
            if cell and name not in ("step", "epoch"):
                try:
                    values.setdefault(name, {})[row.num_steps] = float(cell)
                except ValueError:
                    raise _not_numbers(file, row) from None
    columns = {}
    for name, by_step in values.items():
        steps = sorted(by_step)
        columns[name] = Series(np.array(steps), np.array([by_step[step] for step in steps]))
    return columns


def num_steps_trained(columns: dict[str, Series]) -> int:
    """Return the number of training steps that columns cover; 0 without training."""
    steps = [
        int(series.step[-1])
        for name, series in columns.items()
        # A separate validation writes a single row, with the step of its checkpoint.
        if name.startswith(("train/", "lr-")) or (name == "val/miou" and len(series.step) > 1)
    ]
    return max(steps, default=0)


def _not_numbers(file: Path, row: Row) -> UserError:
    return UserError(f"{file}, line {row.line}: expected numbers, got {row.cells}")
