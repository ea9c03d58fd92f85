"""The DataModule in a trainer: its batches, and where it goes on after a checkpoint."""

import hashlib
import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from segformer_pl.data import DataError, StreamingSegmentationData


class Recorder(pl.LightningModule):
    """Trains one parameter and writes down what it was given."""

    def __init__(self, ask_for_steps=False):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.ask_for_steps = ask_for_steps
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += zip(batch["id"], batch["seed"], batch["image"].sum(dim=(1, 2, 3)).tolist())
        return (self.scale - batch["image"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.seen += batch["id"]

    test_step = validation_step

    def configure_optimizers(self):
        if self.ask_for_steps:  # makes Lightning forget the state of loaders
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    """Saves in the middle of everything, as ModelCheckpoint does."""

    def __init__(self, step, file):
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.step:
            trainer.save_checkpoint(self.file)


@pytest.fixture
def folder(tmp_path, row, write_shards):
    rows = [row(f"s{i:02d}", size=(12, 10)) for i in range(23)]
    for split in ("train", "validation"):
        write_shards(tmp_path / "set", split, [rows[:11], rows[11:14], rows[14:]])
    return tmp_path / "set"


def data(folder, **arguments):
    settings = {"batch_size": 2, "num_workers": 0, "crop_size": (8, 8), "photometric": True}
    return StreamingSegmentationData("shapes", folder, **settings | arguments)


def trainer(max_steps, callbacks=(), **arguments):
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **arguments,
    )


def fit(folder, max_steps, ckpt_path=None, save=None, module=None, data_arguments=None, **trained):
    module = module or Recorder()
    callbacks = [SaveAt(*save)] if save else []
    module_data = data(folder, **data_arguments or {})
    trainer(max_steps, callbacks, **trained).fit(module, module_data, ckpt_path=ckpt_path)
    return module.seen


@pytest.fixture
def whole(folder):
    """32 steps, almost three epochs."""
    return fit(folder, 32)


def test_batches_follow_the_contract(folder):
    batch = next(iter(data(folder, batch_size=4).train_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].shape == (4, 8, 8)
    assert batch["label"].dtype == torch.int64
    assert all(isinstance(name, str) for name in batch["id"])
    batches = list(data(folder, eval_batch_size=10).val_dataloader())
    assert [batch["id"] for batch in batches] == [
        [f"s{i:02d}" for i in range(first, min(first + 10, 23))] for first in (0, 10, 20)
    ]


@pytest.mark.parametrize("step", [1, 7, 11, 12, 23])
def test_resume_goes_on_with_the_next_sample(folder, tmp_path, whole, step):
    file = tmp_path / "state.ckpt"
    fit(folder, 25, save=(step, file))
    assert fit(folder, 32, file) == whole[2 * step :]


@pytest.mark.slow
def test_resume_twice_in_a_row_with_prefetching_workers(folder, tmp_path, whole):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    workers = {"num_workers": 2}
    fit(folder, 9, save=(7, first), data_arguments=workers)
    # one batch after the resume: fewer than there are workers
    fit(folder, 10, first, save=(8, second), data_arguments=workers)
    assert fit(folder, 32, second, data_arguments={"num_workers": 1}) == whole[16:]


def test_accumulation_stands_in_for_devices(folder, tmp_path, whole):
    file = tmp_path / "state.ckpt"
    # a batch of 2 twice per step is a global batch of 4, as 4 in one batch is
    fit(folder, 3, save=(6, file), accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the interrupted run")
        resumed = fit(folder, 16, file, data_arguments={"batch_size": 4})
    assert resumed == whole[12:]


def test_an_odd_number_of_steps_resumes_with_whole_steps(folder, tmp_path):
    # The trainer steps after every second batch by its own count, which is of other batches.
    file = tmp_path / "state.ckpt"
    whole, resumed = Recorder(), Recorder()
    large, small = {"batch_size": 4}, {"batch_size": 2}
    fit(folder, 8, save=(3, file), module=whole, data_arguments=large)
    fit(folder, 8, file, module=resumed, data_arguments=small, accumulate_grad_batches=2)
    assert resumed.seen == whole.seen[12:]
    assert resumed.scale.item() == pytest.approx(whole.scale.item(), rel=1e-6)


def test_another_global_batch_keeps_the_position_and_warns(folder, tmp_path, whole):
    file = tmp_path / "state.ckpt"
    fit(folder, 5, save=(5, file))
    with pytest.warns(UserWarning, match=r"trained on 2 samples a step, this one trains on 3"):
        resumed = fit(folder, 10, file, data_arguments={"batch_size": 3})
    assert resumed == whole[10:25]


@pytest.mark.parametrize("step", [4, 5, 6, 10])
def test_epochs_that_the_trainer_counts_do_not_matter(folder, tmp_path, whole, step):
    # limit_train_batches makes Lightning begin the loader anew every 5 batches
    file = tmp_path / "state.ckpt"
    assert fit(folder, 12, save=(step, file), limit_train_batches=5) == whole[:24]
    resumed = fit(folder, 32, file, limit_train_batches=5)
    assert resumed == whole[2 * step : 2 * step + len(resumed)]
    assert len(resumed) >= 60 - 2 * step


def test_lightning_may_forget_the_state_of_loaders(folder, tmp_path, whole):
    file = tmp_path / "state.ckpt"
    fit(folder, 5, save=(5, file), module=Recorder(ask_for_steps=True))
    assert fit(folder, 32, file, module=Recorder(ask_for_steps=True)) == whole[10:]


def test_training_goes_on_when_fit_is_called_again(folder, whole):
    module, module_data = Recorder(), data(folder)
    trainer(5).fit(module, module_data)
    trainer(27).fit(module, module_data)
    assert module.seen == whole
    assert module_data.consumed == 64


def test_a_checkpoint_saved_after_the_training_holds_the_position(folder, tmp_path, whole):
    module, runner = Recorder(), trainer(9)
    runner.fit(module, data(folder))
    runner.save_checkpoint(tmp_path / "late.ckpt")
    assert fit(folder, 32, tmp_path / "late.ckpt") == whole[18:]


def test_the_position_is_plain_data(folder, tmp_path):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    state = torch.load(file, weights_only=True)["StreamingSegmentationData"]
    assert state["consumed"] == 6
    assert state["num_rows"] == 23
    assert state["samples_per_step"] == 2


def test_other_data_or_another_seed_is_an_error_in_words(folder, tmp_path, row, write_shards):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    with pytest.raises(DataError, match=r"its seed of the training order is 0, here it is 1; res"):
        fit(folder, 5, file, data_arguments={"seed": 1})
    longer = write_shards(tmp_path / "longer", "train", [[row(f"{i}") for i in range(24)]])
    with pytest.raises(DataError, match=r"its number of training pictures is 23, here it is 24"):
        fit(longer, 5, file)
    regrouped = write_shards(tmp_path / "regrouped", "train", [[row(f"{i}") for i in range(23)]])
    with pytest.raises(DataError, match=r"its fingerprint of the shards \(names, row groups"):
        fit(regrouped, 5, file)


def test_contents_are_compared_where_the_checkpoint_knows_them(folder, tmp_path, row, write_shards):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    rows = [row(f"t{i:02d}", size=(12, 10)) for i in range(23)]  # as many bytes
    write_shards(folder, "train", [rows[:11], rows[11:14], rows[14:]])
    with pytest.raises(DataError, match=r"its fingerprint of the shards \(names, row groups"):
        fit(folder, 5, file)
    checkpoint = torch.load(file, weights_only=True)
    state = checkpoint["StreamingSegmentationData"]
    state["fingerprint"] = state["fingerprint"].partition("-")[0]  # as earlier versions wrote it
    torch.save(checkpoint, file)
    with pytest.warns(UserWarning, match=r"is of an earlier version, which kept no hashes of the"):
        fit(folder, 5, file)


def test_the_layout_part_is_what_earlier_versions_wrote(tmp_path, row, write_shards):
    folder = write_shards(tmp_path / "shards", "train", [[row("a"), row("b")], [row("c")]])
    source = data(folder).open("train")
    groups = [[[2, source.group_bytes[0]]], [[1, source.group_bytes[1]]]]
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    written = hashlib.sha256(json.dumps([names, groups]).encode()).hexdigest()[:16]
    assert source.fingerprint.partition("-")[0] == written


def test_a_checkpoint_without_a_position_is_not_resumed(folder, tmp_path):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["StreamingSegmentationData"]
    torch.save(checkpoint, file)
    with pytest.raises(DataError, match=r"does not say how many samples were consumed, so train"):
        fit(folder, 5, file)


def test_a_checkpoint_is_scored_on_any_data(folder, tmp_path, row, write_shards):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    other = write_shards(tmp_path / "other", "test", [[row("t")]])
    module = Recorder()
    trainer(1).test(module, data(other, seed=5), ckpt_path=file)
    assert module.seen == ["t"]


def test_bad_samples_are_reported_once_each(folder, row, write_shards):
    rows = [row(f"s{i}", size=(12, 10)) for i in range(5)]
    rows[3]["label"] = None
    write_shards(folder, "train", [rows])
    module, module_data = Recorder(), data(folder, on_bad_sample="skip")
    for file in folder.glob("train-*-of-00003*"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"skipped, 1 so far: .*'s3', column 'label'") as caught:
        trainer(10).fit(module, module_data)
    assert len([one for one in caught if "skipped" in str(one.message)]) == 1
    assert list(module_data.skipped) == ["s3"]
    assert "s3" not in {name for name, *_ in module.seen}
    assert len(module.seen) == 20


def test_camvid_without_a_path_says_what_to_give():
    with pytest.raises(DataError, match=r"'camvid' is read from a place of yours; give"):
        StreamingSegmentationData("camvid").prepare_data()
