"""The DataModule in a trainer: its batches, and the position where a resumed run continues."""

import hashlib
import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from segformer_pl.data import StreamingSegmentationData
from segformer_pl.errors import UserError


class Recorder(pl.LightningModule):
    """Trains one parameter and records the samples of its batches."""

    def __init__(self, estimate_steps=False):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.estimate_steps = estimate_steps
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += zip(batch["id"], batch["seed"], batch["image"].sum(dim=(1, 2, 3)).tolist())
        return (self.scale - batch["image"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.seen += batch["id"]

    test_step = validation_step

    def configure_optimizers(self):
        if self.estimate_steps:  # makes Lightning discard the state of the data loaders
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    """Saves a checkpoint after a number of batches, which may lie within a step."""

    def __init__(self, num_batches, file):
        self.num_batches, self.file = num_batches, file

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.num_batches:
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
        **{"limit_val_batches": 0} | arguments,
    )


def fit(
    folder,
    max_steps,
    ckpt_path=None,
    save=None,
    module=None,
    data_arguments=None,
    **trainer_arguments,
):
    module = module or Recorder()
    callbacks = [SaveAt(*save)] if save else []
    module_data = data(folder, **data_arguments or {})
    trainer(max_steps, callbacks, **trainer_arguments).fit(module, module_data, ckpt_path=ckpt_path)
    return module.seen


@pytest.fixture
def whole(folder):
    """32 steps, almost three epochs."""
    return fit(folder, 32)


class Steps(pl.Callback):
    """Records the samples of each optimiser step."""

    def __init__(self):
        self.current, self.completed = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.current += batch["id"]

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.completed.append(self.current)
        self.current = []


def steps(
    folder, max_steps, ckpt_path=None, callbacks=(), data_arguments=None, **trainer_arguments
):
    """Train; return the samples of every step, the trainer and the DataModule."""
    recorded, module_data = Steps(), data(folder, **data_arguments or {})
    runner = trainer(max_steps, [recorded, *callbacks], **trainer_arguments)
    runner.fit(Recorder(), module_data, ckpt_path=ckpt_path)
    return recorded.completed, runner, module_data


def position(file):
    """Optimiser steps and consumed samples of a checkpoint."""
    checkpoint = torch.load(file, weights_only=True)
    return checkpoint["global_step"], checkpoint["StreamingSegmentationData"]["consumed"]


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "batches"), [(2, 1), (2, 3), (2, 4), (3, 5), (3, 7)])
def test_a_checkpoint_within_a_step_holds_the_last_whole_step(
    folder, tmp_path, accumulate, batches
):
    file = tmp_path / "state.ckpt"
    whole, *_ = steps(folder, 8, accumulate_grad_batches=accumulate)
    assert {len(step) for step in whole} == {2 * accumulate}
    saving = [SaveAt(batches, file)]
    steps(folder, 4, callbacks=saving, accumulate_grad_batches=accumulate)
    step, consumed = position(file)
    assert (step, consumed) == (batches // accumulate, batches // accumulate * 2 * accumulate)
    resumed, runner, _ = steps(folder, 8, file, accumulate_grad_batches=accumulate)
    assert resumed == whole[step:]
    progress = runner.fit_loop.epoch_loop.batch_progress
    assert progress.total.ready == progress.current.ready == 8 * accumulate
    assert runner.fit_loop.epoch_loop._batches_that_stepped == 8


def test_two_kills_within_a_step_lose_no_samples(folder, tmp_path):
    whole, *_ = steps(folder, 6, accumulate_grad_batches=2)
    file, trained = None, []
    for kill, name in ((5, "first.ckpt"), (7, "second.ckpt")):
        saving = [SaveAt(kill, tmp_path / name)]
        completed, *_ = steps(folder, 5, file, saving, accumulate_grad_batches=2)
        file = tmp_path / name
        trained += completed[: position(file)[0] - len(trained)]
    trained += steps(folder, 6, file, accumulate_grad_batches=2)[0]
    assert trained == whole
    assert position(file) == (3, 12)


class SaveOnValidation(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_validation_within_a_step(folder, tmp_path):
    # Counting batches, the checkpoint of step 1 would hold 6 samples: batch 3 was processed.
    settings = {
        "accumulate_grad_batches": 2,
        "limit_val_batches": 1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    whole, *_ = steps(folder, 6, callbacks=[SaveOnValidation(tmp_path)], **settings)
    assert [position(tmp_path / f"{step}.ckpt") for step in (1, 3, 4)] == [(1, 4), (3, 12), (4, 16)]
    assert steps(folder, 6, tmp_path / "1.ckpt", **settings)[0] == whole[1:]
    assert steps(folder, 6, tmp_path / "4.ckpt", **settings)[0] == whole[4:]


class Fail(pl.Callback):
    """Raises within a batch, and saves a checkpoint on the exception."""

    def __init__(self, batch, file):
        self.batch, self.file = batch, file

    def on_after_backward(self, trainer, module):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            raise KeyError("out of memory")

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.file)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_a_checkpoint_on_an_exception_holds_whole_steps(folder, tmp_path, batch):
    file = tmp_path / "state.ckpt"
    whole, *_ = steps(folder, 6, accumulate_grad_batches=2)
    with pytest.raises(KeyError):
        steps(folder, 6, callbacks=[Fail(batch, file)], accumulate_grad_batches=2)
    step, consumed = position(file)
    assert (step, consumed) == ((batch - 1) // 2, (batch - 1) // 2 * 4)
    assert steps(folder, 6, file, accumulate_grad_batches=2)[0] == whole[step:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((2, 2), (4, 1)), ((2, 3), (3, 2)), ((3, 2), (1, 6)), ((2, 1), (1, 3))],
    ids=["fewer batches", "other batch size", "many batches", "smaller step"],
)
def test_resume_with_another_batch_size_and_accumulation(folder, tmp_path, first, then):
    file = tmp_path / "state.ckpt"
    flat = [
        name for step in steps(folder, 12, data_arguments={"batch_size": 6})[0] for name in step
    ]
    size, accumulate = first
    saving = [SaveAt(3 * accumulate + accumulate - 1, file)]  # within step 4
    steps(folder, 4, None, saving, {"batch_size": size}, accumulate_grad_batches=accumulate)
    step, consumed = position(file)
    assert consumed == step * size * accumulate
    size, accumulate = then
    completed, _, module_data = steps(
        folder, 7, file, (), {"batch_size": size}, accumulate_grad_batches=accumulate
    )
    assert {len(one) for one in completed} == {size * accumulate}
    assert len(completed) == 7 - step
    trained = [name for one in completed for name in one]
    assert trained == flat[consumed : consumed + len(trained)]
    assert module_data.consumed == consumed + len(trained)


def test_fit_after_an_error_continues_after_the_last_step(folder, tmp_path):
    whole, *_ = steps(folder, 6, accumulate_grad_batches=2)
    module_data, recorded = data(folder), Steps()
    failing = trainer(6, [Fail(7, tmp_path / "x.ckpt")], accumulate_grad_batches=2)
    with pytest.raises(KeyError):
        failing.fit(Recorder(), module_data)
    assert module_data.consumed == 12
    trainer(3, [recorded], accumulate_grad_batches=2).fit(Recorder(), module_data)
    assert recorded.completed == whole[3:]
    assert module_data.consumed == 24


@pytest.mark.parametrize(
    "changes",
    [
        {"consumed": -2},
        {"consumed": 10},
        {"consumed": None},
        {"samples_per_step": 3},
        {"first_step": 4, "first_sample": 8},
    ],
    ids=str,
)
def test_a_position_within_a_step_is_an_error(folder, tmp_path, changes):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["StreamingSegmentationData"] |= changes
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match=r"samples were consumed at step 3, which is not what whol"):
        fit(folder, 5, file)


def test_checkpoints_without_the_first_step_can_be_resumed(folder, tmp_path, whole):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    checkpoint = torch.load(file, weights_only=True)
    for key in ("first_step", "first_sample"):
        del checkpoint["StreamingSegmentationData"][key]
    torch.save(checkpoint, file)
    assert fit(folder, 32, file) == whole[6:]


def test_steps_that_cannot_be_counted_are_an_error(folder):
    with pytest.raises(UserError, match=r"limit_train_batches is 5, which is no multiple of .* 2,"):
        fit(folder, 4, limit_train_batches=5, accumulate_grad_batches=2)
    schedule = pl.callbacks.GradientAccumulationScheduler({0: 2})
    with pytest.raises(UserError, match="samples of a step changed from 2 to 4 while training"):
        steps(folder, 4, callbacks=[schedule])
    manual = Recorder()
    manual.automatic_optimization = False
    with pytest.raises(UserError, match="Recorder uses manual optimisation, so its steps do not"):
        fit(folder, 4, module=manual)


def test_batches_have_the_documented_shapes_and_types(folder):
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


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 7, 11, 12, 23])
def test_resume_continues_with_the_next_sample(folder, tmp_path, whole, step):
    file = tmp_path / "state.ckpt"
    fit(folder, 25, save=(step, file))
    assert fit(folder, 32, file) == whole[2 * step :]


@pytest.mark.slow
def test_resume_twice_in_a_row_with_prefetching_workers(folder, tmp_path, whole):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    workers = {"num_workers": 2}
    fit(folder, 9, save=(7, first), data_arguments=workers)
    # One batch after resuming, which is fewer than the number of workers.
    fit(folder, 10, first, save=(8, second), data_arguments=workers)
    assert fit(folder, 32, second, data_arguments={"num_workers": 1}) == whole[16:]


def test_accumulation_is_equivalent_to_more_devices(folder, tmp_path, whole):
    file = tmp_path / "state.ckpt"
    # Two batches of 2 per step make the same global batch as one batch of 4.
    fit(folder, 3, save=(6, file), accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the interrupted run")
        resumed = fit(folder, 16, file, data_arguments={"batch_size": 4})
    assert resumed == whole[12:]


def test_an_odd_number_of_steps_resumes_with_whole_steps(folder, tmp_path):
    # Lightning makes a step after every second batch by its own count, and the checkpoint counts
    # batches of another size.
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
    with pytest.warns(UserWarning, match=r"trained on 2 samples per step, this one trains on 3"):
        resumed = fit(folder, 10, file, data_arguments={"batch_size": 3})
    assert resumed == whole[10:25]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 6, 10])
def test_epochs_of_limit_train_batches_do_not_change_the_order(folder, tmp_path, whole, step):
    # limit_train_batches makes Lightning restart the data loader every 5 batches.
    file = tmp_path / "state.ckpt"
    assert fit(folder, 12, save=(step, file), limit_train_batches=5) == whole[:24]
    resumed = fit(folder, 32, file, limit_train_batches=5)
    assert resumed == whole[2 * step : 2 * step + len(resumed)]
    assert len(resumed) >= 60 - 2 * step


def test_resume_does_not_need_the_state_of_the_data_loaders(folder, tmp_path, whole):
    file = tmp_path / "state.ckpt"
    fit(folder, 5, save=(5, file), module=Recorder(estimate_steps=True))
    assert fit(folder, 32, file, module=Recorder(estimate_steps=True)) == whole[10:]


def test_a_second_fit_continues_the_first(folder, whole):
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


def test_the_position_can_be_loaded_with_weights_only(folder, tmp_path):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    state = torch.load(file, weights_only=True)["StreamingSegmentationData"]
    assert state["consumed"] == 6
    assert state["num_rows"] == 23
    assert state["samples_per_step"] == 2


def test_other_data_or_another_seed_is_an_error(folder, tmp_path, row, write_shards):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    with pytest.raises(UserError, match=r"its seed of the training order is 0, here it is 1; res"):
        fit(folder, 5, file, data_arguments={"seed": 1})
    longer = write_shards(tmp_path / "longer", "train", [[row(f"{i}") for i in range(24)]])
    with pytest.raises(UserError, match=r"its number of training images is 23, here it is 24"):
        fit(longer, 5, file)
    regrouped = write_shards(tmp_path / "regrouped", "train", [[row(f"{i}") for i in range(23)]])
    with pytest.raises(UserError, match=r"its fingerprint of the shards \(names, row groups"):
        fit(regrouped, 5, file)


def test_contents_are_compared_if_the_checkpoint_has_their_hash(
    folder, tmp_path, row, write_shards
):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    rows = [row(f"t{i:02d}", size=(12, 10)) for i in range(23)]  # the same number of bytes
    write_shards(folder, "train", [rows[:11], rows[11:14], rows[14:]])
    with pytest.raises(UserError, match=r"its fingerprint of the shards \(names, row groups"):
        fit(folder, 5, file)
    checkpoint = torch.load(file, weights_only=True)
    state = checkpoint["StreamingSegmentationData"]
    state["fingerprint"] = state["fingerprint"].partition("-")[0]  # as earlier versions wrote it
    torch.save(checkpoint, file)
    with pytest.warns(UserWarning, match=r"is of an earlier version, which stored no hashes of"):
        fit(folder, 5, file)


def test_the_layout_part_equals_the_fingerprint_of_earlier_versions(tmp_path, row, write_shards):
    folder = write_shards(tmp_path / "shards", "train", [[row("a"), row("b")], [row("c")]])
    source = data(folder).open("train")
    groups = [[[2, source.group_bytes[0]]], [[1, source.group_bytes[1]]]]
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    written = hashlib.sha256(json.dumps([names, groups]).encode()).hexdigest()[:16]
    assert source.fingerprint.partition("-")[0] == written


def test_a_checkpoint_without_a_position_is_an_error(folder, tmp_path):
    file = tmp_path / "state.ckpt"
    fit(folder, 3, save=(3, file))
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["StreamingSegmentationData"]
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match=r"does not say how many samples were consumed, so train"):
        fit(folder, 5, file)


def test_a_checkpoint_can_be_evaluated_on_other_data(folder, tmp_path, row, write_shards):
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
    assert len([warning for warning in caught if "skipped" in str(warning.message)]) == 1
    assert list(module_data.skipped) == ["s3"]
    assert "s3" not in {name for name, *_ in module.seen}
    assert len(module.seen) == 20


def test_a_data_set_without_a_location_is_an_error():
    with pytest.raises(UserError, match=r"data set 'camvid' has no hub location; give"):
        StreamingSegmentationData("camvid").prepare_data()
