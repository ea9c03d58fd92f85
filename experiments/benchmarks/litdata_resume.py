"""Compare resuming and throughput with litdata, on the same Parquet files.

    pip install litdata==0.2.76 polars==2.1.0
    python experiments/benchmarks/litdata_resume.py [--camvid FOLDER] [--rounds N] [--batches N]

Question: an epoch is read by some ranks and workers, killed, and read on by others from the saved
state. How many samples are lost, repeated, in another order or augmented in another way than in a
run that was never killed? And how many samples per second does each system read? Hardware: any; two
CPU cores are enough. Expectation: segformer_pl loses, repeats, reorders and changes nothing;
litdata loses and repeats nothing either where the numbers divide evenly, but draws another
augmentation; decoding decides the throughput, which is alike.

Every rank is a real process with real workers, and is killed with SIGKILL some time after the state
was saved. What counts are the samples up to the saved state and those that the resumed ranks read::

    uninterrupted   a b c d e f g h i j k l          reference
    killed          a b c d e f g x                  state saved after d
    resumed                 e f g h i j k l          2 ranks -> 1, 2 workers -> 3
    kept            a b c d e f g h i j k l          compared with the reference

The systems are used as their documentation says:

- segformer_pl: a training with Lightning on gloo ranks; the state is its checkpoint.
- litdata: ``index_parquet_dataset``, ``StreamingDataset`` with ``ParquetLoader`` and ``shuffle``,
  ``StreamingDataLoader`` with ``state_dict`` and ``load_state_dict``, workers from a fork server.
  ``drop_last=True``, as it advises for training, and because a state of several ranks cannot be
  loaded on one rank otherwise (the defaults differ, which it refuses). No option is needed for
  resuming on other ranks and workers. Ranks are set by WORLD_SIZE and GLOBAL_RANK; its data loader
  does not communicate. Random numbers come from torch's generator in the worker, as in
  torchvision's transforms, because its transforms are told neither the position nor the epoch.
- litdata, drop_last=False: against which it advises, as ranks may get different numbers of batches.
- litdata, parallel: the same in ``ParallelStreamingDataset``, whose generators allow "reproducible
  and resumable data transformation" according to its documentation.
- litdata, chunks: for throughput also the chunks of ``optimize``, its format for highest speed.

All decode with the same functions and apply the same random scale, crop and flip. The Parquet is
CamVid's, or is generated. One set has a number of rows that leaves no remainder in any split here,
the other is as it comes.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from litdata_pipelines import (
    CHUNKS,
    LITDATA,
    OURS,
    PARALLEL,
    WHOLE,
    Data,
    Rank,
    Split,
    index_for_litdata,
    litdata_loader,
    optimize_for_litdata,
    our_data,
    read_with_litdata,
    read_with_segformer_pl,
    write_parquet,
)

EVEN_ROWS = 192  # a multiple of ranks * workers * batch size in all splits, as is what remains
TIMEOUT = 600  # seconds for one attempt


class Attempt(NamedTuple):
    """One start of the ranks; ``steps`` is when it saves its state, None if it reads to the end."""

    split: Split
    steps: int | None


# Of the variants of litdata, only the cases that they are about
CASES = {
    PARALLEL: ("never killed, read again", "nothing changed", "fewer ranks, more workers"),
    WHOLE: (
        "never killed, read again",
        "more workers",
        "more ranks, larger global batch",
        "fewer ranks, more workers",
    ),
}


class Failure(Exception):
    """A rank ended with an error; the message is its last line."""


Sample = tuple[str, str]  # id, and hash of the augmented image and label
FIRST = Split(ranks=2, workers=2, batch_size=4)
SINGLE = Split(ranks=1, workers=2, batch_size=4)


def cases(steps: int, steps_of_epoch: int) -> dict[str, tuple[int, tuple[Attempt, ...]]]:
    """Return the number of epochs and the attempts of each case."""
    first, end = Attempt(FIRST, steps), None
    return {
        "never killed, read again": (1, (Attempt(FIRST, end),)),
        "nothing changed": (1, (first, Attempt(FIRST, end))),
        "more workers": (1, (first, Attempt(Split(2, 3, 4), end))),
        "fewer workers": (1, (first, Attempt(Split(2, 1, 4), end))),
        "fewer ranks, same global batch": (1, (first, Attempt(Split(1, 2, 8), end))),
        "fewer ranks, smaller global batch": (1, (first, Attempt(SINGLE, end))),
        "more ranks, larger global batch": (1, (Attempt(SINGLE, steps), Attempt(FIRST, end))),
        "fewer ranks, more workers": (1, (first, Attempt(Split(1, 3, 8), end))),
        "killed twice": (1, (first, Attempt(Split(1, 3, 8), 3), Attempt(Split(2, 1, 4), end))),
        "in the second epoch, fewer ranks, more workers": (
            2,
            (Attempt(FIRST, steps_of_epoch + steps), Attempt(Split(1, 3, 8), end)),
        ),
    }


def kill_group(process: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def in_child(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a forked session, of which no process and no thread is left over."""
    process = os.fork()
    if not process:
        status = 1
        try:
            os.setsid()
            os.dup2(2, 1)
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitpid(process, 0)[1]
    kill_group(process)
    if status:
        raise SystemExit(f"{function.__name__} failed; see above")


def fork_rank(system: str, rank: Rank, port: int) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setsid()  # a process group, so that its workers are killed with it
        output = os.open(f"{rank.log}.output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        ranks = rank.split.ranks
        if ranks > 1:
            names = ("RANK", "LOCAL_RANK", "GLOBAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
            values = (rank.rank, rank.rank, rank.rank, ranks, ranks)
            os.environ |= {name: str(value) for name, value in zip(names, values)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "litdata_resume"}
        torch.set_num_threads(1)
        if system == OURS:
            read_with_segformer_pl(rank)
        else:
            # Without this, each worker would import them again.
            multiprocessing.set_forkserver_preload(["litdata", "litdata_pipelines"])
            read_with_litdata(system, rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def steps_of(log: Path) -> list[list[Sample]]:
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [[(name, digest) for name, digest in json.loads(line)] for line in lines]


class Comparison:
    """Runs and kills attempts, and keeps what they read, because cases share their beginnings."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.folder = data.folder.with_name(f"{data.folder.name}_runs")
        self.folder.mkdir()
        self.number = 0
        self.results: dict[Any, tuple[list[Sample], Path]] = {}

    def read(
        self, system: str, epochs: int, attempts: tuple[Attempt, ...], repetition: int = 0
    ) -> tuple[list[Sample], Path]:
        """Return the kept samples of successive attempts, in order, and the last saved state.

        Raises:
            Failure: An attempt ended with an error.
        """
        key = (system, epochs, attempts, repetition)
        if key not in self.results:
            before: list[Sample] = []
            state = None
            if len(attempts) > 1:
                before, state = self.read(system, epochs, attempts[:-1], repetition)
            samples, saved = self._attempt(system, epochs, attempts, state, len(before))
            kept = before + samples
            if system == OURS:  # it has no end, so the last step may reach into the next epoch
                kept = kept[: epochs * self.data.num_rows]
            self.results[key] = kept, saved
        return self.results[key]

    def _attempt(
        self,
        system: str,
        epochs: int,
        attempts: tuple[Attempt, ...],
        state: Path | None,
        consumed: int,
    ) -> tuple[list[Sample], Path]:
        self.number += 1
        last = attempts[-1]
        ranks, _, batch_size = last.split
        remaining = epochs * self.data.num_rows - consumed
        max_steps = sum(attempt.steps or 0 for attempt in attempts[:-1])
        max_steps += -(-remaining // (ranks * batch_size))
        saved = self.folder / f"{self.number}.ckpt"
        logs = [self.folder / f"{self.number}.rank{rank}" for rank in range(ranks)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        begin = time.monotonic()
        processes = [
            fork_rank(
                system,
                Rank(rank, *last, self.data, epochs, state, saved, max_steps, log),
                port,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            self._wait(processes, logs, last.steps, saved)
        finally:
            for process in processes:
                kill_group(process)
            for process in processes:
                with suppress(ChildProcessError):
                    os.waitpid(process, 0)
        steps = [steps_of(log)[: last.steps] for log in logs]
        sys.stderr.write(
            f"{self.data.name}, {system}: {' | '.join(str(a.split) for a in attempts)}, "
            f"{time.monotonic() - begin:.0f} s\n"
        )
        # The order of the data: batch by batch, in each of them rank by rank
        batches = chain.from_iterable(zip_longest(*steps, fillvalue=[]))
        return list(chain.from_iterable(batches)), saved

    def _wait(self, processes: list[int], logs: list[Path], steps: int | None, saved: Path) -> None:
        """Wait until the ranks end, or until all are past the step of the saved state."""
        deadline, running = time.monotonic() + TIMEOUT, set(processes)
        while running:
            for process in list(running):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    running.discard(process)
                if ended and status:
                    log = Path(f"{logs[processes.index(process)]}.output").read_text()
                    errors = [line for line in log.splitlines() if line and line[0] not in " ["]
                    raise Failure(errors[-1] if errors else f"status {status}")
            is_past = steps is not None and all(len(steps_of(log)) > steps for log in logs)
            if is_past and saved.exists():
                return
            if time.monotonic() > deadline:
                raise Failure(f"still running after {TIMEOUT} s")
            time.sleep(0.05)
        if steps is not None:
            raise Failure(f"ended before step {steps}")


def compare(kept: list[Sample], reference: list[Sample], num_before: int) -> dict[str, object]:
    """Compare what was read with the uninterrupted run.

    Args:
        kept: Samples of all attempts.
        reference: Samples of the uninterrupted run.
        num_before: Number of kept samples before the first kill.
    """
    found, expected = (Counter(name for name, _ in samples) for samples in (kept, reference))
    digests = defaultdict(list)
    for name, digest in reference:
        digests[name].append(digest)
    changed = after = 0
    for position, (name, digest) in enumerate(kept):
        if digests[name]:
            is_same = digest == digests[name].pop(0)
            if position >= num_before:
                after += 1
                changed += not is_same
    names, expected_names = ([name for name, _ in samples] for samples in (kept, reference))
    return {
        "lost": (expected - found).total(),
        "repeated": (found - expected).total(),
        "same order": "yes" if names == expected_names[: len(names)] else "no",
        "other augmentation": f"{changed} of {after}",
    }


def resume_table(data: Data, steps: int, systems: tuple[str, ...]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    comparison = Comparison(data)
    for system in systems:
        epoch, _ = comparison.read(system, 1, (Attempt(FIRST, None),))
        steps_of_epoch = -(-len(epoch) // (FIRST.ranks * FIRST.batch_size))
        all_cases = cases(steps, steps_of_epoch)
        for case, (epochs, attempts) in all_cases.items():
            if case not in CASES.get(system, all_cases):
                continue
            split = attempts[0].split
            # Not half of a longer run: ranks with different numbers of batches in an epoch are not
            # in step after it, and their samples have no order.
            reference, _ = comparison.read(system, epochs, (Attempt(split, None),))
            row: dict[str, object] = {"data": data.name, "case": case, "system": system}
            row["ranks x workers"] = " -> ".join(str(attempt.split) for attempt in attempts)
            row["samples"] = len(reference)
            before = (attempts[0].steps or 0) * split.ranks * split.batch_size
            try:
                kept, _ = comparison.read(system, epochs, attempts, repetition=1)
                row |= compare(kept, reference, before)
            except Failure as failure:
                row |= {"lost": f"refused: {failure}"}
            rows.append(row)
    order = list(all_cases)
    return sorted(rows, key=lambda row: order.index(str(row["case"])))


def cpu_seconds(session: int) -> float:
    """Return the CPU seconds of all living processes of a session."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(system: str, data: Data, workers: int, batches: int, file: Path) -> None:
    """Write samples per second and CPU milliseconds per sample of this session."""
    torch.set_num_threads(1)
    split = Split(1, workers, 8)
    ours = our_data(data, split) if system == OURS else None
    loader = ours.train_dataloader() if ours else litdata_loader(system, data, split)
    iterator = iter(loader)
    for _ in range(4 * workers):  # the start is not measured
        next(iterator)
    begin, cpu = time.perf_counter(), cpu_seconds(os.getpid())
    for _ in range(batches):
        next(iterator)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds(os.getpid()) - cpu
    samples = batches * split.batch_size
    file.write_text(json.dumps([samples / seconds, 1000 * cpu / samples]))


def throughput_table(
    folder: Path, data: Data, rounds: int, batches: int
) -> list[dict[str, object]]:
    measured = defaultdict(list)
    file = folder / "measured.json"
    for round_ in range(rounds):
        for workers in (1, 2):
            for system in (OURS, LITDATA, CHUNKS):
                in_child(measure, system, data, workers, batches, file)
                measured[workers, system].append(json.loads(file.read_text()))
        sys.stderr.write(f"throughput: round {round_ + 1} of {rounds}\n")
    rows = []
    for (workers, system), values in measured.items():
        rates, cpus = zip(*values)
        ours = [cpu for _, cpu in measured[workers, OURS]]
        rows.append(
            {
                "workers": workers,
                "system": system,
                "samples/s": f"{statistics.median(rates):.0f}",
                "from - to": f"{min(rates):.0f} - {max(rates):.0f}",
                "CPU ms/sample": f"{statistics.median(cpus):.2f}",
                "CPU / segformer_pl": f"{statistics.median(a / b for a, b in zip(cpus, ours)):.2f}",
            }
        )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--camvid", type=Path, help="folder with CamVid's Parquet shards")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of throughput; 0 for none")
    parser.add_argument("--batches", type=int, default=30, help="batches of 8 in each measurement")
    options = parser.parse_args()
    if importlib.util.find_spec("litdata") is None:
        raise SystemExit(
            "litdata is not installed, and nothing else here needs it; run `pip install "
            "litdata==0.2.76 polars==2.1.0` and start the comparison again"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="litdata_resume") as temporary:
        run(options, Path(temporary))


def import_all() -> None:
    """Import what forked ranks use, since the imports take longer than reading."""
    import lightning.pytorch  # noqa: F401
    import litdata  # noqa: F401

    import segformer_pl.data.datamodule  # noqa: F401


def run(options: argparse.Namespace, folder: Path) -> None:
    dataset, stored, crop_size = "camvid", options.camvid, (352, 480)
    if stored is None:
        from segformer_pl.data import shapes

        dataset, stored, crop_size = "shapes", folder / "generated", (64, 64)
        in_child(shapes.generate, stored, {"train": 367, "validation": 3})
    files = sorted(stored.glob("train*.parquet"))
    if not files:
        raise SystemExit(f"--camvid: there are no train*.parquet files in {str(stored)!r}")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    import_all()
    rows: list[dict[str, object]] = []
    sets = ((EVEN_ROWS, 12, (OURS, LITDATA, PARALLEL)), (len(table), 7, (OURS, LITDATA, WHOLE)))
    for num_rows, steps, systems in sets:
        name = f"{dataset}, {num_rows} rows"
        data = Data(name, dataset, folder / f"{num_rows}", num_rows, (64, 64))
        write_parquet(data.folder, table.slice(0, num_rows))
        in_child(index_for_litdata, data.folder)
        rows += resume_table(data, steps, systems)
    sys.stdout.write(markdown(rows) + "\n")
    if options.rounds:
        # An epoch has to be longer than a measurement, because litdata starts its workers anew.
        times = -(-8 * (options.batches + 16) // len(table))
        data = Data(dataset, dataset, folder / "long", len(table) * times, crop_size)
        write_parquet(data.folder, pa.concat_tables([table] * times))
        in_child(index_for_litdata, data.folder)
        in_child(optimize_for_litdata, data.folder)
        sys.stdout.write(markdown(throughput_table(folder, data, options.rounds, options.batches)))


if __name__ == "__main__":
    main()
