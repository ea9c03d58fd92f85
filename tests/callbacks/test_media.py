"""What an offline run of Weights & Biases holds, read back from its file."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from segformer_pl.analysis.run import Run
from segformer_pl.callbacks import EvaluationRecord, PredictionPanel, RunReport
from segformer_pl.callbacks.media import MAX_SIDE, send_classes, send_masks
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny
from tests.wandb_file import artifacts, history, wait_for_end

PALETTE = [[0, 0, 0], [255, 255, 255], [9, 9, 9]]


def samples(count, height=64, width=700):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 2, (height, width), generator=generator)
    label[:8] = 255
    image = torch.rand(3, height, width, generator=generator)
    return [{"image": image, "label": label, "id": f"image-{n}"} for n in range(count)]


def fit(folder, ckpt=None, max_steps=2):
    """Train two or more steps with a validation after each; return the offline run's file."""
    import wandb

    loggers = [
        CSVLogger(folder, name="run", version=0),
        WandbLogger(project="test", save_dir=folder, offline=True, id="abc"),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=1,
        num_sanity_val_steps=1,
        logger=loggers,
        callbacks=[EvaluationRecord(2), PredictionPanel(1), RunReport()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    task = SegmentationTask(Tiny(), NAMES, PALETTE, warmup_steps=0)
    train, val = (DataLoader(samples(n), batch_size=1) for n in (2, 3))
    trainer.fit(task, train, val, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "end.ckpt")
    wandb.finish()
    file = sorted(folder.rglob("run-abc.wandb"))[-1]
    wait_for_end(file)
    return file


def images_of(rows, key):
    """The logged entries of a key, one for each step."""
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Files of a run to step 2, and of its resumption to step 4; the evaluation of step 2.

    The masks of the worst images are said to have been logged up to step 3, as if the first part
    had been killed after it.
    """
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        first = fit(folder)
        evaluation = Run(folder / "run" / "version_0").last_evaluation()
        record = folder / "run" / "version_0" / "wandb_media.json"
        content = json.loads(record.read_text())
        assert set(content["last steps"].values()) == {2}
        content["last steps"]["val/worst_masks"] = 3
        record.write_text(json.dumps(content))
        second = fit(folder, folder / "end.ckpt", max_steps=4)
    assert first != second
    return first, second, evaluation


@pytest.mark.slow
def test_masks_classes_figures_and_report_are_logged(parts):
    file, _, evaluation = parts
    rows, media = history(file), file.parent / "files"
    for key, count in {"val/worst_masks": 2, "val/predictions_masks": 1}.items():
        logged = images_of(rows, key)
        assert len(logged) == 2  # one for each validation, none for the check before the training
        for entry in logged:
            assert entry["count"] == count
            assert all(Image.open(media / name).size == (512, 47) for name in entry["filenames"])
            assert all(name.endswith(".jpg") for name in entry["filenames"])
            for masks in entry["all_masks"]:
                assert masks.keys() == {"prediction", "label"}
                label = np.array(Image.open(media / masks["label"]["path"]))
                assert set(np.unique(label)) == {0, 1, 255}
                assert label.shape == (47, 512)
    for key in ("val/worst", "val/predictions"):
        assert [entry["count"] for entry in images_of(rows, key)] == [1, 1]
    steps = [row["trainer/global_step"] for row in rows if "val/worst_masks" in row]
    assert steps == [row["trainer/global_step"] for row in rows if "val/miou" in row]
    tables = [
        json.loads((media / one["path"]).read_text()) for one in images_of(rows, "val/classes")
    ]
    assert len(tables) == 2
    assert tables[0]["columns"] == ["class", "IoU", "accuracy", "share of pixels"]
    assert [row[0] for row in tables[0]["data"]] == NAMES
    assert tables[1]["data"][1][1] == pytest.approx(evaluation.iou[1])
    assert tables[1]["data"][2][2] is None  # the accuracy of a class without a labelled pixel
    assert artifacts(file, "report") == [("report-abc", ["report.html"])]


@pytest.mark.slow
def test_a_resumed_run_logs_no_step_again(parts):
    _, second, _ = parts
    steps = {
        key: [row["trainer/global_step"] + 1 for row in history(second) if key in row]
        for key in ("val/worst_masks", "val/predictions_masks", "val/classes")
    }
    assert steps["val/worst_masks"] == [4]
    assert steps["val/predictions_masks"] == steps["val/classes"] == [3, 4]
    assert len(artifacts(second, "report")) == 1


class Recorder:
    """A logger that accepts images and tables, and fails if ``broken``."""

    def __init__(self, broken=False):
        self.broken, self.calls = broken, []

    def log_table(self, key, columns, data, step):
        if self.broken:
            raise OSError("no space")
        self.calls.append((key, data, step))


class FakeTrainer:
    def __init__(self, *loggers):
        self.loggers = loggers


@pytest.fixture
def evaluation(tmp_path):
    from segformer_pl.analysis.evaluation import Evaluation

    return Evaluation(
        split="test",
        step=5,
        class_names=["a\nb", "c"],
        ids=["x"],
        counts=np.array([[[3, 4, 6], [0, 0, 0]]]),
        loss=np.array([0.1]),
        confusion=np.zeros((2, 2), np.int64),
        calibration=np.zeros((15, 3)),
    )


def test_any_logger_that_accepts_tables_gets_one(tmp_path, evaluation):
    recorder = Recorder()
    for _ in range(2):
        send_classes(FakeTrainer(recorder, object()), tmp_path, evaluation)
    (call,) = recorder.calls
    assert call == ("test/classes", [["a\\nb", 3 / 7, 0.75, 1.0], ["c", None, None, 0.0]], 4)


def test_a_logger_that_fails_is_a_warning(tmp_path, evaluation):
    with pytest.warns(UserWarning, match="test/classes of step 5 was not logged: OSError: no sp"):
        send_classes(FakeTrainer(Recorder(broken=True)), tmp_path, evaluation)
    assert not (tmp_path / "wandb_media.json").exists()  # so that it is tried again


def test_other_loggers_get_no_masks(tmp_path):
    maps = torch.zeros(3, 8, 8), torch.zeros(8, 8).long(), torch.zeros(8, 8).long()
    recorder = Recorder()
    send_masks(FakeTrainer(recorder), tmp_path, "val/masks", [("x", *maps)], ["a"], 1)
    assert recorder.calls == list(tmp_path.iterdir()) == []
    assert MAX_SIDE == 512
