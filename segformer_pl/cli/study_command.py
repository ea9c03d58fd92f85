"""What ``ablate`` and ``arena`` share: their options, and planning and running a study."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

import torch
from jsonargparse import Namespace

from segformer_pl.ablation.costs import costs_table
from segformer_pl.ablation.folder import (
    JOBS_FOLDER,
    State,
    check_evaluation_settings,
    check_record,
)
from segformer_pl.ablation.launchers import Launcher, LocalLauncher, SlurmLauncher, gpu_sets
from segformer_pl.ablation.live import make_display, overall_progress
from segformer_pl.ablation.planning import find_spread, resolution, study_costs
from segformer_pl.ablation.progress import RunProgress
from segformer_pl.ablation.run_settings import (
    check_evaluations,
    check_transplants,
    evaluation_settings,
    make_job,
    run_record,
)
from segformer_pl.ablation.runner import StudyRunner, signal_name
from segformer_pl.ablation.study import Study, read_study
from segformer_pl.ablation.sweep import write_wandb_sweep
from segformer_pl.atomic import make_writable_folder
from segformer_pl.cli.building import resolve_and_build
from segformer_pl.cli.study_data import check_data_is_there, check_same_data
from segformer_pl.cli.training import resolve
from segformer_pl.commands.options.parser import PROG
from segformer_pl.errors import Interrupted, UserError, counted

Report = Callable[[Study, Namespace], bool]


def run_study_command(name: str, report: Report, options: Namespace) -> None:
    """Train all variants of a study with all seeds, evaluate them, and write the report.

    Args:
        name: Name of the command.
        report: Function (study, options) that writes the report of the finished runs, prints where
            it is, or why there is none, and returns whether there is one.
        options: Options as ``commands/options/study.py`` parses them.

    Raises:
        UserError: The study or an option is wrong.
        Interrupted: SIGTERM or Ctrl-C has ended the study.
    """
    settings = {} if options.data.path is None else {"data.path": options.data.path}
    # Settings that would fail in every run are refused before any training; a report needs none.
    is_checked = not options.report
    study = read_study(
        Path(options.study), options.budget, resolve_and_build if is_checked else resolve, settings
    )
    if is_checked:
        check_evaluations(study, resolve_and_build)
    output = Path(options.output)
    if options.wandb_sweep is not None:
        file, *configs = write_wandb_sweep(study, Path(options.wandb_sweep), output)
        sys.stdout.write(
            f"wrote {file} and the settings of {counted(len(configs), 'variant')} in "
            f"{configs[0].parent}\n"
            f"start it with\nwandb sweep {shlex.quote(str(file))}\n"
        )
        return
    runs = [RunProgress(run, tuple(study.evaluations)) for run in study.runs(output)]
    check_transplants(study)
    for run in runs:
        check_record(run.run.folder, run_record(study, run.run))
        check_evaluation_settings(run.run.folder, evaluation_settings(study))
    if is_checked or options.data.path is not None:  # `arena` measures on these data
        check_same_data(study, output / study.name)
    if options.dry_run:
        for run in runs:
            run.look()
        sys.stdout.write("\n".join(_plan(study, runs, output)) + "\n")
        return
    signum = 0
    if not options.report:
        if options.launcher == "local":
            check_data_is_there(study)
        make_writable_folder(output / study.name, "output")
        signum = _execute(study, runs, options)
    else:
        for run in runs:
            run.look()
    sys.stdout.write("\n".join(_summary(runs)) + "\n")
    if signum:
        again = shlex.join([*PROG.split(), name, *options.arguments])
        raise Interrupted(128 + signum, f"{signal_name(signum)}: stopped; go on with\n{again}")
    is_written = report(study, options)
    if not is_written or any(run.state == State.FAILED for run in runs):
        sys.exit(1)


def _execute(study: Study, runs: list[RunProgress], options: Namespace) -> int:
    """Execute the unfinished runs; return the number of the signal that ended them, or 0."""
    runner = StudyRunner(
        runs,
        lambda progress: make_job(study, progress.run),
        _launcher(study, options),
        make_display(),
        options.retry_failed,
    )
    runner.run()
    return runner.signal


def _launcher(study: Study, options: Namespace) -> Launcher:
    # A folder of its own: submitit names its files by process ids, which return.
    jobs = Path(options.output, study.name, JOBS_FOLDER)
    folder = jobs / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000:06d}"
    trainers = [variant.config["trainer"] for variant in study.variants]
    if options.launcher == "slurm":
        return SlurmLauncher(folder, study.name, options.max_parallel, options.slurm, trainers)
    uses_gpus = any(trainer["accelerator"] != "cpu" for trainer in trainers)
    num_gpus = torch.cuda.device_count() if uses_gpus else 0
    devices = [trainer["devices"] for trainer in trainers]
    num_each = max([1, *(number for number in devices if isinstance(number, int))])
    if num_gpus and num_each > num_gpus:
        raise UserError(
            f"trainer.devices is {num_each}, but this machine has {num_gpus} GPUs; give "
            "--launcher slurm or set trainer.devices in the budget"
        )
    gpus = gpu_sets(num_gpus, num_each) if num_gpus else []
    return LocalLauncher(folder, options.max_parallel or max(1, len(gpus)), gpus)


def _plan(study: Study, runs: list[RunProgress], output: Path) -> list[str]:
    """Return what a study would do, cost and resolve, as lines of text."""
    num = {state: sum(run.state == state for run in runs) for state in State}
    left = [run for run in runs if run.state not in (State.DONE, State.FAILED)]
    steps = sum(run.run.max_steps - run.step for run in left)
    seeds = ", ".join(map(str, study.seeds))
    costs = study_costs(study)
    table = (
        "costs: unknown, because nothing states the size of the images; give data.crop_size"
        if costs is None
        else costs_table(costs)
    )
    lines = [
        f"{counted(len(study.variants), 'variant')} x {counted(len(study.seeds), 'seed')} "
        f"({seeds}) = "
        f"{counted(len(runs), 'run')} "
        f"with budget {study.budget}: {num[State.DONE]} done, {num[State.FAILED]} failed, "
        f"{len(left)} left ({steps:,} steps)",
        *_failures(runs),
        "",
        *resolution(study, find_spread(study, output / study.name)),
    ]
    return [study.question, "", table, "", *(fill(line, 100) for line in lines)]


def _summary(runs: list[RunProgress]) -> list[str]:
    """Return the outcome of all runs in the end, as lines of text."""
    return [f"{overall_progress(runs, None)}", *_failures(runs)]


def _failures(runs: list[RunProgress]) -> list[str]:
    failed = [run for run in runs if run.state == State.FAILED]
    lines = [f"{run.name} failed: {run.sentence}" for run in failed]
    if lines:
        lines.append("failed runs are started again with --retry_failed")
    return lines
