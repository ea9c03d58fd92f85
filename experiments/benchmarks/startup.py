"""What do imports and ``--help`` cost, beside ``import torch``?

Every case runs in a new interpreter, in interleaved rounds. The table has medians of the CPU
seconds (user and system, which a busy machine changes little), of their ratio to those of
``import torch`` in the same round, and of the wall-clock seconds::

    python experiments/benchmarks/startup.py --rounds 5
    python experiments/benchmarks/startup.py --rounds 3 --cases segformer_pl.task fit compare
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

TORCH = "import torch"
IMPORTS = ("segformer_pl", "segformer_pl.models", "segformer_pl.inference", "segformer_pl.data")
IMPORTS += ("segformer_pl.analysis", "lightning.pytorch", "segformer_pl.task", "segformer_pl.cli")
COMMANDS = ("predict", "compare", "ablate", "arena", "recipe", "robustness", "test_time", "erf")
COMMANDS += ("profile", "scaling", "convert", "doctor", "fit", "validate", "test")
HELP = "help"  # of all commands


def main() -> None:
    """Measure all cases, or those that are given, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[*IMPORTS, HELP, *COMMANDS],
        help=f"modules to import; commands, for their --help; {HELP}, for the list of commands",
    )
    options = parser.parse_args()
    commands = {TORCH: ["-c", TORCH]} | {case: command(case) for case in options.cases}
    seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in commands}
    for number in range(options.rounds):
        sys.stderr.write(f"round {number + 1} of {options.rounds}\n")
        for case, arguments in commands.items():
            seconds[case].append(measure(arguments))
    sys.stdout.write("| case | CPU s | of import torch | wall s |\n|---|---|---|---|\n")
    for case, runs in seconds.items():
        cpu, wall = (median(values) for values in zip(*runs))
        ratio = median(run[0] / torch[0] for run, torch in zip(runs, seconds[TORCH]))
        sys.stdout.write(f"| {case} | {cpu:.2f} | {ratio:.2f} | {wall:.1f} |\n")


def command(case: str) -> list[str]:
    """Return the arguments of the interpreter: an import, or a command with ``--help``."""
    if case.startswith(("segformer_pl", "lightning")):
        return ["-c", f"import {case}"]
    return ["-m", "segformer_pl", *([] if case == HELP else [case]), "--help"]


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run the interpreter; -> its CPU seconds and wall-clock seconds."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user - before.children_user
    return cpu + after.children_system - before.children_system, wall


if __name__ == "__main__":
    main()
