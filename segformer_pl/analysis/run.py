"""A run as an object: everything that a training, validation or test wrote into its folder.

After resumptions at steps 400 and 900 the folder of a training holds::

    config.yaml                             configuration of the start
    config_resumed_at_step_0000400.yaml     configuration of each resumption
    config_resumed_at_step_0000900.yaml
    hparams.yaml                            class names and palette
    training_data.json                      data set, number of rows and fingerprint
    findings.json                           warnings about the settings of the last part
    wandb_run_id.txt                        id of its run at Weights & Biases
    wandb_media.json                        last steps of the images and tables logged there
    ranks.json                              ranks and images per step of each part
    throughput.json                         throughput of the ranks in the last part
    provenance.json                         command, code, hardware, duration of each part
    metrics.csv                             the rows of all parts, one after the other
    evaluation/ predictions/ worst/ erf/    the files of all parts, named by their steps
    checkpoints/                            last.ckpt, and the files of other callbacks
    superseded_after_step_0000900/          files of steps after 900 from before the resumption

The folder of a run of an ablation study also holds::

    ablation.json                           study, variant, seed, budget and digest of the settings
    evaluations/NAME/                       folder of an additional `validate` of the finished run
    failure.txt                             last sentence of a failure

:class:`Run` is the only reader of these files in the package.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
    ImageCount,
    load_evaluation,
)
from segformer_pl.analysis.metrics_table import Series, num_steps_trained, read_columns
from segformer_pl.analysis.provenance import RunPart
from segformer_pl.analysis.throughput import Throughput
from segformer_pl.errors import UserError

CONFIG_FILE = "config.yaml"
HYPERPARAMETERS_FILE = "hparams.yaml"  # Lightning's
METRICS_FILE = "metrics.csv"  # Lightning's
FINDINGS_FILE = "findings.json"
WANDB_FILE = "wandb_run_id.txt"
WANDB_MEDIA_FILE = "wandb_media.json"
RANKS_FILE = "ranks.json"
THROUGHPUT_FILE = "throughput.json"
PROVENANCE_FILE = "provenance.json"
ABLATION_FILE = "ablation.json"
FAILURE_FILE = "failure.txt"
NAMED_EVALUATIONS = "evaluations"
TRAINING_DATA_FILE = "training_data.json"
TRAINING_DATA = ("dataset", "num_rows", "fingerprint")  # keys of the data state in checkpoints
CHECKPOINT_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
FIGURE_FOLDERS = ("predictions", "worst", "erf")
# Names of files with a step. Each folder has files of one kind.
NUMBERED = re.compile(r"(?:step|(?:val|test)_step|config_resumed_at_step)_(\d+)\.(?:png|npz|yaml)")


@dataclass(frozen=True)
class Resumption:
    """A resumption and the settings that it changed.

    Attributes:
        step: Number of training steps done before it.
        changes: Changed settings by dotted key, with the value before and the value after.
    """

    step: int
    changes: dict[str, tuple[Any, Any]]


class EvaluationFile(NamedTuple):
    """The file of an evaluation, with the step and the split that are stored in it.

    They can differ from the name of the file: Lightning counts a separate validation as step 0,
    also that of a checkpoint of step 1600.

    Attributes:
        step: Number of training steps of the evaluated network.
        split: ``val`` or ``test``.
        file: Path of the file.
    """

    step: int
    split: str
    file: Path

    def load(self) -> Evaluation:
        """Read the evaluation.

        Raises:
            UserError: The file is damaged.
        """
        return load_evaluation(self.file)

    @property
    def images(self) -> ImageCount | None:
        """How many images of the split were evaluated; None if the file is damaged."""
        try:
            with self.file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                total = int(archive["split_size"]) if "split_size" in archive else None
                return ImageCount(len(archive["ids"]), total)
        except DAMAGES:
            return None


class Run:
    """The files that a training, or a separate validation or test, wrote into its folder.

    Every file is read once, on first access. A file that does not exist reads as empty and raises
    no error, except for ``metrics.csv``. Treat all values as read-only, because they are cached.

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
        """Return the run of a checkpoint or evaluation; None if the file is in no run folder."""
        folder = Path(file).absolute().parent
        run = cls(folder.parent)
        is_in_run = folder.name in (CHECKPOINT_FOLDER, EVALUATION_FOLDER)
        return run if is_in_run and run.config_file.is_file() else None

    @property
    def name(self) -> str:
        """Name of the run, such as ``demo/version_0``."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}"

    # Settings

    @property
    def config_file(self) -> Path:
        """Path of the complete configuration with which the run started."""
        return self.folder / CONFIG_FILE

    @cached_property
    def config_text(self) -> str:
        """Content of :attr:`config_file`; empty if there is none."""
        file = self.config_file
        return file.read_text("utf-8", errors="replace") if file.is_file() else ""

    @cached_property
    def configs(self) -> dict[int, dict[str, Any]]:
        """Configurations of the run by the step from which each applies, the first from step 0.

        The first one is empty if there is no ``config.yaml``.

        Raises:
            UserError: One of the files cannot be read.
        """
        # If the run was resumed at step 0, that configuration replaces the first one, which has
        # trained no step.
        files = {0: self.config_file} | dict(numbered_files(self.folder))
        return {step: _read_yaml(file) for step, file in files.items()}

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the last part of the run, which is that of the final network.

        Raises:
            UserError: One of the files cannot be read.
        """
        return list(self.configs.values())[-1]

    @cached_property
    def resumptions(self) -> list[Resumption]:
        """Resumptions in the order of their steps, each compared with the part before it.

        Raises:
            UserError: One of the configurations cannot be read.
        """
        parts = pairwise(self.configs.items())
        ranks = self.ranks
        return [
            Resumption(step, changes(old, new) | changes(ranks.get(before, {}), ranks[step]))
            if step in ranks
            else Resumption(step, changes(old, new))
            for (before, old), (step, new) in parts
        ]

    @cached_property
    def ranks(self) -> dict[int, dict[str, int]]:
        """Number of ``ranks`` and ``images per step`` by the step from which they apply.

        The configuration does not state them if a launcher sets the number of ranks.
        """
        content = _read_json(self.folder / RANKS_FILE)
        if not isinstance(content, dict):
            return {}
        return {int(step): part for step, part in content.items() if step.isdecimal()}

    @cached_property
    def throughput(self) -> Throughput | None:
        """Throughput of the ranks since the last resumption; None if it was not recorded."""
        return Throughput.of(_read_json(self.folder / THROUGHPUT_FILE))

    @cached_property
    def parts(self) -> list[RunPart]:
        """Processes that trained or evaluated here, in order; empty if they were not recorded."""
        return RunPart.list_of(_read_json(self.folder / PROVENANCE_FILE))

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """Arguments of the task, among them ``class_names`` and ``palette``.

        Empty if the file is not plain YAML: Lightning writes arbitrary Python objects into it.
        """
        try:
            return _read_yaml(self.folder / HYPERPARAMETERS_FILE)
        except UserError:
            return {}

    @cached_property
    def training_data(self) -> TrainingData | None:
        """Training images of the run; None if they are not known."""
        content = _read_json(self.folder / TRAINING_DATA_FILE)
        if not isinstance(content, dict) or any(key not in content for key in TRAINING_DATA):
            return None
        data = {key: content[key] for key in TRAINING_DATA}
        # A fingerprint is "layout-contents". The layout depends on file names, which may change, so
        # use the contents only. Fingerprints of old runs have one part.
        return TrainingData(**data | {"fingerprint": str(data["fingerprint"]).rpartition("-")[2]})

    @cached_property
    def findings(self) -> list[str]:
        """Warnings about the settings of the last part of the run, one sentence each."""
        content = _read_json(self.folder / FINDINGS_FILE)
        return [str(sentence) for sentence in content] if isinstance(content, list) else []

    @property
    def wandb_id(self) -> str | None:
        """Id of the run at Weights & Biases; None if it was not logged there."""
        file = self.folder / WANDB_FILE
        return file.read_text("utf-8").strip() or None if file.is_file() else None

    @cached_property
    def wandb_media(self) -> dict[str, int]:
        """Last step at which images and tables were logged to the present W&B run, by key."""
        content = _read_json(self.folder / WANDB_MEDIA_FILE)
        if not isinstance(content, dict) or content.get("run") != self.wandb_id:
            return {}
        return content.get("last steps", {})

    @property
    def ablation_file(self) -> Path:
        """Path of the place of the run in an ablation study, which `ablate` writes."""
        return self.folder / ABLATION_FILE

    @cached_property
    def ablation(self) -> dict[str, Any] | None:
        """Place of the run in an ablation study, such as ``variant`` and ``seed``.

        None if there is no such file, or if it is damaged.
        """
        content = _read_json(self.ablation_file)
        return content if isinstance(content, dict) else None

    @property
    def failure_file(self) -> Path:
        """Path of the last sentence of a failed run of a study, which `ablate` writes."""
        return self.folder / FAILURE_FILE

    @cached_property
    def failure(self) -> str | None:
        """Last sentence of a failed run of a study; None if it has not failed."""
        file = self.failure_file
        return file.read_text("utf-8", errors="replace").strip() if file.is_file() else None

    def configuration(self, step: int) -> Configuration | None:
        """Return the configuration with which the network of an evaluation was trained.

        The folder of a ``fit`` holds it. The folder of a ``validate`` or ``test`` holds the
        evaluation protocol, and its ``--ckpt_path`` leads to the run that trained the network.

        Args:
            step: Number of training steps before the evaluation; settings that changed later do not
                count.

        Returns:
            The configuration, or None if there is no ``config.yaml``, or no run folder around the
            checkpoint.

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
        """Path of ``metrics.csv``, written by Lightning's CSVLogger as the first logger."""
        return self.folder / METRICS_FILE

    @cached_property
    def metrics(self) -> dict[str, Series]:
        """Columns of ``metrics.csv`` that hold at least one value, by name.

        Lightning logs the index of the step, from 0. Here it is the number of steps done, as in the
        names of checkpoints and figures.

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
                f"no {METRICS_FILE} in {self.folder}, from which the report is made: give the "
                "folder of one run, logged with Lightning's CSVLogger as the first logger"
            )
        return read_columns(self.metrics_file)

    @property
    def num_steps(self) -> int:
        """Number of training steps that the metrics cover; 0 without training.

        Raises:
            FileNotFoundError: There is no such folder, or it holds no ``metrics.csv``.
            UserError: A cell is not a number.
        """
        return num_steps_trained(self.metrics)

    @cached_property
    def evaluations(self) -> list[EvaluationFile]:
        """Evaluations in the order of the steps stored in them, ``test`` before ``val``."""
        files = (self.folder / EVALUATION_FOLDER).glob("*.npz")
        evaluations = [
            _evaluation_file(file, match)
            for file in files
            if (match := re.fullmatch(r"(val|test)_step_(\d+)\.npz", file.name))
        ]
        return sorted(evaluations, key=lambda one: (one.step, one.split == "val", one.file))

    @property
    def named_evaluation_folder(self) -> Path:
        """Folder of the additional evaluations of a run of a study, each in a folder by name."""
        return self.folder / NAMED_EVALUATIONS

    @cached_property
    def named_evaluations(self) -> dict[str, "Run"]:
        """Additional evaluations of a run of a study by name, each a run of its own."""
        folders = sorted(self.named_evaluation_folder.glob("*"))
        return {folder.name: run for folder in folders if (run := Run(folder)).evaluations}

    def last_evaluation(self) -> Evaluation:
        """Read the evaluation after the largest number of training steps.

        Raises:
            UserError: The folder holds no evaluation, or the last one is damaged.
        """
        if not self.evaluations:
            raise UserError(
                f"'{self.folder}' holds no {EVALUATION_FOLDER}/val_step_*.npz, which every "
                "validation writes into its run folder; give the folder of one run, such as "
                "runs/demo/version_0, or that of `python -m segformer_pl validate`"
            )
        return self.evaluations[-1].load()

    def figures(self, kind: str) -> dict[int, Path]:
        """Return the PNG files in ``predictions``, ``worst`` or ``erf`` by training step."""
        return dict(numbered_files(self.folder / kind))

    # Checkpoints

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / CHECKPOINT_FOLDER

    @property
    def last_checkpoint(self) -> Path:
        """Path of the checkpoint from which training resumes; it need not exist."""
        return self.checkpoint_folder / LAST_CHECKPOINT

    @property
    def checkpoints(self) -> list[Path]:
        """Files of all checkpoints, sorted by name."""
        return sorted(self.checkpoint_folder.glob("*.ckpt"))


def resumed_config_name(step: int) -> str:
    """Return the name of the configuration file of a resumption."""
    return f"config_resumed_at_step_{step:07d}.yaml"


def numbered_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the files in a folder that are named by a training step: (step, file), ascending."""
    matches = {file: NUMBERED.fullmatch(file.name) for file in folder.glob("*")}
    return sorted((int(match[1]), file) for file, match in matches.items() if match)


def _read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file as plain data; empty if there is no such file."""
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
    """Read a JSON file; None if it is missing or damaged, because these files are optional."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _evaluation_file(file: Path, name: re.Match[str]) -> EvaluationFile:
    """Read only the step and the split of an evaluation."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return EvaluationFile(int(archive["step"]), str(archive["split"]), file)
    except DAMAGES:  # `load` raises an error; for sorting, use the step in the name
        return EvaluationFile(int(name[2]), name[1], file)
