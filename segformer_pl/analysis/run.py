"""A run as an object: everything that a training, a validation or a test left in its folder.

After resumptions at steps 400 and 900 the folder of a training holds:

    config.yaml                                 of the start
    config_resumed_at_step_0000400.yaml         of each resumption
    config_resumed_at_step_0000900.yaml
    hparams.yaml                                class names and palette
    training_data.json                          data set, number and fingerprint of its rows
    findings.json                               what was said of the settings at the start
    metrics.csv                                 the rows of all parts, one after the other
    evaluation/ predictions/ worst/ erf/        the files of all parts, named by their steps
    checkpoints/                                last.ckpt and what other callbacks keep
    superseded_after_step_0000900/              what the part before had left of later steps

Nothing else in the package reads these files: :class:`Run` does, and hands out what they say.
"""

import csv
import io
import json
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from segformer_pl.analysis.configuration import (
    Configuration,
    TrainingData,
    changes,
    is_evaluation,
    training_configuration,
)
from segformer_pl.analysis.evaluation import (
    DAMAGES,
    EVALUATION_FOLDER,
    Evaluation,
    load_evaluation,
)
from segformer_pl.errors import UserError

CONFIG_FILE = "config.yaml"
HYPERPARAMETERS_FILE = "hparams.yaml"  # Lightning's
METRICS_FILE = "metrics.csv"  # Lightning's
FINDINGS_FILE = "findings.json"
TRAINING_DATA_FILE = "training_data.json"
TRAINING_DATA = ("dataset", "num_rows", "fingerprint")  # of the data's state in checkpoints
CHECKPOINT_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
FIGURE_FOLDERS = ("predictions", "worst", "erf")
# Each folder has files of one kind.
NUMBERED = re.compile(r"(?:step|(?:val|test)_step|config_resumed_at_step)_(\d+)\.(?:png|npz|yaml)")


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


@dataclass(frozen=True)
class Resumption:
    """A resumption, and the settings that it changed.

    Attributes:
        step: Training steps done before it.
        changes: By setting: its value before, and from here on.
    """

    step: int
    changes: dict[str, tuple[Any, Any]]


class EvaluationFile(NamedTuple):
    """An evaluation of a run, labelled by what is stored in it and not by its name.

    A validation of a checkpoint of step 1600 is one of step 1600, whatever Lightning counted.

    Attributes:
        step: Training steps of the network that was evaluated.
        split: ``val`` or ``test``.
        file: Where it is stored.
    """

    step: int
    split: str
    file: Path

    def load(self) -> Evaluation:
        """Read the whole file.

        Raises:
            UserError: It is damaged; one sentence names the file.
        """
        return load_evaluation(self.file)


class Run:
    """What a training, or a validation or test of its own, left in its folder.

    Each file is read when it is first asked for, and once. What was never written is empty, and
    does not raise. Nothing that is handed out may be changed.

    Args:
        folder: Run folder, such as ``runs/demo/version_0``.

    Example:
        >>> run = Run("runs/demo/version_0")
        >>> run.config["model"]["lr"], run.metrics["val/miou"].last, run.evaluations[-1].step
        (0.003, 0.865, 1600)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def of(cls, file: str | Path) -> "Run | None":
        """The run that left this checkpoint or evaluation; None if it lies in no run folder."""
        folder = Path(file).absolute().parent
        run = cls(folder.parent)
        is_in_run = folder.name in (CHECKPOINT_FOLDER, EVALUATION_FOLDER)
        return run if is_in_run and run.config_file.is_file() else None

    @property
    def name(self) -> str:
        """Such as ``demo/version_0``."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}"

    # Settings

    @property
    def config_file(self) -> Path:
        """The configuration that the run started with, every value of it."""
        return self.folder / CONFIG_FILE

    @cached_property
    def config_text(self) -> str:
        """The content of :attr:`config_file`; empty if there is none."""
        file = self.config_file
        return file.read_text("utf-8", errors="replace") if file.is_file() else ""

    @cached_property
    def configs(self) -> dict[int, dict[str, Any]]:
        """The configurations of the run, by the step that each holds from, the first from step 0.

        The first one is empty if there is no ``config.yaml``.

        Raises:
            UserError: One of the files cannot be read.
        """
        # A run can be resumed before its first step; what came before then trained nothing.
        files = {0: self.config_file} | dict(numbered_files(self.folder))
        return {step: _read_yaml(file) for step, file in files.items()}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the latest part: that of the network that is there in the end.

        Raises:
            UserError: One of the files cannot be read.
        """
        return list(self.configs.values())[-1]

    @cached_property
    def resumptions(self) -> list[Resumption]:
        """In the order of their steps, each compared with the part before.

        Raises:
            UserError: One of the configurations cannot be read.
        """
        parts = pairwise(self.configs.items())
        return [Resumption(step, changes(old, new)) for (_, old), (step, new) in parts]

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """``class_names``, ``palette`` and other arguments of the task, as far as they are plain.

        Empty if the file cannot be read: Lightning writes any object of Python into it.
        """
        try:
            return _read_yaml(self.folder / HYPERPARAMETERS_FILE)
        except UserError:
            return {}

    @cached_property
    def training_data(self) -> TrainingData | None:
        """What the run trains on; None if that is not known."""
        content = _read_json(self.folder / TRAINING_DATA_FILE)
        if not isinstance(content, dict) or any(key not in content for key in TRAINING_DATA):
            return None
        data = {key: content[key] for key in TRAINING_DATA}
        # The layout before the dash holds names of files; contents are hashed after it, if at all.
        return TrainingData(**data | {"fingerprint": str(data["fingerprint"]).rpartition("-")[2]})

    @cached_property
    def findings(self) -> list[str]:
        """What was said of the run's settings when it started, in sentences."""
        content = _read_json(self.folder / FINDINGS_FILE)
        return [str(sentence) for sentence in content] if isinstance(content, list) else []

    def configuration(self, step: int) -> Configuration | None:
        """What the network that an evaluation of this run scored was trained with.

        The folder of a ``fit`` tells it. That of a ``validate`` or ``test`` tells how the network
        was scored, and by ``--ckpt_path`` in which run it was trained.

        Args:
            step: Training steps before the evaluation; settings that changed later do not count.

        Returns:
            None where that is not known: there is no ``config.yaml``, or the run that was trained
            is not where the checkpoint was.

        Raises:
            UserError: A configuration cannot be read.
        """
        trained, protocol, config = self, None, self.configs[0]
        if is_evaluation(config):
            if config.get("ckpt_path") is None:
                return None
            trained = Run(Path(config["ckpt_path"]).parent.parent)  # RUN/checkpoints/FILE
            protocol = {"inference": (config.get("model") or {}).get("inference")}
        if not trained.config_file.is_file():
            return None
        parts = {n: part for n, part in trained.configs.items() if n == 0 or n < step}
        return training_configuration(parts, trained.training_data, protocol)

    # Results

    @property
    def metrics_file(self) -> Path:
        """What the first logger, a CSVLogger of Lightning, wrote."""
        return self.folder / METRICS_FILE

    @cached_property
    def metrics(self) -> dict[str, Series]:
        """The columns of ``metrics.csv`` that hold at least one value, by name.

        Lightning counts from 0 the step in which a value is logged; here it is the number of steps
        done, which is also what checkpoints and figures are named after.

        Raises:
            FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
            UserError: A cell is not a number.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"no run folder {self.folder}: give the folder that holds {METRICS_FILE}, such as "
                "runs/demo/version_0"
            )
        if not self.metrics_file.is_file():
            raise FileNotFoundError(
                f"no {METRICS_FILE} in {self.folder}, and the report is made from it: give the "
                "folder of one run, logged with Lightning's CSVLogger as the first logger"
            )
        # Of two rows of one step the later is right: the step was trained again.
        values: dict[str, dict[int, float]] = {}
        table = read_table(self.metrics_file)
        for row in table.rows:
            for name, cell in zip(table.header, row.cells, strict=True):
                if cell and name not in ("step", "epoch"):
                    try:
                        values.setdefault(name, {})[row.num_steps] = float(cell)
                    except ValueError:
                        raise _not_numbers(self.metrics_file, row) from None
        columns = {}
        for name, by_step in values.items():
            steps = sorted(by_step)
            columns[name] = Series(np.array(steps), np.array([by_step[step] for step in steps]))
        return columns

    @property
    def num_steps(self) -> int:
        """Training steps that the metrics come from, 0 if there was no training.

        Raises:
            FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
            UserError: A cell is not a number.
        """
        return num_steps_trained(self.metrics)

    @cached_property
    def evaluations(self) -> list[EvaluationFile]:
        """By the steps stored in them; at equal steps ``val`` comes after ``test``."""
        files = (self.folder / EVALUATION_FOLDER).glob("*.npz")
        found = [
            _stored_label(file, match)
            for file in files
            if (match := re.fullmatch(r"(val|test)_step_(\d+)\.npz", file.name))
        ]
        return sorted(found, key=lambda one: (one.step, one.split == "val", one.file))

    def last_evaluation(self) -> Evaluation:
        """Read the evaluation of the most training steps.

        Raises:
            UserError: The folder holds no evaluation, or the last one is damaged; one sentence
                says which.
        """
        if not self.evaluations:
            raise UserError(
                f"'{self.folder}' holds no {EVALUATION_FOLDER}/val_step_*.npz, which every "
                "validation leaves in the folder of its run; give the folder of one run, such as "
                "runs/demo/version_0, or that of `python -m segformer_pl validate`"
            )
        return self.evaluations[-1].load()

    def figures(self, kind: str) -> dict[int, Path]:
        """The PNG files of ``predictions``, ``worst`` or ``erf``, by training step, ascending."""
        return dict(numbered_files(self.folder / kind))

    # Checkpoints

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / CHECKPOINT_FOLDER

    @property
    def last_checkpoint(self) -> Path:
        """Where the checkpoint lies that training goes on from; it need not exist."""
        return self.checkpoint_folder / LAST_CHECKPOINT

    @property
    def checkpoints(self) -> list[Path]:
        """By name."""
        return sorted(self.checkpoint_folder.glob("*.ckpt"))


def resumed_config_name(step: int) -> str:
    """Name of the configuration file of a resumption, in the folder of the run."""
    return f"config_resumed_at_step_{step:07d}.yaml"


def numbered_files(folder: Path) -> list[tuple[int, Path]]:
    """The files of a run that are named by a training step, with that step, ascending."""
    matches = {file: NUMBERED.fullmatch(file.name) for file in folder.glob("*")}
    return sorted((int(match[1]), file) for file, match in matches.items() if match)


def read_table(file: Path) -> Table:
    """The complete rows of ``metrics.csv``; rows without a step are left out.

    A line that was cut short when the machine went down is left out too: its last cell can be
    missing digits.

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


def num_steps_trained(columns: dict[str, Series]) -> int:
    """How many training steps the values come from, 0 if there was no training."""
    trained = [
        int(series.step[-1])
        for name, series in columns.items()
        # A validation of its own leaves one row, which has the step of its checkpoint.
        if name.startswith(("train/", "lr-")) or (name == "val/miou" and len(series.step) > 1)
    ]
    return max(trained, default=0)


def _not_numbers(file: Path, row: Row) -> UserError:
    return UserError(f"{file}, line {row.line}: expected numbers, got {row.cells}")


def _read_yaml(file: Path) -> dict[str, Any]:
    """Plain data; empty if there is no such file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{file}' cannot be read as YAML ({reason}); give another run") from error
    if not isinstance(content, dict):
        raise UserError(f"'{file}' does not hold the settings of a run; give another run")
    return content


def _read_json(file: Path) -> Any:
    """None if there is no such file, or none of JSON: these notes are worth no failure."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _stored_label(file: Path, name: re.Match[str]) -> EvaluationFile:
    """Read the split and the step of an evaluation, and none of its arrays."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return EvaluationFile(int(archive["step"]), str(archive["split"]), file)
    except DAMAGES:  # `load` says so; until then it is where its name puts it
        return EvaluationFile(int(name[2]), name[1], file)
