"""The check that all ranks train one network."""

import itertools
import re

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from segformer_pl.callbacks import ReplicaCheck
from segformer_pl.callbacks.replicas import _describe as describe
from segformer_pl.callbacks.replicas import checksums, compared_tensors
from segformer_pl.errors import UserError
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny, make_trainer, samples

CPU = torch.device("cpu")


class WithNorm(Tiny):
    """Has running statistics, which differ between the ranks by design."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def feature_maps(self, images):
        return {"features": self.norm(self.features(images))}

    def forward(self, images):
        return self.classifier(self.feature_maps(images)["features"])


class Flip(pl.Callback):
    """Changes the last bit of one weight on one rank, after a step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            module.network.classifier.weight.view(torch.int32)[0, 1] ^= 1


def batches(rank):
    """Different images on each rank, so that their running statistics differ."""
    torch.manual_seed(rank)
    data = [one | {"image": one["image"] + torch.rand(3, 32, 32)} for one in samples(4)]
    return DataLoader(data, batch_size=1, sampler=list(itertools.chain(*[range(4)] * 3)))


def train(tmp_path, rank, callbacks, **arguments):
    task = SegmentationTask(WithNorm(), NAMES, [[0, 0, 0]] * 3, warmup_steps=0)
    trainer = make_trainer(
        tmp_path,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=callbacks,
        **arguments,
    )
    trainer.fit(task, batches(rank))
    return task


@pytest.mark.slow
def test_a_changed_bit_on_one_rank_ends_all_ranks(on_ranks, tmp_path):
    def run(rank):
        # Without a fault, although the running statistics of the ranks differ.
        task = train(tmp_path, rank, [ReplicaCheck(every_n_steps=2)], max_steps=8)
        statistics = task.network.norm.running_mean.tolist()
        try:
            callbacks = [Flip(1, 5), ReplicaCheck(every_n_steps=2)]
            train(tmp_path, rank, callbacks, max_steps=8)
        except UserError as error:
            return statistics, str(error)

    (first, sentence), (second, other) = on_ranks(run)
    assert first != second
    assert sentence == other
    assert re.fullmatch(
        "the ranks no longer train one network: after step 6, network.classifier.weight differs "
        r"between ranks 0 and 1 \(the first of 1 of \d+ tensors that differ\); they were equal "
        "after step 4, so resume from a checkpoint of that step or before, and look .*",
        sentence,
    )


@pytest.mark.slow
def test_the_last_step_is_checked_and_0_checks_never(on_ranks, tmp_path):
    def run(rank):
        train(tmp_path, rank, [Flip(1, 3), ReplicaCheck(every_n_steps=0)], max_steps=3)
        train(tmp_path, rank, [Flip(1, 3), ReplicaCheck()], max_steps=3)

    for result in on_ranks(run):
        assert "after step 3, network.classifier.weight differs" in result
        assert "they were equal after step 0" in result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_checksums_notice_small_and_compensating_changes(dtype):
    tensor = torch.arange(1, 1001).to(dtype)
    (before,) = checksums([tensor], CPU).tolist()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    seen = {before}
    for changes in ({3: 1}, {3: 1, 7: -1}, {3: 1, 4: -2, 5: 1}, {999: 1}):
        changed = tensor.clone()
        for index, change in changes.items():
            changed.view(bits)[index] += change
        seen.add(int(checksums([changed], CPU)))
    swapped = tensor.clone()
    swapped[[1, 2]] = swapped[[2, 1]]
    seen.add(int(checksums([swapped], CPU)))
    assert len(seen) == 6
    assert checksums([tensor.clone()], CPU).tolist() == [before]


def test_checksums_of_any_shape_and_type():
    tensors = [torch.tensor(3.0), torch.ones(2, dtype=torch.bool), torch.empty(0)]
    tensors += [torch.ones(2, 3, dtype=torch.cfloat), torch.rand(4, 4).T]
    sums = checksums(tensors, CPU)
    assert (sums.shape, sums.dtype) == ((5,), torch.int64)


def test_statistics_of_frozen_and_synchronised_norms_are_compared():
    def names(network):
        return {name for name in compared_tensors(network) if "running" in name}

    network = nn.Sequential(nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True))
    assert not names(network)
    network[0].eval()
    assert names(network) == {"0.running_mean", "0.running_var"}
    assert len(names(nn.SyncBatchNorm.convert_sync_batchnorm(network.train()))) == 2
    assert {"0.weight", "0.num_batches_tracked"} <= compared_tensors(network).keys()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([7, 8], "between ranks 0 and 1"),
        ([7, 7, 8], "on rank 2"),
        ([8, 7, 9, 7, 7], "on ranks 0, 2"),
        ([7, 8, 7, 8], "between ranks 0, 2 and 1, 3"),
    ],
)
def test_the_ranks_that_differ(values, text):
    assert describe(values) == text
