"""Settings of the runs of a study, resolved by the parser of ``fit``."""

import pytest
import torch
import yaml

from segformer_pl.ablation.run_settings import make_job, run_settings
from segformer_pl.analysis.configuration import settings_digest, training_configuration
from segformer_pl.checkpoints import load_weights
from segformer_pl.cli.training import resolve
from segformer_pl.models import segformer_b0

LOGGERS = [
    {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "p"}},
    {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}},
]


def resolved(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return resolve([str(file)])


@pytest.mark.slow
def test_a_run_has_its_folder_seed_and_place_in_wandb(read, tmp_path):
    base = {"trainer": {"logger": LOGGERS, "default_root_dir": "elsewhere"}}
    study = read(base, evaluations={"at_96": {"model.inference.base_size": [96, 96]}})
    run = study.runs(tmp_path / "out")[3]
    job = make_job(study, run)
    config = resolved(job.config, tmp_path)
    csv, wandb = config["trainer"]["logger"]
    arguments = csv["init_args"]
    assert run.folder.name.startswith("other.seed1.small.")
    assert [arguments[key] for key in ("save_dir", "name", "version")] == [
        str(tmp_path / "out"),
        "tiny",
        run.folder.name,
    ]
    assert arguments["flush_logs_every_n_steps"] == 1  # as often as there are values
    assert config["seed_everything"] == 1
    assert config["trainer"]["default_root_dir"] is None
    options = wandb["init_args"]
    assert (options["group"], options["job_type"], options["name"]) == (
        "tiny",
        "other",
        "other.seed1",
    )
    assert options["tags"] == ["tiny", "small", "other", "seed1"]
    assert options["project"] == "p"
    again = run_settings(study, run)["trainer"]["logger"][1]["init_args"]["version"]
    assert options["version"] == again  # so a resumed run continues its W&B run
    assert job.evaluations == {"at_96": {"model": {"inference": {"base_size": [96, 96]}}}}
    assert job.record["changes"] == run.variant.changes
    # What the runner adds is not part of what is trained.
    settings = training_configuration({0: config}, None)
    assert settings_digest(settings) == run.variant.digest


@pytest.mark.slow
def test_weights_are_transplanted_and_reported(read, tmp_path):
    source = segformer_b0(6)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    ratios = {"model.network.init_args.sr_ratios": [16, 8, 4, 2]}
    study = read(transplant=str(tmp_path / "w.pth"), variants={"paper": {}, "r16": ratios})
    jobs = [make_job(study, run) for run in study.runs(tmp_path)[:2]]
    states = []
    for job in jobs:
        network = segformer_b0(6, sr_ratios=[8, 4, 2, 1] if job is jobs[0] else [16, 8, 4, 2])
        load_weights(network, job.config["model"]["weights"])
        states.append(network.state_dict())
    key = "head.fuse.weight"
    assert torch.equal(states[0][key], source.state_dict()[key])
    assert torch.equal(states[1][key], source.state_dict()[key])
    assert any("copied" in sentence for sentence in jobs[0].record["transplanted"])
    assert len(jobs[1].record["transplanted"]) > len(jobs[0].record["transplanted"])
