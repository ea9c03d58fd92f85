"""Check that a training killed at random, again and again, neither loses nor repeats a sample.

    python experiments/resilience/kill_chains.py [--kills N] [--kills_per_chain N] [--seed N]
                                                 [--folder FOLDER]

Question: after any number of SIGKILLs, do the final weights come from every sample of the data
order exactly once, in the same steps as in an uninterrupted run? Hardware: any; two CPU cores are
enough. Expectation: yes, exactly.

A chain is one training of 24 steps with a global batch of 12. Each attempt splits the 12 samples at
random (1 to 3 accumulated batches, 1 or 2 ranks, 0 to 3 workers each), resumes from ``last.ckpt``
and is killed after a random number of steps and a random delay: in the forward pass, during an
accumulation, in a validation, while a checkpoint is written. Sometimes only one of two ranks is
killed while the other waits for it::

    attempt 0   steps 1 2 3 4 5 6 x            killed; last.ckpt is of step 4
    attempt 1                 5 6 7 8 x        5 and 6 are repeated; last.ckpt is of step 8
    attempt 2                         9 ... 24
    kept        steps 1 2 3 4 5 6 7 8 9 ... 24    must equal an uninterrupted run

The checkpoints are on another file system than the temporary folder.

Two records, neither of them made by the code under test, are compared:

- Every rank logs the samples (id and seed) of each of its optimiser steps. The kept steps of all
  attempts must be those of a run that was never killed, on one rank without accumulation.
- A count of each sample is a buffer of the network's state dict, updated at each optimiser step.
  The counts in the last checkpoint must equal those of the uninterrupted run.

Each rank is forked from a process that has imported everything, since the imports take longer than
the training.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
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
TIMEOUT = 120  # seconds for one attempt; a hang is a failure
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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.register_buffer("sample_counts", torch.zeros(NUM_ROWS, dtype=torch.int64))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(list(zip(batch["id"], batch["seed"])))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        batches: list[Any] = [self.batches]
        if trainer.world_size > 1:
            batches = [None] * trainer.world_size
            dist.all_gather_object(batches, self.batches)
        for name, _ in (sample for rank in batches for batch in rank for sample in batch):
            pl_module.sample_counts[int(name.split("-")[1])] += 1

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        line = json.dumps({"step": trainer.global_step, "batches": self.batches})
        with open(f"{self.file}.rank{trainer.global_rank}", "a") as file:
            file.write(line + "\n")
        self.batches = []


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
            "trainer.val_check_interval": 5,
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
            torch.set_num_threads(1)
            main(arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def steps(self) -> dict[int, Step]:
        """Return the samples of each step that all ranks completed, in the order of the data."""
        ranks = []
        for rank in range(self.ranks):
            file = Path(f"{self.trace}.rank{rank}")
            lines = file.read_text().split("\n")[:-1] if file.exists() else []
            ranks.append({(entry := json.loads(line))["step"]: entry["batches"] for line in lines})
        common = set.intersection(*map(set, ranks))
        return {
            step: [
                (name, seed)
                for batches in zip(*(rank[step] for rank in ranks))
                for batch in batches
                for name, seed in batch
            ]
            for step in sorted(common)
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
        while len(self.status) < self.ranks:
            for process in self.processes:
                if process not in self.status and (ended := os.waitpid(process, os.WNOHANG))[0]:
                    self.status[process] = ended[1]
            now = time.monotonic()
            if kill_at is None and len(self.steps()) >= until_steps:
                kill_at = now + delay
            if kill_at is not None and now >= kill_at:
                return False
            if any(self.status.values()) or now > deadline:
                self.kill(self.processes)
                logs = [Path(f"{self.trace}.log{rank}").read_text() for rank in range(self.ranks)]
                raise SystemExit(f"{self.trace} failed or hung:\n" + "\n".join(logs))
            time.sleep(0.002)
        return True

    def kill(self, processes: list[int]) -> None:
        """Kill some ranks with their workers, and the remaining ranks after a moment."""
        for process in (*processes, None, *self.processes):
            if process is None:
                time.sleep(0.2 if len(processes) < self.ranks else 0)
            elif process not in self.status:
                try:
                    os.killpg(process, signal.SIGKILL)
                except ProcessLookupError:  # killed before it had a process group
                    os.kill(process, signal.SIGKILL)
                self.status[process] = os.waitpid(process, 0)[1]


def checkpoint(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def chain(folder: Path, data: Path, rng: random.Random, num_kills: int) -> tuple[Any, ...]:
    """Train to the end with up to ``num_kills`` kills.

    Returns:
        The steps that the final weights come from, the sample counts in the last checkpoint, and
        the numbers of kills, of kills that left a partial file, and of repeated steps.
    """
    folder.mkdir()
    kept: list[Step] = []
    kills = partial = repeated = 0
    for number in range(num_kills + 1):
        ranks, accumulate = rng.choice((1, 2)), rng.choice((1, 2, 3))
        attempt = Attempt(folder, number, data, (ranks, accumulate, rng.choice((0, 1, 2, 3))))
        if attempt.from_step > len(kept):
            raise SystemExit(f"{folder}: a checkpoint of a step that no attempt has completed")
        repeated += len(kept) - attempt.from_step
        kept = kept[: attempt.from_step]
        is_last = number == num_kills
        ended = attempt.wait(
            STEPS + 1 if is_last else rng.randint(0, 5), 0 if is_last else rng.uniform(0, 0.3)
        )
        if not ended:
            victims = attempt.processes if rng.random() < 0.7 else [rng.choice(attempt.processes)]
            attempt.kill(victims)
            kills += 1
            partial += any(folder.glob(".*.partial"))
        steps = attempt.steps()
        for step in range(attempt.from_step + 1, max(steps, default=attempt.from_step) + 1):
            kept.append(steps[step])
        if ended:
            break
    return (
        kept,
        checkpoint(folder / "last.ckpt")["state_dict"]["sample_counts"],
        kills,
        partial,
        repeated,
    )


def run(num_kills: int, seed: int, kills_per_chain: int, folder: Path) -> str:
    """Run chains until there were ``num_kills`` kills.

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
    attempt = Attempt(reference_folder, 0, data, (1, 1, 0))
    attempt.wait(STEPS + 1, 0)
    reference = list(attempt.steps().values())
    if [len(step) for step in reference] != [SAMPLES_PER_STEP] * STEPS:
        raise SystemExit(
            f"{reference_folder}: the uninterrupted run did not complete its {STEPS} steps"
        )
    reference_counts = Counter(name for step in reference for name, _ in step)
    kills = chains = partial = repeated = 0
    while kills < num_kills:
        chain_kills = min(kills_per_chain, num_kills - kills)
        kept, counts, *numbers = chain(folder / f"chain{chains}", data, rng, chain_kills)
        for number, (step, expected_step) in enumerate(zip(kept, reference), start=1):
            if step != expected_step:
                raise SystemExit(f"chain {chains}, step {number} used {step}, not {expected_step}")
        expected = [reference_counts[f"train-{row:05d}"] for row in range(NUM_ROWS)]
        if len(kept) != STEPS or counts.tolist() != expected:
            raise SystemExit(f"chain {chains}: {len(kept)} steps, sample counts {counts.tolist()}")
        shutil.rmtree(folder / f"chain{chains}")
        kills, partial, repeated = (a + b for a, b in zip((kills, partial, repeated), numbers))
        chains += 1
        sys.stderr.write(f"{kills} kills, {chains} chains\n")
    return (
        f"{kills} kills in {chains} chains of {STEPS} steps: no sample lost, none repeated in the "
        f"final weights; {repeated} steps after a checkpoint were recomputed; {partial} kills left "
        "a partial file beside the checkpoint"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="number of kills in all")
    parser.add_argument("--kills_per_chain", type=int, default=6, help="most kills of one training")
    parser.add_argument("--seed", type=int, default=0, help="seed of splits and kills")
    parser.add_argument(
        "--folder",
        type=Path,
        default="/dev/shm",
        help="run folder, on another file system than the temporary folder",
    )
    options = parser.parse_args()
    if options.folder.stat().st_dev == os.stat(tempfile.gettempdir()).st_dev:
        raise SystemExit(f"{options.folder} and the temporary folder are on one file system")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="kill_chains") as temporary:
        sys.stdout.write(
            run(options.kills, options.seed, options.kills_per_chain, Path(temporary)) + "\n"
        )
