"""A run that was resumed, once or more often, is one run with one folder and one history.

After resumptions at steps 400 and 900 its folder holds:

    config.yaml                                 of the start
    config_resumed_at_step_0000400.yaml         of each resumption
    config_resumed_at_step_0000900.yaml
    training_data.json                          data set, number and fingerprint of its rows
    metrics.csv                                 the rows of all parts, one after the other
    evaluation/ predictions/ worst/ erf/        the files of all parts, named by their steps
    superseded_after_step_0000900/              what the part before had left of later steps

What was left behind after the step that a resumption starts from (a run is killed some steps after
its last checkpoint) was left by other weights than those that go on. :func:`rewind` sets it aside.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.analysis.evaluation import EVALUATION_FOLDER
from segformer_pl.analysis.run_metrics import METRICS_FILE, read_table
from segformer_pl.atomic import atomic_write_text, make_writable_folder

CONFIG_FILE = "config.yaml"
FINDINGS_FILE = "findings.json"
TRAINING_DATA_FILE = "training_data.json"
TRAINING_DATA = ("dataset", "num_rows", "fingerprint")  # of the data's state in checkpoints
CHECKPOINT_FOLDER = "checkpoints"
FIGURE_FOLDERS = ("predictions", "worst", "erf")
# Each folder has files of one kind.
NUMBERED = re.compile(r"(?:step|(?:val|test)_step|config_resumed_at_step)_(\d+)\.(?:png|npz|yaml)")
CALLBACKS = "trainer.callbacks."
# Of where a part is stored and what it starts from, not of how it trains.
NOT_COMPARED = ("ckpt_path", "trainer.logger.", "trainer.default_root_dir")


@dataclass(frozen=True)
class Resumption:
    """A resumption, and the settings that it changed.

    Attributes:
        step: Training steps done before it.
        changes: By setting: its value before, and from here on.
    """

    step: int
    changes: dict[str, tuple[Any, Any]]


def resumed_config_name(step: int) -> str:
    """Name of the configuration file of a resumption, in the folder of the run."""
    return f"config_resumed_at_step_{step:07d}.yaml"


def run_dir_of(checkpoint: str | Path) -> Path | None:
    """The run folder whose ``checkpoints`` folder holds this file; None if there is none."""
    folder = Path(checkpoint).absolute().parent
    is_in_run = folder.name == CHECKPOINT_FOLDER and (folder.parent / CONFIG_FILE).is_file()
    return folder.parent if is_in_run else None


def read_config(file: Path) -> dict[str, Any]:
    """A saved configuration; empty if there is none, or none that is plain data."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def read_configs(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The configurations of a run, by the step that each holds from, the first one from step 0."""
    return {step: read_config(file) for step, file in config_files(run_dir).items()}


def config_files(run_dir: Path) -> dict[int, Path]:
    """The files of :func:`read_configs`; the first one need not exist."""
    # A run can be resumed before its first step; what came before then trained nothing.
    return {0: run_dir / CONFIG_FILE} | dict(sorted(_numbered(run_dir)))


def read_resumptions(run_dir: Path) -> list[Resumption]:
    """The resumptions of a run in the order of their steps, each compared with the part before."""
    parts = pairwise(read_configs(run_dir).items())
    return [Resumption(step, changes(old, new)) for (_, old), (step, new) in parts]


def read_training_data(run_dir: Path) -> dict[str, Any] | None:
    """``dataset``, ``num_rows`` and ``fingerprint`` of what a run trains on; None if not known."""
    try:
        content = json.loads((run_dir / TRAINING_DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or any(key not in content for key in TRAINING_DATA):
        return None
    return {key: content[key] for key in TRAINING_DATA}


def read_findings(run_dir: Path) -> list[str]:
    """What was said of the run's settings when it started, in sentences; empty if nothing was."""
    try:
        content = json.loads((run_dir / FINDINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(sentence) for sentence in content] if isinstance(content, list) else []


def rewind(run_dir: Path, step: int) -> Path | None:
    """Set aside what a run left behind after this step, of which training goes on.

    Nothing is lost: rows and files are moved into a folder of their own in that of the run.

    Returns:
        That folder; None if nothing was left behind.

    Raises:
        WriteError: A file cannot be written.
    """
    aside = _unused_folder(run_dir / f"superseded_after_step_{step:07d}")
    metrics = run_dir / METRICS_FILE
    if metrics.is_file():
        table = read_table(metrics)
        later = [row.cells for row in table.rows if row.num_steps > step]
        if later:
            make_writable_folder(aside)
            atomic_write_text(aside / METRICS_FILE, _as_csv(table.header, later))
        kept = [row.cells for row in table.rows if row.num_steps <= step]
        atomic_write_text(metrics, _as_csv(table.header, kept))
    for name in (".", EVALUATION_FOLDER, *FIGURE_FOLDERS):
        for number, file in list(_numbered(run_dir / name)):
            # The configuration of a resumption at this very step is that of the one at hand.
            if number > step:
                make_writable_folder(aside / name)
                file.rename(aside / name / file.name)
    return aside if aside.is_dir() else None


def _unused_folder(folder: Path) -> Path:
    """This one, or one with a number after it: a run can be killed again before it gets ahead."""
    names = (folder.with_name(f"{folder.name}_{number}") for number in count(2))
    return next(one for one in chain([folder], names) if not one.exists())


def _as_csv(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := NUMBERED.fullmatch(file.name):
            yield int(match[1]), file


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two configurations, each with both values."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return without_parts(
        {
            key: (before.get(key), after.get(key))
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and not f"{key}.".startswith(NOT_COMPARED)
        }
    )


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration by dotted key.

    Callbacks go by the names of their classes rather than by their places in the list, which
    another callback changes: ``trainer.callbacks.ModelCheckpoint`` is the path of the class, and
    its arguments follow below that key. A second one of a class is ``ModelCheckpoint.2``.
    """
    if prefix == CALLBACKS:
        yield from _callbacks(tree)
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{prefix}{number}.")
    else:
        yield prefix.rstrip("."), tree


def _callbacks(tree: Any) -> Iterator[tuple[str, Any]]:
    count: Counter[str] = Counter()
    for callback in tree if isinstance(tree, list) else [tree]:
        if not isinstance(callback, dict) or "class_path" not in callback:
            continue
        path = str(callback["class_path"])
        name = path.rpartition(".")[2]
        count[name] += 1
        key = f"{CALLBACKS}{name}" + (f".{count[name]}" if count[name] > 1 else "")
        yield key, path
        if arguments := callback.get("init_args"):
            yield from leaves(arguments, f"{key}.")


def without_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the arguments of a callback that is listed itself."""
    listed = tuple(f"{key}." for key in settings if key.startswith(CALLBACKS))
    return {key: value for key, value in settings.items() if not key.startswith(listed)}
