"""What a run records about itself: command, code, versions, hardware, and ends of its parts."""

import json
import pickle
import signal
import subprocess
from contextlib import nullcontext
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
from segformer_pl.cli.exits import explain
from segformer_pl.errors import Interrupted, UserError

COMMAND = ["python", "-m", "segformer_pl", "fit", "--data.path", "my <data>"]


class TinyTask(pl.LightningModule):
    trained_steps = 2

    def __init__(self, end: BaseException | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.end = end  # raised in the third validation batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/miou", 0.5)
        if self.end is not None and batch_idx == 2:
            raise self.end

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Function (command of the trainer, steps, ...) -> the run folder after the command."""

    def make(
        name: str, max_steps: int = 2, end: BaseException | None = None, **arguments: Any
    ) -> Run:
        data: Any = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=1)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=CSVLogger(tmp_path, name="demo", version=0),
            callbacks=[RunProvenance(COMMAND, explain)],
            max_steps=max_steps,
            val_check_interval=min(max_steps, 2),
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loaders = (data, data) if name == "fit" else (data,)
        with nullcontext() if end is None else pytest.raises((SystemExit, type(end))):
            getattr(trainer, name)(TinyTask(end), *loaders, **arguments)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return Run(tmp_path / "demo" / "version_0")

    return make


def test_every_part_of_a_run_is_recorded_and_reported(run: Any, tmp_path: Path) -> None:
    (first,) = run("fit").parts
    assert (first.stage, first.step, first.is_ended) == ("fit", 0, True)
    assert (first.end, first.last_step) == ("finished", 2)
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


@pytest.mark.parametrize(
    ("end", "recorded"),
    [
        (UserError("sample 'x' is damaged; remove it"), "error: sample 'x' is damaged; remove it"),
        (MemoryError("so large"), "error: the memory is full (so large); use smaller batches"),
        (KeyError("a\nb"), r"error: KeyError: 'a\nb'"),
        (Interrupted(128 + signal.SIGTERM, "a message"), "SIGTERM"),
        (Interrupted(128 + signal.SIGINT), "Ctrl-C"),
        (KeyboardInterrupt(), "Ctrl-C"),
        (SystemExit(3), "error: SystemExit(3)"),
    ],
)
def test_the_end_of_a_part_is_recorded(run: Any, end: BaseException, recorded: str) -> None:
    part = run("fit", 20, end=end).parts[-1]
    assert part.end.startswith(recorded)
    assert (part.is_ended, part.last_step) == (True, 2)


def test_other_ranks_record_no_end() -> None:
    """Theirs is an exception with the code 0, see :class:`StopOnSignal`."""
    nothing: Any = None
    RunProvenance().on_exception(nothing, nothing, Interrupted(0))


def test_launchers_can_pickle_the_callback() -> None:
    copy = pickle.loads(pickle.dumps(RunProvenance(COMMAND, explain)))
    assert copy.explain is explain
    assert RunProvenance().explain(KeyError()) is None


def test_a_part_that_was_killed_has_no_end(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(RunProvenance, "on_exception", lambda *_: None)
    part = run("fit", 20, end=KeyError()).parts[-1]
    assert (part.is_ended, part.end, part.last_step) == (False, "", 0)


def test_files_of_earlier_versions_tell_no_end(run: Any) -> None:
    made = run("fit")
    file = made.folder / "provenance.json"
    old = [
        {k: v for k, v in one.items() if k not in ("end", "last_step")}
        for one in json.loads(file.read_text())
    ]
    file.write_text(json.dumps(old))
    (part,) = Run(made.folder).parts
    assert (part.end, part.last_step, part.is_ended) == ("", None, True)


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
