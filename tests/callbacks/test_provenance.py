"""What a run records about itself: command, code, versions, hardware, and duration of its parts."""

import json
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import segformer_pl
from segformer_pl.analysis import provenance
from segformer_pl.analysis.report import write_report
from segformer_pl.analysis.report.provenance_facts import duration_text
from segformer_pl.analysis.run import Run
from segformer_pl.callbacks.provenance import RunProvenance

COMMAND = ["python", "-m", "segformer_pl", "fit", "--data.path", "my <data>"]


class TinyTask(pl.LightningModule):
    trained_steps = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/miou", 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Function (command of the trainer, steps, ...) -> the run folder after the command."""

    def make(name: str, max_steps: int = 2, **arguments: Any) -> Run:
        data: Any = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=1)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=CSVLogger(tmp_path, name="demo", version=0),
            callbacks=[RunProvenance(COMMAND)],
            max_steps=max_steps,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loaders = (data, data) if name == "fit" else (data,)
        getattr(trainer, name)(TinyTask(), *loaders, **arguments)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return Run(tmp_path / "demo" / "version_0")

    return make


def test_every_part_of_a_run_is_recorded_and_reported(run: Any, tmp_path: Path) -> None:
    (first,) = run("fit").parts
    assert (first.stage, first.step, first.is_ended) == ("fit", 0, True)
    assert first.command == "python -m segformer_pl fit --data.path 'my <data>'"
    assert 0 <= first.seconds < 60
    assert first.versions["torch"] == torch.__version__
    assert {"python", "segformer_pl", "lightning", "timm"} <= set(first.versions)
    assert "pytest" not in first.versions  # an extra
    assert first.hardware.endswith(" thread)")
    run("fit", 4, ckpt_path=tmp_path / "last.ckpt")
    validated = run("validate", verbose=False)
    assert [(part.stage, part.step) for part in validated.parts] == [
        ("fit", 0),
        ("fit", 2),
        ("validate", 2),
    ]
    page = write_report(validated).read_text()
    assert "my &lt;data&gt;" in page
    assert "3 parts in all" in page
    assert f"torch {torch.__version__}" in page
    assert "An earlier part, fit from step 2" in page
    totals = {"images": 80, "batches": 10, "seconds": 4.0, "data_seconds": 0, "forward_seconds": 1}
    content = {"first_step": 0, "last_step": 4, "accumulate": 1, "ranks": [{"rank": 0, **totals}]}
    (validated.folder / "throughput.json").write_text(json.dumps(content))
    assert "20.0 training images per second" in write_report(Run(validated.folder)).read_text()
    (validated.folder / "provenance.json").write_text('[{"stage": "fit"}]')
    assert "Provenance" not in write_report(Run(validated.folder)).read_text()


def test_the_commit_is_that_of_the_package(monkeypatch: Any, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    package = tmp_path / "segformer_pl"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(segformer_pl, "__file__", str(package / "__init__.py"))
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=of another project")
    assert provenance.code_commit() == ""  # the package is installed below another project
    git("add", ".")
    git("commit", "--quiet", "--message=its own")
    git("tag", "v1")
    commit = provenance.code_commit()
    assert len(commit) == 40
    (package / "__init__.py").write_text("changed = 1")
    assert provenance.code_commit() == f"{commit}-dirty"


def test_durations() -> None:
    seconds = (0.42, 59.7, 61, 3600, 7325, 200_000)
    texts = ["0.4 s", "1 min 0 s", "1 min 1 s", "1 h 0 min", "2 h 2 min", "2 d 7 h"]
    assert [duration_text(value) for value in seconds] == texts
