"""The provenance of a run: command, code, package versions, hardware, duration and end."""

import json
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from segformer_pl.analysis.provenance import (
    FINISHED,
    RunPart,
    code_commit,
    cpu_name,
    package_versions,
)
from segformer_pl.analysis.run import PROVENANCE_FILE, Run
from segformer_pl.atomic import WriteError, atomic_write_text
from segformer_pl.callbacks.figures import leaves_files, run_folder
from segformer_pl.callbacks.signals import signal_name
from segformer_pl.errors import Interrupted, UserError, brief, find_user_error


class RunProvenance(pl.Callback):
    """Writes ``provenance.json``, for the report: what ran, on what, how long, and how it ended.

    Every process that trains or evaluates in the run folder adds a
    :class:`~segformer_pl.analysis.provenance.RunPart`. Its duration is brought up to date after
    every validation, so that one that is killed has one too.

    Args:
        command: Command line of this process; empty for a run that is started in Python.
        explain: Function that returns the sentence with which an error is recorded, or None for its
            type and the first line of its text. Default: the sentence of a user's error.
    """

    def __init__(
        self,
        command: Sequence[str] = (),
        explain: Callable[[Exception], UserError | str | None] = find_user_error,
    ) -> None:
        self.command = shlex.join(command)
        self.explain = explain
        self._begin = 0.0
        self._started = ""
        self._earlier: list[RunPart] = []
        self._part: RunPart | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._begin = time.monotonic()
        self._started = datetime.now().astimezone().isoformat(timespec="seconds")
        self._part = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer, "fit", trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._add(trainer, "validate", pl_module.trained_steps)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._add(trainer, "test", pl_module.trained_steps)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._update(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._update(trainer, FINISHED)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._part is not None:
            self._update(trainer, self._describe(exception))

    def _describe(self, exception: BaseException) -> str:
        if isinstance(exception, KeyboardInterrupt):
            return signal_name(signal.SIGINT)
        if isinstance(exception, Interrupted):
            return signal_name(int(exception.code or 0) - 128)
        if not isinstance(exception, Exception):
            return f"error: {exception!r}"
        sentence = self.explain(exception)
        return f"error: {brief(exception) if sentence is None else sentence}"

    def _add(self, trainer: pl.Trainer, stage: str, step: int) -> None:
        if not trainer.is_global_zero or not trainer.loggers or not leaves_files(trainer):
            return
        self._earlier = Run(run_folder(trainer)).parts
        device = trainer.strategy.root_device
        versions = package_versions() | {"torch": torch.__version__}  # with its build
        if device.type == "cuda" and torch.version.cuda:
            versions["CUDA"] = torch.version.cuda
        self._part = RunPart(
            stage=stage,
            step=step,
            command=self.command,
            started=self._started,
            seconds=0.0,
            is_ended=False,
            hardware=_hardware(trainer, device),
            commit=code_commit(),
            versions=versions,
            last_step=step,
        )
        self._update(trainer)

    def _update(self, trainer: pl.Trainer, end: str = "") -> None:
        if self._part is None:  # another rank, or before the start
            return
        seconds = round(time.monotonic() - self._begin, 1)
        is_fit = self._part.stage == "fit"
        last_step = trainer.global_step if is_fit else self._part.step
        self._part = replace(
            self._part, seconds=seconds, is_ended=bool(end), end=end, last_step=last_step
        )
        parts = [asdict(part) for part in (*self._earlier, self._part)]
        try:
            atomic_write_text(
                run_folder(trainer) / PROVENANCE_FILE, json.dumps(parts, indent=1) + "\n"
            )
        except WriteError as error:  # no reason to end a training
            rank_zero_warn(f"{error}; the report will not show how long the run took")


def _hardware(trainer: pl.Trainer, device: torch.device) -> str:
    """Describe the devices of all ranks by that of rank 0."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{cpu_name()} ({threads} thread{'s' * (threads > 1)})"
    else:
        name = f"{device.type} of {cpu_name()}"
    count = "" if trainer.world_size == 1 else f"{trainer.world_size} x "
    nodes = "" if trainer.num_nodes == 1 else f" on {trainer.num_nodes} nodes"
    return f"{count}{name}{nodes}"
