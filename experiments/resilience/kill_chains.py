"""Check that a training ended at random, again and again, neither loses nor repeats a sample.

    python experiments/resilience/kill_chains.py [--kills N] [--kills_per_chain N] [--seed N]
                                                 [--folder FOLDER]

Question: after any number of SIGKILL, SIGTERM, SIGINT and SIGUSR1, do the final weights come from
every sample of the data order exactly once, in the same steps and with the same losses as in an
uninterrupted run? Hardware: any; two CPU cores are enough. Expectation: yes, exactly; losses up to
rounding.

A chain is one training of 24 steps with a global batch of 12. Each attempt splits the 12 samples at
random (1 to 4 ranks, accumulated batches, 0 to 4 workers each), resumes from ``last.ckpt`` and
receives a signal after a random number of steps and a random delay: in the forward pass, during
an accumulation, in a validation, while a checkpoint is written. The signal goes to every process,
as from a scheduler, to every rank but not to its workers, or to one rank alone while the others
wait for it::

    attempt 0   steps 1 2 3 4 5 6 x            killed; last.ckpt is of step 4
    attempt 1                 5 6 7 8 x        5 and 6 are repeated; last.ckpt is of step 8
    attempt 2                         9 ... 24
    kept        steps 1 2 3 4 5 6 7 8 9 ... 24    must equal an uninterrupted run

SIGTERM, SIGINT and SIGUSR1 end a run after the current step, so no step may be repeated after them.
The checkpoints are on another file system than the temporary folder.

Two records of the samples, neither of them made by the code under test, are compared:

- Every rank logs the samples (id and seed) and the losses of each of its optimiser steps. The kept
  steps of all attempts must be those of a run that was never ended, on one rank.
- A count of each sample is a buffer of the network's state dict, updated at each optimiser step.
  The counts in the last checkpoint must equal those of the uninterrupted run.

Losses are compared in every second chain, in which all batches have one image, because dropout is
drawn for a batch. BatchNorm is in evaluation mode for the same reason. Each rank is forked from a
process that has imported everything, since the imports take longer than the training.
"""

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.models import MixTransformer, SegFormer

STEPS, SAMPLES_PER_STEP, NUM_ROWS = 24, 12, 50
ACCUMULATED = {1: (1, 2, 3, 4), 2: (1, 2, 3), 3: (1, 2, 4), 4: (1, 3)}  # by number of ranks
SINGLE_IMAGES = {ranks: (SAMPLES_PER_STEP // ranks,) for ranks in ACCUMULATED}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACEFUL = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIMEOUT = 300  # seconds for one attempt, or for one to end after a signal; a hang is a failure
LOSS_TOLERANCE = 1e-3  # relative; AdamW amplifies rounding
Step = list[tuple[str, int]]


def tiny(num_classes: int) -> SegFormer:
    """Build a minimal network with dropout, drop path and BatchNorm."""
    encoder = MixTransformer((8, 8, 8, 8), (1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=1)
    return SegFormer(encoder, num_classes, 8, (0, 1, 2, 3), 0.1)


class SampleRecorder(pl.Callback):
    """Callback that logs the samples of every optimiser step and counts them in a buffer."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.batches: list[Step] = []
        self.losses: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.register_buffer("sample_counts", torch.zeros(NUM_ROWS, dtype=torch.int64))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(list(zip(batch["id"], batch["seed"])))
        for module in pl_module.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        batches: list[Any] = [self.batches]
        if trainer.world_size > 1:
            batches = [None] * trainer.world_size
            dist.all_gather_object(batches, self.batches)
        for name, _ in (sample for rank in batches for batch in rank for sample in batch):
            pl_module.sample_counts[int(name.split("-")[1])] += 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning divides the loss by the number of accumulated batches.
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if trainer.fit_loop._should_accumulate():
            return
        loss = statistics.fmean(self.losses)
        line = json.dumps({"step": trainer.global_step, "loss": loss, "batches": self.batches})
        with open(f"{self.file}.rank{trainer.global_rank}", "a") as file:
            file.write(line + "\n")
        self.batches, self.losses = [], []


class Attempt:
    """One run of the command line, with one forked process per rank."""

    def __init__(self, folder: Path, number: int, data: Path, split: tuple[int, int, int]) -> None:
        self.ranks, self.accumulate, self.workers = split
        self.trace = folder / f"attempt{number}"
        self.last = folder / "last.ckpt"
        self.from_step = checkpoint(self.last)["global_step"] if self.last.exists() else 0
        settings = {
            "model.network": "kill_chains.tiny",
            "model.warmup_steps": 0,
            "data.path": data,
            "data.batch_size": SAMPLES_PER_STEP // (self.ranks * self.accumulate),
            "data.num_workers": self.workers,
            "data.crop_size": "[32,32]",
            "trainer.accelerator": "cpu",
            "trainer.devices": self.ranks,
            "trainer.strategy": "ddp" if self.ranks > 1 else "auto",
            "trainer.accumulate_grad_batches": self.accumulate,
            "trainer.max_steps": STEPS,
            # In batches; also in the middle of an accumulation
            "trainer.val_check_interval": 5 if self.accumulate < 5 else 31,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.logger": "false",
            "trainer.default_root_dir": folder,
            "last_checkpoint.every_n_train_steps": 2,
            "last_checkpoint.dirpath": folder,
        }
        arguments = ["fit", *(f"--{key}={value}" for key, value in settings.items())]
        recorder = {
            "class_path": "kill_chains.SampleRecorder",
            "init_args": {"file": str(self.trace)},
        }
        arguments.append(f"--trainer.callbacks+={json.dumps(recorder)}")
        if self.last.exists():
            arguments.append(f"--ckpt_path={self.last}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [self._fork(arguments, rank, port) for rank in range(self.ranks)]
        self.status: dict[int, int] = {}

    def _fork(self, arguments: list[str], rank: int, port: int) -> int:
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            os.setsid()  # a process group, so that its workers are killed with it
            log = os.open(f"{self.trace}.log{rank}", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(log, stream)
            if self.ranks > 1:
                elastic = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks}
                elastic |= {"LOCAL_WORLD_SIZE": self.ranks, "GROUP_RANK": 0}
                elastic |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                elastic |= {"TORCHELASTIC_RUN_ID": "kill_chains"}
                os.environ |= {key: str(value) for key, value in elastic.items()}
            faulthandler.dump_traceback_later(TIMEOUT - 5, file=log)  # where a rank hangs
            main(arguments)
            status = 0
        except SystemExit as error:
            sys.stderr.write(f"{error.code}\n")
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def steps(self) -> dict[int, tuple[Step, float]]:
        """Return samples, in the order of the data, and loss of each step that all ranks did."""
        ranks = []
        for rank in range(self.ranks):
            file = Path(f"{self.trace}.rank{rank}")
            lines = file.read_text().split("\n")[:-1] if file.exists() else []
            ranks.append({(entry := json.loads(line))["step"]: entry for line in lines})
        return {
            step: (
                [
                    (name, seed)
                    for batches in zip(*(rank[step]["batches"] for rank in ranks))
                    for batch in batches
                    for name, seed in batch
                ],
                statistics.fmean(rank[step]["loss"] for rank in ranks),
            )
            for step in sorted(set.intersection(*map(set, ranks)))
        }

    def wait(self, until_steps: int, delay: float) -> bool:
        """Wait until the attempt ends, or until some steps and then a delay have passed.

        Args:
            until_steps: Number of completed steps.
            delay: Seconds after these steps.

        Returns:
            Whether the attempt ended by itself.

        Raises:
            SystemExit: The attempt failed or hung.
        """
        deadline, kill_at = time.monotonic() + TIMEOUT, None
        while not self._has_ended():
            now = time.monotonic()
            if kill_at is None and len(self.steps()) >= until_steps:
                kill_at = now + delay
            if kill_at is not None and now >= kill_at:
                return False
            if any(self.status.values()) or now > deadline:
                self._fail()
            time.sleep(0.002)
        if any(self.status.values()):
            self._fail()
        return True

    def end(self, signum: int, rng: random.Random) -> float:
        """Send a signal and wait until all processes have ended.

        Ranks that wait for a killed one are killed after a moment, as a scheduler does. Any signal
        kills a rank that has only just started and does not handle signals yet.

        Args:
            signum: Number of the signal.
            rng: Decides who receives the signal.

        Returns:
            Seconds until the last rank ended.

        Raises:
            SystemExit: The attempt did not end.
        """
        begin = time.monotonic()
        receivers = self.processes if rng.random() < 0.7 else [rng.choice(self.processes)]
        send = rng.choice((os.kill, os.killpg))
        for process in receivers:
            if process not in self.status:
                _send(send, process, signum)
        while not self._has_ended():
            if any(os.WIFSIGNALED(status) for status in self.status.values()):
                time.sleep(0.2)
                self._kill()
            if time.monotonic() > begin + TIMEOUT:
                self._fail()
            time.sleep(0.002)
        seconds = time.monotonic() - begin
        self._kill()  # workers that survived
        return seconds

    @property
    def is_graceful(self) -> bool:
        """Whether all ranks ended with the exit status of a signal that they handled."""
        codes = {os.waitstatus_to_exitcode(status) for status in self.status.values()}
        return codes <= {128 + signum for signum in GRACEFUL}

    def _has_ended(self) -> bool:
        for process in self.processes:
            if process not in self.status and (ended := os.waitpid(process, os.WNOHANG))[0]:
                self.status[process] = ended[1]
        return len(self.status) == self.ranks

    def _kill(self) -> None:
        for process in self.processes:
            _send(os.killpg, process, signal.SIGKILL)

    def _fail(self) -> None:
        self._kill()
        logs = [Path(f"{self.trace}.log{rank}").read_text() for rank in range(self.ranks)]
        status = [self.status.get(process) for process in self.processes]
        raise SystemExit(f"{self.trace} failed or hung, status {status}:\n" + "\n".join(logs))


def _send(send: Any, process: int, signum: int) -> None:
    try:
        send(process, signum)
    except ProcessLookupError:  # it has ended, or has no process group yet
        if send is os.killpg:
            _send(os.kill, process, signum)


def checkpoint(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


class Record:
    """What happened in all chains."""

    def __init__(self) -> None:
        self.signals: Counter[str] = Counter()
        self.partial = self.repeated = self.graceful = 0
        self.seconds: list[float] = []  # from a graceful signal to the end
        self.deviation = 0.0  # largest relative difference of a loss

    def __str__(self) -> str:
        signals = ", ".join(f"{number} {name}" for name, number in sorted(self.signals.items()))
        seconds = (
            f", {statistics.median(self.seconds):.1f} s after the signal (median; at most "
            f"{max(self.seconds):.1f} s)"
            if self.seconds
            else ""
        )
        return (
            f"({signals}): no sample lost, none repeated in the final weights, no damaged "
            f"checkpoint, losses equal to {self.deviation:.0e}; {self.graceful} runs ended "
            f"after a complete step and saved it{seconds}; {self.repeated} steps after a "
            f"checkpoint were recomputed; {self.partial} signals left a partial file beside the "
            "checkpoint"
        )


def chain(
    folder: Path,
    data: Path,
    rng: random.Random,
    num_kills: int,
    accumulated: dict[int, tuple[int, ...]],
    record: Record,
) -> list[tuple[Step, float]]:
    """Train to the end with up to ``num_kills`` signals.

    Returns:
        Samples and loss of the steps that the final weights come from.
    """
    folder.mkdir()
    kept: list[tuple[Step, float]] = []
    for number in range(num_kills + 1):
        ranks = rng.choice((1, 2, 3, 4))
        split = (ranks, rng.choice(accumulated[ranks]), rng.choice((0, 1, 2, 3, 4)))
        attempt = Attempt(folder, number, data, split)
        if attempt.from_step > len(kept):
            raise SystemExit(f"{folder}: a checkpoint of a step that no attempt has completed")
        record.repeated += len(kept) - attempt.from_step
        kept = kept[: attempt.from_step]
        is_last = number == num_kills
        ended = attempt.wait(
            STEPS + 1 if is_last else rng.randint(0, 5), 0 if is_last else rng.uniform(0, 0.3)
        )
        if not ended:
            signum = rng.choice(SIGNALS)
            seconds = attempt.end(signum, rng)
            record.signals[signal.Signals(signum).name] += 1
            record.partial += any(folder.glob(".*.partial"))
        steps = attempt.steps()
        for step in range(attempt.from_step + 1, max(steps, default=attempt.from_step) + 1):
            kept.append(steps[step])
        if not ended and steps and attempt.is_graceful:
            record.graceful += 1
            record.seconds.append(seconds)
            saved = checkpoint(attempt.last)["global_step"]
            if saved != len(kept):
                raise SystemExit(f"{attempt.trace}: ended at step {len(kept)}, saved {saved}")
        if ended:
            break
    return kept


def run(num_kills: int, seed: int, kills_per_chain: int, folder: Path) -> str:
    """Run chains until there were ``num_kills`` signals.

    Raises:
        SystemExit: A chain differs from the uninterrupted run.
    """
    data = folder / "data"
    generator = os.fork()
    if not generator:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        shapes.generate(data, {"train": NUM_ROWS, "validation": 3})
        os._exit(0)
    os.waitpid(generator, 0)
    rng = random.Random(seed)
    reference_folder = folder / "uninterrupted"
    reference_folder.mkdir()
    attempt = Attempt(reference_folder, 0, data, (1, SAMPLES_PER_STEP, 0))
    attempt.wait(STEPS + 1, 0)
    reference = list(attempt.steps().values())
    if [len(samples) for samples, _ in reference] != [SAMPLES_PER_STEP] * STEPS:
        raise SystemExit(
            f"{reference_folder}: the uninterrupted run did not complete its {STEPS} steps"
        )
    counts = Counter(name for samples, _ in reference for name, _ in samples)
    expected_counts = [counts[f"train-{row:05d}"] for row in range(NUM_ROWS)]
    record, chains = Record(), 0
    while (kills := record.signals.total()) < num_kills:
        chain_folder = folder / f"chain{chains}"
        has_single_images = chains % 2 == 0
        kept = chain(
            chain_folder,
            data,
            rng,
            min(kills_per_chain, num_kills - kills),
            SINGLE_IMAGES if has_single_images else ACCUMULATED,
            record,
        )
        for number, (step, expected) in enumerate(zip(kept, reference), start=1):
            if step[0] != expected[0]:
                raise SystemExit(f"chain {chains}, step {number} used {step[0]}, not {expected[0]}")
            if has_single_images:
                record.deviation = max(record.deviation, abs(step[1] / expected[1] - 1))
            if record.deviation > LOSS_TOLERANCE:
                raise SystemExit(
                    f"chain {chains}, step {number}: loss {step[1]}, not {expected[1]}"
                )
        found = checkpoint(chain_folder / "last.ckpt")["state_dict"]["sample_counts"].tolist()
        if len(kept) != STEPS or found != expected_counts:
            raise SystemExit(f"chain {chains}: {len(kept)} steps, sample counts {found}")
        shutil.rmtree(chain_folder)
        chains += 1
        sys.stderr.write(f"{record.signals.total()} kills, {chains} chains\n")
    return f"{kills} kills in {chains} chains of {STEPS} steps {record}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="number of signals in all")
    parser.add_argument(
        "--kills_per_chain", type=int, default=6, help="most signals of one training"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of splits and signals")
    parser.add_argument(
        "--folder",
        type=Path,
        default="/dev/shm",
        help="run folder, on another file system than the temporary folder",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # before any fork, which must not happen beside threads of OpenMP
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.folder.stat().st_dev == os.stat(tempfile.gettempdir()).st_dev:
        raise SystemExit(f"{options.folder} and the temporary folder are on one file system")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="kill_chains") as temporary:
        sys.stdout.write(
            run(options.kills, options.seed, options.kills_per_chain, Path(temporary)) + "\n"
        )
