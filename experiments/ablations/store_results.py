"""Store the small files of a study's finished runs: ``store_results.py STUDY_FOLDER DESTINATION``.

The statistics and the report of a study are rebuilt from these files alone (about 45 kB a run), and
``ablate --output DESTINATION_PARENT`` continues such a study. Checkpoints, figures, maps of
receptive fields, reports of single runs and all evaluations but the last are left out.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml

from segformer_pl.ablation.folder import SETTINGS_FILE
from segformer_pl.analysis.arena import ARENA_FOLDER
from segformer_pl.analysis.run import Run
from segformer_pl.errors import UserError

# Where a run was stored; not among the settings that are compared.
SAVE_DIR = "runs/ablations"


def store(folder: Path, destination: Path) -> int:
    """Copy the small files of all finished runs and return the number of runs.

    Args:
        folder: Folder of a study, such as ``runs/ablations/reduction_ratio``.
        destination: Folder of the copies.
    """
    number = 0
    for path in sorted(folder.iterdir()):
        run = Run(path)
        entry = run.ablation
        if entry is None or not run.evaluations or run.evaluations[-1].step != entry["max_steps"]:
            continue
        target = destination / path.name
        files = [run.ablation_file, run.metrics_file, path / "training_data.json"]
        files.append(run.evaluations[-1].file)
        files += (path / ARENA_FOLDER).rglob("*.json")
        for named in run.named_evaluations.values():
            settings = named.folder / SETTINGS_FILE
            files += [named.config_file, *(one.file for one in named.evaluations)]
            files += [settings] if settings.is_file() else []
        for file in files:
            copy = target / file.relative_to(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        for file in target.rglob("config.yaml"):
            file.write_text(_relocated(file.read_text("utf-8")), encoding="utf-8")
        (target / "config.yaml").write_text(_relocated(run.config_text), encoding="utf-8")
        number += 1
    return number


def _relocated(text: str) -> str:
    """Return settings whose loggers write to the usual folder, whichever they wrote to."""
    config: dict[str, Any] = yaml.safe_load(text)
    loggers = config["trainer"]["logger"]
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        logger["init_args"]["save_dir"] = SAVE_DIR
    config["trainer"]["default_root_dir"] = None
    config["ckpt_path"] = None
    return yaml.safe_dump(config, sort_keys=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a study")
    parser.add_argument("destination", type=Path, help="folder of the copies")
    options = parser.parse_args()
    if not options.folder.is_dir():
        raise UserError(f"folder: there is no study in '{options.folder}'")
    number = store(options.folder, options.destination)
    print(f"{number} finished runs of {options.folder} are in {options.destination}")  # noqa: T201


if __name__ == "__main__":
    main()
