"""``push RUN_OR_CHECKPOINT OWNER/NAME``: upload the network of a run to the hub."""

import os
import shutil
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from segformer_pl.analysis.report.model_card import (
    FIGURE,
    Dataset,
    Training,
    describe_training,
    model_card,
)
from segformer_pl.analysis.run import LAST_CHECKPOINT, Run
from segformer_pl.atomic import atomic_write_text, make_writable_folder
from segformer_pl.checkpoints import hub
from segformer_pl.checkpoints.conversion import save_pretrained
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.commands.options.parser import PROG
from segformer_pl.data.catalog import find_dataset
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor

BEST_CHECKPOINT = "best.ckpt"


def run(options: Namespace) -> None:
    """Run ``push RUN_OR_CHECKPOINT OWNER/NAME`` and print where the network is.

    Args:
        options: Options as ``options/push.py`` parses them.

    Raises:
        UserError: The checkpoint cannot be read, the name is none of a repository, or the hub
            refuses the upload or cannot be reached.
    """
    file = find_checkpoint(options.source)
    hub.check_name(options.repository)
    output = None if options.output is None else Path(options.output).expanduser()
    if output is not None and output.exists():
        raise UserError(f"--output: '{output}' exists already; remove it or give another path")
    checkpoint = RunCheckpoint.read(file, "SOURCE")
    predictor = Predictor.from_weights(checkpoint.weights())
    user = hub.log_in(options.repository) if output is None else ""
    training = _training(file, checkpoint, predictor)
    if output is not None:
        make_writable_folder(output.parent, "--output")
    with tempfile.TemporaryDirectory(dir=output and output.parent, prefix=".push-") as work:
        folder = Path(work) / "files"  # whole or not at all
        folder.mkdir()
        transformers_class = write(folder, predictor, training, options, checkpoint)
        said = f"{file} (step {training.step:,})"
        opener = "segformer_pl and transformers" if transformers_class else "segformer_pl alone"
        if output is None:
            message = f"{type(predictor.network).__name__}, step {training.step}"
            commit = hub.upload(folder, options.repository, user, options.private, message)
            lines = [
                f"pushed {said} to {options.repository}, for {opener}",
                f"use it: {PROG} predict --weights {options.repository}@{commit}",
            ]
        else:
            folder.rename(output)
            lines = [f"wrote {said} to '{output}', for {opener}; nothing is uploaded"]
    if not training.results:
        lines.append("no metrics: the run folder holds no evaluation of this step")
    if options.license is None:
        lines.append("no licence: the card says that none is stated; give --license if you know it")
    sys.stdout.write("\n  ".join(lines) + "\n")


def find_checkpoint(source: str) -> Path:
    """Return the checkpoint file that SOURCE names: itself, or the best or last one of a run.

    Raises:
        UserError: There is no such file or folder, or the folder holds no checkpoint.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"SOURCE: there is no run folder or checkpoint {source!r}; give one, such as "
            "runs/demo/version_0"
        )
    if not path.is_dir():
        return path  # RunCheckpoint says what is wrong with it
    folder = Run(path).checkpoint_folder
    files = [folder / BEST_CHECKPOINT, folder / LAST_CHECKPOINT]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            f"SOURCE: '{path}' holds no {files[0].relative_to(path)} and no "
            f"{files[1].relative_to(path)}; give a run folder, such as runs/demo/version_0, or a "
            "checkpoint"
        )
    return found


def write(
    folder: Path,
    predictor: Predictor,
    training: Training,
    options: Namespace,
    checkpoint: RunCheckpoint,
) -> str | None:
    """Write the files of the repository; return the class of transformers that opens them."""
    transformers_class = save_pretrained(predictor.network, folder, predictor.facts)
    card = model_card(
        predictor.network,
        predictor.class_names,
        transformers_class,
        training,
        options.repository,
        options.license,
        {"checkpoint": f"step {training.step:,}, SHA-256 {checkpoint.digest}..."},
    )
    atomic_write_text(folder / "README.md", str(card))
    if training.figure is not None:
        shutil.copyfile(training.figure, folder / FIGURE)
    return transformers_class


def _training(file: Path, checkpoint: RunCheckpoint, predictor: Predictor) -> Training:
    name = str(checkpoint.content["datamodule_hyper_parameters"].get("dataset"))
    protocol = describe_protocol(predictor.protocol)
    run = Run.of(file)
    if run is None:  # the checkpoint was moved
        return Training(_dataset(name), checkpoint.step, protocol)
    monitor = _monitor(file, checkpoint)
    return describe_training(run, checkpoint.step, _dataset(name), protocol, monitor)


def _dataset(name: str) -> Dataset:
    """Return what the catalogue, or the user's file, states about a data set."""
    try:
        entry = find_dataset(name)
    except (UserError, OSError):  # the user's file was on another machine
        return Dataset(Path(name).stem, Path(name).stem)
    title = entry.title or entry.name
    return Dataset(entry.name, title, entry.source, entry.hub, entry.revision)


def _monitor(file: Path, checkpoint: RunCheckpoint) -> str | None:
    """Return the metric that a ModelCheckpoint chose the checkpoint by; None if none did."""
    states = checkpoint.content.get("callbacks", {}).values()
    chosen = (
        state["monitor"]
        for state in states
        if isinstance(state, dict)
        and state.get("monitor")
        and os.path.basename(state.get("best_model_path", "")) == file.name
    )
    return next(chosen, None)


def describe_protocol(protocol: Inference) -> str:
    """Return the settings of a test-time protocol that differ from the default, as text."""
    default: dict[str, Any] = {one.name: one.default for one in fields(Inference)}
    given = {name: getattr(protocol, name) for name in default}
    changed = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if (tuple(value) if isinstance(value, list) else value) != default[name]
    }
    texts = [f"{name} {value}" for name, value in changed.items()]
    return ", ".join(texts) or "whole images at their own size, one pass"
