"""The numbers that a run logged, read back from its folder."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

METRICS_FILE = "metrics.csv"


@dataclass(frozen=True)
class Series:
    """One column of metrics.csv.

    step: (N,) number of training steps done, ascending. value: (N,) may hold nan.
    """

    step: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]

    @property
    def last(self) -> float:
        return float(self.value[-1])


class Row(NamedTuple):
    """A row of metrics.csv: its line in the file, training steps done, and its cells as text."""

    line: int
    num_steps: int
    cells: list[str]


class Table(NamedTuple):
    """The header and the complete rows of metrics.csv."""

    header: list[str]
    rows: list[Row]


def read_table(file: Path) -> Table:
    """The complete rows of ``metrics.csv``; rows without a step are left out.

    A line that was cut short when the machine went down is left out too: its last cell can be
    missing digits.

    Raises:
        ValueError: a step is not a number.
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


def _not_numbers(file: Path, row: Row) -> ValueError:
    return ValueError(f"{file}, line {row.line}: expected numbers, got {row.cells}")


def read_metrics(run_dir: Path) -> dict[str, Series]:
    """The columns of ``metrics.csv`` that hold at least one value, by name.

    Lightning counts from 0 the step in which a value is logged; here it is the number of steps
    done, which is also what checkpoints and figures are named after.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no ``metrics.csv``.
        ValueError: a cell is not a number.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"no run folder {run_dir}: give the folder that holds {METRICS_FILE}, such as "
            "runs/demo/version_0"
        )
    file = run_dir / METRICS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no {METRICS_FILE} in {run_dir}, and the report is made from it: give the folder of "
            "one run, logged with Lightning's CSVLogger as the first logger"
        )
    # Of two rows of one step the later is right: the step was trained again.
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
    """How many training steps the values come from, 0 if there was no training."""
    trained = [
        int(series.step[-1])
        for name, series in columns.items()
        # A validation pass of its own is logged as the first step.
        if name.startswith(("train/", "lr-")) or (name == "val/miou" and series.step[-1] > 1)
    ]
    return max(trained, default=0)
