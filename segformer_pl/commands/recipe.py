"""``recipe diff RUN_OR_YAML [YAML ...]``: departures of a run from the paper's recipe."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.run import Run
from segformer_pl.errors import UserError
from segformer_pl.yaml_file import read_mapping

Resolve = Callable[[list[str]], dict[str, Any]]


def run(options: Namespace, resolve: Resolve) -> None:
    """Run ``recipe diff RUN_OR_YAML [YAML ...]`` and print the departures from the paper's recipe.

    Args:
        options: Options as ``options/recipe.py`` parses them.
        resolve: Function that maps YAML files to the complete settings of a ``fit`` with them.

    Raises:
        UserError: A folder contains no configuration, or a configuration cannot be read.
    """
    sources = [Path(source) for source in options.sources]
    runs = [_run_of(source) for source in sources]
    if len(runs) == 1 and runs[0] is not None:
        # The file of a run is complete. Parsing it again would add today's defaults of settings
        # that did not exist when the run was trained.
        config = runs[0].config
    else:
        for source in [source for source, run in zip(sources, runs) if run is None]:
            read_mapping(source, "settings, the folder of a run or a checkpoint in one")
        files = [str(run.config_file if run else file) for run, file in zip(runs, sources)]
        config = resolve(files)
    sys.stdout.write(table(config) + "\n")


def table(config: Mapping[str, Any]) -> str:
    """Return the departures of a run from the recipe as a table, one line for each."""
    listed = departures(config)
    rows = [("setting", "paper", "here", "source")]
    rows += [(one.setting, one.paper, one.here, one.source) for one in listed]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [scope(config)]
    if listed:
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    count = "1 departure" if len(listed) == 1 else f"{len(listed)} departures"
    if notes := remarks(config):
        lines += [f"{count}; independent of the settings:", *(f"- {note}" for note in notes)]
    return "\n".join(lines)


def _run_of(source: Path) -> Run | None:
    """Return the run of a folder, or of a checkpoint in one; None for any other file."""
    if not source.is_dir():
        return Run.of(source) if source.is_file() else None
    run = Run(source)
    if not run.config_file.is_file():
        raise UserError(
            f"{str(source)!r} contains no {run.config_file.name}; give the folder of one run, such "
            "as runs/demo/version_0, or YAML files"
        )
    return run
