"""The report of a run that ends, fails or is interrupted."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from segformer_pl.analysis.run import Run
from segformer_pl.atomic import WriteError
from segformer_pl.callbacks.report import RunReport


def metrics(split: str, miou: float) -> dict[str, float]:
    values = {"loss": 0.4321, "miou": miou, "macc": 0.7, "aacc": 0.9, "iou/road": 0.912}
    return {f"{split}/{name}": value for name, value in values.items()}


def text_of(report: Path) -> str:
    """Text of a page without tags."""
    return " ".join(re.sub("<[^>]+>", " ", report.read_text()).replace("\u00a0", " ").split())


class TinyTask(pl.LightningModule):
    """Logs what the segmentation task logs; fails in training step ``fail_at``."""

    def __init__(self, fail_at: int = -1, failure: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.fail_at = fail_at
        self.failure = failure

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise self.failure("the run's own failure")
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict({**metrics("val", 0.8312), "val/locality_ceiling": 0.7778})

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict(metrics("test", 0.5))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=1)  # type: ignore[arg-type]


def trainer(tmp_path: Path, **arguments: Any) -> pl.Trainer:
    arguments = {
        "accelerator": "cpu",
        "max_steps": 2,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "logger": CSVLogger(tmp_path, name="demo"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": [RunReport()],
    } | arguments
    return pl.Trainer(**arguments)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("segformer_pl.callbacks.report.rank_zero_info", lines.append)
    return lines


def test_fit_writes_a_report(tmp_path: Path, messages: list[str]) -> None:
    trainer(tmp_path).fit(TinyTask(), data(), data())
    report = tmp_path / "demo" / "version_0" / "report.html"
    page = text_of(report)
    assert "last and best, at step 2" in page  # Lightning writes the index, 1, to metrics.csv
    assert "steps trained 2" in page
    assert messages == [f"mIoU 83.1 % (locality ceiling 77.8 %)   report: {report}"]


def test_validate_and_test_write_a_report(tmp_path: Path, messages: list[str]) -> None:
    trainer(tmp_path).validate(TinyTask(), data(), verbose=False)
    trainer(tmp_path).test(TinyTask(), data(), verbose=False)
    assert "mIoU 83.1 %" in text_of(tmp_path / "demo" / "version_0" / "report.html")
    assert "mIoU 50.0 %" in text_of(tmp_path / "demo" / "version_1" / "report.html")
    assert [line.split("   ")[0] for line in messages] == [
        "mIoU 83.1 % (locality ceiling 77.8 %)",
        "test mIoU 50.0 %",
    ]


def test_without_a_report_the_message_depends_on_the_command(
    tmp_path: Path, messages: list[str]
) -> None:
    none = {"limit_val_batches": 0, "limit_test_batches": 0, "log_every_n_steps": 50}
    trainer(tmp_path, **none).validate(TinyTask(), data(), verbose=False)
    trainer(tmp_path, **none).test(TinyTask(), data(), verbose=False)
    trainer(tmp_path, **none).fit(TinyTask(), data())
    assert [line.split("; ")[1].split(", with")[0] for line in messages] == [
        "evaluate at least one batch (trainer.limit_val_batches)",
        "evaluate at least one batch (trainer.limit_test_batches)",
        "train for at least trainer.log_every_n_steps steps",
    ]


def test_a_failed_run_has_a_report_and_raises_its_exception(
    tmp_path: Path, messages: list[str]
) -> None:
    with pytest.raises(RuntimeError, match="the run's own failure"):
        trainer(tmp_path, max_steps=4).fit(TinyTask(fail_at=3), data(), data())
    report = tmp_path / "demo" / "version_0" / "report.html"
    assert "steps trained 3" in text_of(report)
    assert len(messages) == 1


def test_an_interrupted_run_has_a_report(tmp_path: Path, messages: list[str]) -> None:
    with pytest.raises(SystemExit):
        trainer(tmp_path).fit(TinyTask(fail_at=1, failure=KeyboardInterrupt), data(), data())
    assert "No validation" in text_of(tmp_path / "demo" / "version_0" / "report.html")


def test_an_error_in_the_report_does_not_hide_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Run) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr("segformer_pl.callbacks.report.write_report", broken)
    with (
        pytest.warns(UserWarning, match="report could not be written: disk full"),
        pytest.raises(RuntimeError, match="the run's own failure"),
    ):
        trainer(tmp_path).fit(TinyTask(fail_at=1), data(), data())


def test_a_failure_before_the_first_logged_value_has_no_report(
    tmp_path: Path, messages: list[str]
) -> None:
    with pytest.raises(RuntimeError, match="the run's own failure"):
        trainer(tmp_path).fit(TinyTask(fail_at=0), data(), data())
    assert list(tmp_path.rglob("report.html")) == []
    assert messages == []


def test_a_run_without_csv_logger_has_a_message_and_no_report(
    tmp_path: Path, messages: list[str]
) -> None:
    trainer(tmp_path, logger=False, default_root_dir=tmp_path).fit(TinyTask(), data(), data())
    assert not (tmp_path / "report.html").exists()
    assert len(messages) == 1
    assert "nothing was logged to" in messages[0]
    assert "with a CSVLogger as the first logger" in messages[0]


def test_an_error_in_the_report_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Run) -> Path:
        raise WriteError("cannot write 'report.html': disk full")

    monkeypatch.setattr("segformer_pl.callbacks.report.write_report", broken)
    with pytest.warns(UserWarning, match="report could not be written: cannot write"):
        trainer(tmp_path).fit(TinyTask(), data(), data())


def test_fast_dev_run_writes_no_report(tmp_path: Path, messages: list[str]) -> None:
    trainer(tmp_path, fast_dev_run=True, default_root_dir=tmp_path).fit(TinyTask(), data(), data())
    assert messages == []
    assert list(tmp_path.iterdir()) == []
