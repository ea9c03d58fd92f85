"""Does a run that is killed at random, again and again, lose or repeat a sample?

    python experiments/resilience/kill_chains.py [--kills N] [--seed N] [--folder FOLDER]

Question: after any number of SIGKILLs, are the final weights those of a run that took every sample
of the sequence exactly once, in the same steps? Hardware: any; two CPU cores are enough.
Expectation: yes, exactly.

A chain is one training of 24 steps of 12 samples. Every attempt runs on a split of the 12 that is
drawn anew (accumulation 1 to 3, ranks 1 or 2, loader processes 0 to 3 each), resumes from
``last.ckpt`` and is killed after a random number of steps and a random time: in the forward pass,
in the middle of an accumulated step, in a validation, while a checkpoint is written. Sometimes only
one of two ranks is killed, and the other is found waiting. The checkpoints lie on another file
system than the temporary folder.

Two witnesses, neither of which the code under test provides:

- every rank writes down the samples (id and seed) of each of its optimiser steps; the steps of each
  attempt up to the checkpoint that the next one resumed from, laid end to end, must be the steps of
  a run that was never killed, on one rank without accumulation;
- a tally of the samples travels in the network's own state dict, counted at each optimiser step;
  the last checkpoint must hold how often the uninterrupted run took each sample.

A process that has imported everything is forked for every rank, since importing takes longer than
training.
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
    """A network as small as it can be, with dropout, drop path and BatchNorm."""
    encoder = MixTransformer((8, 8, 8, 8), (1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=1)
    return SegFormer(encoder, num_classes, 8, (0, 1, 2, 3), 0.1)


class Witness(pl.Callback):
    """Writes down the samples of every optimiser step, and counts them in the network."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.begun: list[Step] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.register_buffer("tally", torch.zeros(NUM_ROWS, dtype=torch.int64))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.begun.append(list(zip(batch["id"], batch["seed"])))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        batches: list[Any] = [self.begun]
        if trainer.world_size > 1:
            batches = [None] * trainer.world_size
            dist.all_gather_object(batches, self.begun)
        for name, _ in (sample for rank in batches for batch in rank for sample in batch):
            pl_module.tally[int(name.split("-")[1])] += 1

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        line = json.dumps({"step": trainer.global_step, "batches": self.begun})
        with open(f"{self.file}.rank{trainer.global_rank}", "a") as file:
            file.write(line + "\n")
        self.begun = []


class Attempt:
    """One run of the command line in forked processes."""

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
        witness = {"class_path": "kill_chains.Witness", "init_args": {"file": str(self.trace)}}
        arguments.append(f"--trainer.callbacks+={json.dumps(witness)}")
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
            os.setsid()  # its loader processes are killed with it
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
        """The samples of every step that all ranks made, in the order of the sequence."""
        of_ranks = []
        for rank in range(self.ranks):
            file = Path(f"{self.trace}.rank{rank}")
            lines = file.read_text().split("\n")[:-1] if file.exists() else []
            of_ranks.append({(one := json.loads(line))["step"]: one["batches"] for line in lines})
        common = set.intersection(*map(set, of_ranks))
        return {
            step: [
                (name, seed)
                for batches in zip(*(rank[step] for rank in of_ranks))
                for batch in batches
                for name, seed in batch
            ]
            for step in sorted(common)
        }

    def wait(self, until_steps: int, delay: float) -> bool:
        """Whether the attempt ended before it had made so many steps and the delay had passed."""
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
        """SIGKILL to some ranks, and after a moment to those that are left, with their loaders."""
        for process in (*processes, None, *self.processes):
            if process is None:
                time.sleep(0.2 if len(processes) < self.ranks else 0)
            elif process not in self.status:
                try:
                    os.killpg(process, signal.SIGKILL)
                except ProcessLookupError:  # killed before it had a group
                    os.kill(process, signal.SIGKILL)
                self.status[process] = os.waitpid(process, 0)[1]


def checkpoint(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def chain(folder: Path, data: Path, rng: random.Random, num_kills: int) -> tuple[Any, ...]:
    """Train to the end with up to so many kills.

    Returns:
        The steps that are in the final weights, the tally of the last checkpoint, the number of
        kills, of those that left a part of a file, and of steps that were made again.
    """
    folder.mkdir()
    kept: list[Step] = []
    kills = partial = again = 0
    for number in range(num_kills + 1):
        ranks, accumulate = rng.choice((1, 2)), rng.choice((1, 2, 3))
        attempt = Attempt(folder, number, data, (ranks, accumulate, rng.choice((0, 1, 2, 3))))
        if attempt.from_step > len(kept):
            raise SystemExit(f"{folder}: a checkpoint of a step that no attempt has made")
        again += len(kept) - attempt.from_step
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
        made = attempt.steps()
        for step in range(attempt.from_step + 1, max(made, default=attempt.from_step) + 1):
            kept.append(made[step])
        if ended:
            break
    return kept, checkpoint(folder / "last.ckpt")["state_dict"]["tally"], kills, partial, again


def run(num_kills: int, seed: int, kills_per_chain: int, folder: Path) -> str:
    """Chains until there were so many kills; raises SystemExit at the first difference."""
    data = folder / "data"
    generator = os.fork()
    if not generator:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        shapes.generate(data, {"train": NUM_ROWS, "validation": 3})
        os._exit(0)
    os.waitpid(generator, 0)
    rng = random.Random(seed)
    whole_run = folder / "whole"
    whole_run.mkdir()
    attempt = Attempt(whole_run, 0, data, (1, 1, 0))
    attempt.wait(STEPS + 1, 0)
    whole = list(attempt.steps().values())
    if [len(step) for step in whole] != [SAMPLES_PER_STEP] * STEPS:
        raise SystemExit(f"{whole_run}: the uninterrupted run has not made its {STEPS} steps")
    tally = Counter(name for step in whole for name, _ in step)
    kills = chains = partial = again = 0
    while kills < num_kills:
        wanted = min(kills_per_chain, num_kills - kills)
        kept, counted, *more = chain(folder / f"chain{chains}", data, rng, wanted)
        for number, (here, there) in enumerate(zip(kept, whole), start=1):
            if here != there:
                raise SystemExit(f"chain {chains}, step {number} trained {here}, not {there}")
        expected = [tally[f"train-{row:05d}"] for row in range(NUM_ROWS)]
        if len(kept) != STEPS or counted.tolist() != expected:
            raise SystemExit(f"chain {chains}: {len(kept)} steps, tally {counted.tolist()}")
        shutil.rmtree(folder / f"chain{chains}")
        kills, partial, again = (a + b for a, b in zip((kills, partial, again), more))
        chains += 1
        sys.stderr.write(f"{kills} kills, {chains} chains\n")
    return (
        f"{kills} kills in {chains} chains of {STEPS} steps: nothing lost, nothing repeated; "
        f"{again} steps after the last checkpoint were made again, {partial} kills left a part of "
        "a file beside the checkpoint"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kills-per-chain", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default="/dev/shm", help="on another file system than the temporary"
    )
    given = parser.parse_args()
    if given.folder.stat().st_dev == os.stat(tempfile.gettempdir()).st_dev:
        raise SystemExit(f"{given.folder} and the temporary folder are on one file system")
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="kill_chains") as temporary:
        sys.stdout.write(
            run(given.kills, given.seed, given.kills_per_chain, Path(temporary)) + "\n"
        )
