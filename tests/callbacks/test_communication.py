"""Compressed gradients on two ranks."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from segformer_pl.callbacks import GradientCompression
from segformer_pl.errors import UserError
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny, make_trainer, samples


class Wide(Tiny):
    """Has a matrix that is large enough for PowerSGD to compress it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(32, len(NAMES), 1)


def train(tmp_path, rank, compression, max_steps=4, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    settings = {"optimizer": "sgd", "lr": 0.1, "head_lr_mult": 1.0, "warmup_steps": 0}
    task = SegmentationTask(Wide(), NAMES, [[0, 0, 0]] * 3, **settings)
    data = samples(4)[2 * rank : 2 * rank + 2]
    for index, sample in enumerate(data):
        sample["image"] = sample["image"] + 0.1 * index + rank
    trainer = make_trainer(
        tmp_path,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        limit_val_batches=0,
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[] if compression is None else [compression],
        **arguments,
    )
    trainer.fit(task, DataLoader(data, batch_size=1), ckpt_path=ckpt_path)
    return trainer, torch.cat([p.detach().flatten() for p in task.network.parameters()])


@pytest.mark.slow
def test_compressions_train_nearly_as_without(on_ranks, tmp_path, caplog):
    def run(rank):
        _, exact = train(tmp_path, rank, None)
        _, none = train(tmp_path, rank, GradientCompression("none"))
        assert torch.equal(none, exact)
        powersgd = {"powersgd_rank": 1, "powersgd_start": 2}
        weights = {
            "bf16": train(tmp_path, rank, GradientCompression("bf16"))[1],
            "fp16": train(tmp_path, rank, GradientCompression("fp16"))[1],
            "powersgd": train(tmp_path, rank, GradientCompression("powersgd", **powersgd))[1],
            "late": train(tmp_path, rank, GradientCompression("powersgd"))[1],  # after 1000 steps
        }
        errors = {name: float((w - exact).norm() / exact.norm()) for name, w in weights.items()}
        return errors, {name: w.tolist() for name, w in weights.items()}

    (errors, weights), (_, others) = on_ranks(run)
    assert weights == others  # the ranks stay equal
    assert errors["late"] < 1e-6
    assert 1e-6 < errors["fp16"] < errors["bf16"] < 1e-2
    assert 1e-6 < errors["powersgd"] < 0.1


@pytest.mark.slow
def test_where_a_compression_is_impossible(on_ranks, tmp_path):
    def run(rank):
        refusals = []
        for compression, precision in (("bf16", "bf16-true"), ("powersgd", "64-true")):
            try:
                train(tmp_path, rank, GradientCompression(compression), precision=precision)
            except UserError as error:
                refusals.append(str(error))
        compression = GradientCompression("powersgd", powersgd_start=2)
        trainer, _ = train(tmp_path, rank, compression)
        # Saved in the middle of the interrupted run's compression
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        trainer, _ = train(tmp_path, rank, compression, 6, tmp_path / "last.ckpt")
        return refusals, trainer.global_step

    for refusals, step in on_ranks(run):
        assert [text.partition(";")[0] for text in refusals] == [
            "GradientCompression bf16 needs gradients of 32 bits, but trainer.precision is "
            "bf16-true",
            "GradientCompression powersgd needs gradients of 32 bits, but trainer.precision is "
            "64-true",
        ]
        assert step == 6


def test_one_rank_says_that_it_compresses_nothing(tmp_path, caplog):
    task = SegmentationTask(Tiny(), NAMES, [[0, 0, 0]] * 3, warmup_steps=0)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[GradientCompression("bf16")])
    with caplog.at_level("INFO"):
        trainer.fit(task, DataLoader(samples(1)))
    assert "GradientCompression bf16 is not used, since one rank exchanges no" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": "bf16", "powersgd_rank": 2}, "powersgd_rank is 2, but compression is bf"),
        ({"compression": "none", "powersgd_start": 9}, "powersgd_start is 9, but compression is n"),
        ({"compression": "powersgd", "powersgd_start": 1}, "powersgd_start is 1; give at least 2"),
    ],
)
def test_settings_that_would_be_ignored_or_do_not_work(arguments, message):
    with pytest.raises(UserError, match=message):
        GradientCompression(**arguments)


def test_powersgd_starts_anew_in_a_resumed_run(caplog):
    compression = GradientCompression("powersgd", powersgd_start=100)
    with caplog.at_level("INFO"):
        assert compression._powersgd_state(0).start_powerSGD_iter == 100
        assert compression._powersgd_state(60).start_powerSGD_iter == 40
        assert not caplog.text
        assert compression._powersgd_state(160).start_powerSGD_iter == 2
    assert "error feedback of the interrupted run is not in its checkpoint" in caplog.text
