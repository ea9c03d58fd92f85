"""Export of a study as a W&B sweep: a grid of one settings file per variant, and the seeds."""

from pathlib import Path
from typing import Any

import yaml

from segformer_pl.ablation.run_settings import WANDB, run_settings
from segformer_pl.ablation.study import Study, Variant
from segformer_pl.analysis.configuration import SEED
from segformer_pl.atomic import atomic_write_text
from segformer_pl.errors import UserError


def write_wandb_sweep(study: Study, file: Path, output: Path) -> list[Path]:
    """Write a W&B sweep with the runs of a study.

    The settings of each variant are written into the folder ``<name of the file>_configs`` beside
    it. ``wandb sweep FILE`` and ``wandb agent`` then train the same runs as ``ablate``, each in a
    new run folder, because W&B and not the names of folders says what is left to do.

    Args:
        study: The study.
        file: YAML file of the sweep to write.
        output: Folder of all studies, for the run folders.

    Returns:
        The files written, that of the sweep first.

    Raises:
        UserError: One of the files exists already.
        WriteError: A file cannot be written.
    """
    folder = file.with_name(f"{file.stem}_configs")
    configs = {
        folder / f"{variant.name}.{study.budget}.yaml": _variant_config(study, variant, output)
        for variant in study.variants
    }
    for path in (file, *configs):
        if path.exists():
            raise UserError(f"'{path}' exists already; remove it or give another path")
    for path, config in configs.items():
        atomic_write_text(path, yaml.safe_dump(config, sort_keys=False))
    sweep = {
        "name": f"{study.name} ({study.budget})",
        "description": study.question,
        "method": "grid",
        "metric": {"name": "val/miou", "goal": "maximize"},
        "program": "segformer_pl",
        "command": ["${env}", "${interpreter}", "-m", "${program}", "fit", "${args}"],
        "parameters": {
            "config": {"values": [str(path) for path in configs]},
            SEED: {"values": list(study.seeds)},
        },
    }
    atomic_write_text(file, yaml.safe_dump(sweep, sort_keys=False))
    return [file, *configs]


def _variant_config(study: Study, variant: Variant, output: Path) -> dict[str, Any]:
    """Return the settings of a variant without its seed, logged to W&B."""
    run = next(run for run in study.runs(output) if run.variant is variant)
    config = run_settings(study, run)
    del config[SEED]
    csv, *others = config["trainer"]["logger"]
    csv["init_args"]["version"] = None
    wandb = next((one for one in others if one["class_path"].endswith(f".{WANDB}")), None)
    if wandb is None:
        wandb = {"class_path": f"lightning.pytorch.loggers.{WANDB}", "init_args": {}}
    arguments = {
        **wandb["init_args"],
        "name": None,  # W&B names the runs and knows their seeds
        "version": None,
        "group": study.name,
        "job_type": variant.name,
        "tags": [study.name, study.budget, variant.name],
    }
    rest = [one for one in others if one is not wandb]
    config["trainer"]["logger"] = [csv, {**wandb, "init_args": arguments}, *rest]
    return config
