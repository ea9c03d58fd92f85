"""Images per second, waiting for data and step time of every rank."""

import json
import time
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from segformer_pl.analysis.run import THROUGHPUT_FILE
from segformer_pl.analysis.throughput import RankThroughput, Throughput
from segformer_pl.atomic import WriteError, atomic_write_text
from segformer_pl.callbacks.figures import leaves_files, run_folder
from segformer_pl.lightning_workarounds import is_accumulating

FETCH = ".train_dataloader_next"  # end of the name of Lightning's profiled action
TOTALS = ("images", "batches", "seconds", "data_seconds", "forward_seconds")


class ThroughputRecord(pl.Callback):
    """Logs throughput, step time and waiting for data, and records them for every rank.

    Every ``trainer.log_every_n_steps`` steps the ranks exchange their totals, five numbers each,
    and three values of the steps since then are logged:

    - ``train/images_per_second`` of all ranks together;
    - ``train/step_time``, the duration of an optimiser step in seconds;
    - ``train/data_wait``, the share of the time in which the rank that waited longest for its data
      loader did so.

    Rank 0 writes the totals of every rank to ``throughput.json``, for the report, which names
    stragglers (:meth:`~segformer_pl.analysis.throughput.Throughput.remarks`). Checkpoints count as
    training time, validations do not, nor do the first batch and each one after a validation. The
    command line attaches this callback to every run.

    Lightning's ``ThroughputMonitor`` measures rank 0 alone, waits for the GPU in every batch, and
    does not tell data from computation; its ``DeviceStatsMonitor`` logs memory.
    """

    def __init__(self) -> None:
        self._timer: FetchTimer | None = None
        self._hook: Any = None
        self._totals: Tensor = torch.zeros(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._totals = torch.zeros(trainer.world_size, len(TOTALS), dtype=torch.float64)
        self._window = dict.fromkeys(TOTALS, 0.0)
        self._previous: float | None = None  # end of the batch before, unless it does not count
        self._forward = ForwardClock(trainer.strategy.root_device)
        # DDP calls the module after it has exchanged buffers, for which ranks wait.
        self._hook = pl_module.register_forward_pre_hook(lambda *_: self._forward.begin())
        self._timer = FetchTimer(trainer.profiler)  # type: ignore[attr-defined]
        trainer.profiler = self._timer  # type: ignore[attr-defined]

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._forward.begin()

    def on_before_backward(self, *arguments: Any) -> None:
        self._forward.end()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._timer is not None
        now = time.perf_counter()
        data_seconds = self._timer.take()
        counts = self._previous is not None
        self._forward.keep(counts)
        if self._previous is not None:
            self._window["images"] += len(batch["image"])
            self._window["batches"] += 1
            self._window["seconds"] += now - self._previous
            self._window["data_seconds"] += data_seconds
        self._previous = now
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every and trainer.global_step % every == 0 and not is_accumulating(trainer)
        if is_due and self._window["batches"]:
            self._exchange(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._previous = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release(trainer)

    def on_exception(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._release(trainer)

    def _release(self, trainer: pl.Trainer) -> None:
        if self._timer is not None:
            trainer.profiler = self._timer.profiler  # type: ignore[attr-defined]
            self._hook.remove()
            self._timer = None

    def _exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exchange the totals of the ranks, log them and write them. Call it on all ranks."""
        self._window["forward_seconds"] = self._forward.take()
        # float32, since not all devices have float64; these are totals of a few steps.
        device = trainer.strategy.root_device
        own = torch.tensor(list(self._window.values()), dtype=torch.float32, device=device)
        every = [own]
        if trainer.world_size > 1:
            every = [torch.empty_like(own) for _ in range(trainer.world_size)]
            dist.all_gather(every, own)
        window = torch.stack(every).double().cpu()
        self._window = dict.fromkeys(TOTALS, 0.0)
        self._totals += window
        latest = self._throughput(trainer, window)
        pl_module.log_dict(
            {
                "train/images_per_second": latest.images_per_second,
                "train/step_time": latest.step_time,
                "train/data_wait": latest.data_wait,
            }
        )
        if trainer.is_global_zero and leaves_files(trainer):
            totals = self._throughput(trainer, self._totals)
            text = json.dumps(totals.as_dict(), indent=1)
            try:
                atomic_write_text(run_folder(trainer) / THROUGHPUT_FILE, f"{text}\n")
            except WriteError as error:  # no reason to end a training
                rank_zero_warn(f"{error}; the report will not show the throughput")

    def _throughput(self, trainer: pl.Trainer, totals: Tensor) -> Throughput:
        ranks = [RankThroughput(rank, *row) for rank, row in enumerate(totals.tolist())]
        accumulate = trainer.accumulate_grad_batches
        return Throughput(self._first_step, trainer.global_step, accumulate, tuple(ranks))


class ForwardClock:
    """Measures forward passes, on the GPU itself where there is one.

    Args:
        device: Device of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._begin: Any = None
        self._pass: tuple[Any, Any] | None = None
        self._passes: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self._begin = self._now()

    def end(self) -> None:
        self._pass = (self._begin, self._now())

    def keep(self, counts: bool) -> None:
        """Add the last pass to those that count, or forget it."""
        if counts and self._pass is not None:
            self._passes.append(self._pass)
        self._pass = None

    def take(self) -> float:
        """Return the seconds of all passes since the last call."""
        passes, self._passes = self._passes, []
        if not self._is_cuda:
            return sum(end - begin for begin, end in passes)
        if passes:
            passes[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in passes) / 1000


class FetchTimer(Profiler):
    """Adds up the time that the trainer waits for training batches.

    Lightning tells its profiler alone when it begins and ends to wait. All calls are passed on to
    the trainer's own profiler.

    Args:
        profiler: Profiler of the trainer.
    """

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.profiler = profiler
        self._seconds = 0.0
        self._begin = 0.0

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def start(self, action_name: str) -> None:
        self.profiler.start(action_name)
        if action_name.endswith(FETCH):
            self._begin = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._seconds += time.perf_counter() - self._begin
        self.profiler.stop(action_name)

    def summary(self) -> str:
        return self.profiler.summary()

    def describe(self) -> None:
        self.profiler.describe()

    def teardown(self, stage: str | None) -> None:
        self.profiler.teardown(stage)
