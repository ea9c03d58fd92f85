"""The numbers that a run logged, read back from its folder."""

import csv
from dataclasses import dataclass
from pathlib import Path

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
    # A run that was resumed into its own folder logs some steps twice: the later row is right.
    cells: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            if None in row.values() or not row.get("step"):
                continue  # cut short when the machine went down
            try:
                step = int(float(row["step"])) + 1
                for name, cell in row.items():
                    if cell and name not in ("step", "epoch"):
                        cells.setdefault(name, {})[step] = float(cell)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{file}, line {reader.line_num}: expected numbers, got {list(row.values())}"
                ) from None
    columns = {}
    for name, by_step in cells.items():
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
