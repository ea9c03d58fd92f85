"""The settings of ``fit`` of one run of a study: seed, run folder, checkpoints, W&B."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch

from segformer_pl.ablation.folder import JOBS_FOLDER
from segformer_pl.ablation.job import RunJob, csv_logger, validation_settings
from segformer_pl.ablation.study import Resolve, Study, StudyRun, nested, resolve_layers
from segformer_pl.analysis.configuration import SEED
from segformer_pl.checkpoints.sources import read_weights
from segformer_pl.checkpoints.transplant import transplant, write_transplanted
from segformer_pl.errors import UserError

CSV = "CSVLogger"
WANDB = "WandbLogger"
LOG_INTERVAL = 50  # Lightning's default of trainer.log_every_n_steps


def run_settings(study: Study, run: StudyRun) -> dict[str, Any]:
    """Return the complete settings of a run's ``fit``.

    They are those of its variant, with what a run of a study needs: its seed, its folder, the
    checkpoint to resume from, and its place in W&B if the base logs there.
    """
    config = copy.deepcopy(run.variant.config)
    trainer = config["trainer"]
    config[SEED] = run.seed
    trainer["logger"] = [_csv_logger(run.folder, trainer), *_other_loggers(study, run)]
    trainer["default_root_dir"] = None
    config["last_checkpoint"] = {**(config.get("last_checkpoint") or {}), "dirpath": None}
    if not any("ProgressBar" in str(path) for path in _class_paths(trainer["callbacks"])):
        trainer["enable_progress_bar"] = False
    return config


def make_job(study: Study, run: StudyRun) -> RunJob:
    """Return the job that trains and evaluates a run."""
    config, record = run_settings(study, run), run_record(study, run)
    if study.transplant is not None:
        file = run.folder.parent / JOBS_FOLDER / f"{run.folder.name}.weights.safetensors"
        config["model"]["weights"] = str(file)
        record["transplanted"] = _transplant(study.transplant, run, file)
    return RunJob(
        folder=run.folder,
        config=config,
        evaluations=evaluation_settings(study),
        max_steps=run.max_steps,
        record=record,
    )


def evaluation_settings(study: Study) -> dict[str, dict[str, Any]]:
    """Return the settings of ``validate`` of each evaluation as nested dictionaries."""
    return {name: nested(settings) for name, settings in study.evaluations.items()}


def check_evaluations(study: Study, resolve: Resolve) -> None:
    """Check the settings of the evaluations of every variant, as ``validate`` will read them.

    Args:
        study: The study.
        resolve: Function as for :func:`~.study.read_study`, for the command ``validate``.

    Raises:
        UserError: ``validate`` would refuse them.
    """
    for name, settings in study.evaluations.items():
        for variant in study.variants:
            origin = f"{study.file}: evaluations: '{name}' of variant '{variant.name}'"
            config = validation_settings(variant.config, False)
            resolve_layers(origin, [], [config, settings], resolve, "validate")


def check_transplants(study: Study) -> None:
    """Check that the weights of a study can be transplanted into every variant.

    Raises:
        UserError: They cannot be read, or do not fit a variant.
    """
    if study.transplant is None:
        return
    try:
        weights = read_weights(study.transplant)
    except UserError as error:
        raise UserError(f"{study.file}: transplant: {error}") from error
    for variant in study.variants:
        try:
            transplant(variant.build_network(), weights)
        except UserError as error:
            raise UserError(f"{study.file}: variant '{variant.name}': {error}") from error


def _transplant(source: str, run: StudyRun, file: Path) -> list[str]:
    """Write the weights that a run starts from; return what was done to them, in sentences."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)  # for what the source lacks
        return write_transplanted(source, run.variant.build_network(), file)


def run_record(study: Study, run: StudyRun) -> dict[str, Any]:
    """Return the content of a run's ``ablation.json``, apart from its environment."""
    return {
        "study": study.name,
        "question": study.question,
        "budget": study.budget,
        "variant": run.variant.name,
        "changes": run.variant.changes,
        "reference": study.reference,
        "seed": run.seed,
        "digest": run.variant.digest,
        "max_steps": run.max_steps,
        "evaluations": list(study.evaluations),
        "variants": [variant.name for variant in study.variants],
        "transplant": study.transplant,
        "transplanted": [],
    }


def wandb_logger(logger: dict[str, Any], study: Study, run: StudyRun) -> dict[str, Any]:
    """Return the setting of a WandbLogger with group, name and tags of a run.

    A run that is resumed continues its W&B run, whose id follows from study, variant and seed.
    """
    given = logger.get("init_args") or {}
    identity = f"{study.name}/{run.folder.name}"
    seed = f"seed{run.seed}"
    arguments = {
        **given,
        "name": f"{run.variant.name}.{seed}",
        "version": hashlib.sha256(identity.encode()).hexdigest()[:12],
        "group": study.name,
        "job_type": run.variant.name,
        "tags": [*(given.get("tags") or []), study.name, study.budget, run.variant.name, seed],
    }
    return {**logger, "init_args": arguments}


def _csv_logger(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    # Logged values are written at once, for the live table. Lightning writes every 100 steps.
    interval = trainer.get("log_every_n_steps") or LOG_INTERVAL
    return csv_logger(folder, flush_logs_every_n_steps=interval)


def _other_loggers(study: Study, run: StudyRun) -> list[dict[str, Any]]:
    """Return the loggers of the base besides CSVLoggers, which would write to another folder."""
    given = run.variant.config["trainer"]["logger"]
    loggers = given if isinstance(given, list) else [given]
    others = [
        logger
        for logger in loggers
        if isinstance(logger, dict) and _class_name(logger["class_path"]) != CSV
    ]
    return [
        wandb_logger(logger, study, run) if _class_name(logger["class_path"]) == WANDB else logger
        for logger in others
    ]


def _class_paths(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item["class_path"] for item in items if isinstance(item, dict)]


def _class_name(path: str) -> str:
    return path.rpartition(".")[2]
