"""``recipe diff RUN_OR_YAML [YAML ...]``: how far a run departs from the paper's recipe."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.run import Run
from segformer_pl.commands.parser import PROG, SegformerArgumentParser
from segformer_pl.errors import UserError

Resolve = Callable[[list[str]], dict[str, Any]]


def recipe(arguments: list[str], resolve: Resolve) -> None:
    """``recipe diff RUN_OR_YAML [YAML ...]``: how far a run departs from the paper's recipe.

    Args:
        arguments: Those of the command.
        resolve: Function of YAML files -> the configuration that a run of them would have; the
            command line's.

    Raises:
        UserError: A folder holds no configuration, or it cannot be read; one sentence says which.
    """
    parser = SegformerArgumentParser(
        prog=f"{PROG} recipe",
        description="List every setting in which a run departs from the paper's recipe for its "
        "network and data set, with the place that states the paper's value.",
    )
    parser.add_argument("what", choices=["diff"], help="list the departures")
    parser.add_argument(
        "sources",
        nargs="+",
        help="run folder, or a checkpoint in one; or YAML files, merged in this order as --config "
        "merges them",
    )
    sources = [Path(source) for source in parser.parse_args(arguments).sources]
    runs = [_run_of(source) for source in sources]
    if len(runs) == 1 and runs[0] is not None:
        # A run's own file is complete. The command line would fill in what it did not know then.
        config = runs[0].configs[0]
    else:
        files = [str(run.config_file if run else file) for run, file in zip(runs, sources)]
        try:
            config = resolve(files)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{', '.join(map(repr, files))}: not all are YAML files ({error.reason}); give the "
                "folder of a run, a checkpoint in one, or YAML files"
            ) from error
    sys.stdout.write(table(config) + "\n")


def table(config: Mapping[str, Any]) -> str:
    """The departures of a run as text, one line for each."""
    found = departures(config)
    rows = [("setting", "paper", "here", "source")]
    rows += [(one.setting, one.paper, one.here, one.source) for one in found]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [scope(config)]
    if found:
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    count = "1 departure" if len(found) == 1 else f"{len(found)} departures"
    if known := remarks(config):
        lines += [f"{count}; and what no setting changes:", *(f"- {remark}" for remark in known)]
    return "\n".join(lines)


def _run_of(source: Path) -> Run | None:
    """The run of a folder, or of a checkpoint in one; None for any other file."""
    if not source.is_dir():
        return Run.of(source) if source.is_file() else None
    run = Run(source)
    if not run.config_file.is_file():
        raise UserError(
            f"{str(source)!r} holds no {run.config_file.name}; give the folder of one run, such as "
            "runs/demo/version_0, or YAML files"
        )
    return run
