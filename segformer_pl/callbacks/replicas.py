"""The check that all ranks train one and the same network."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _NormBase

from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import is_accumulating

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
MIXER = 0x1E3779B97F4A7C15  # odd, with bits of no pattern
RUNNING_STATISTICS = ("running_mean", "running_var")


class ReplicaCheck(pl.Callback):
    """Ends the training when the networks of two ranks are no longer equal, bit by bit.

    In DDP each rank steps its own copy of the network, and equal gradients keep the copies equal.
    A faulty device, or code that runs on one rank alone, breaks that without any error: the ranks
    then average gradients of different networks. The command line attaches this check to every run
    of several ranks.

    It compares all parameters and buffers, apart from running statistics that a BatchNorm in
    training collects from the rank's own images. These differ by design: before every forward pass
    DDP replaces them by those of rank 0, and before a validation the task does. Statistics of a
    frozen BatchNorm, and of SyncBatchNorm, are compared.

    A check computes one checksum for each tensor and exchanges one number for each rank. Only if
    these numbers differ, the ranks exchange the checksums, to find the first tensor that differs.

    Args:
        every_n_steps: Optimiser steps between two checks; another one follows the last step. With
            0, there is no check.
    """

    def __init__(self, every_n_steps: NonNegativeInt = 500) -> None:
        self.every_n_steps = every_n_steps
        self._checked_step = 0  # the last step after which the ranks were equal

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        is_ddp = isinstance(trainer.strategy, DDPStrategy)
        if self.every_n_steps and trainer.world_size > 1 and not is_ddp:
            raise UserError(
                f"ReplicaCheck compares whole networks, but the ranks of "
                f"{type(trainer.strategy).__name__} need not hold any; leave it out, or give "
                "--trainer.strategy ddp"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._checked_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any
    ) -> None:
        is_due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if is_due and not is_accumulating(trainer):
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_steps and trainer.global_step > self._checked_step:
            self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranks. Call it on all of them.

        Raises:
            UserError: They differ; it is raised on all ranks.
        """
        if trainer.world_size == 1:
            return
        tensors = compared_tensors(pl_module)
        sums = checksums(tensors.values(), trainer.strategy.root_device)
        totals = _gather(checksums([sums], sums.device))
        if (totals == totals[0]).all():
            self._checked_step = trainer.global_step
            return
        names, by_rank = list(tensors), _gather(sums)  # (world size, tensors)
        differing = (by_rank != by_rank[0]).any(0).nonzero().flatten().tolist()
        first = differing[0]
        raise UserError(
            f"the ranks no longer train one network: after step {trainer.global_step}, "
            f"{names[first]} differs {_describe(by_rank[:, first].tolist())} (the first of "
            f"{len(differing)} of {len(names)} tensors that differ); they were equal after step "
            f"{self._checked_step}, so resume from a checkpoint of that step or before, and look "
            "for a faulty device or for code that runs on some ranks alone"
        )


def compared_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that are equal on all ranks of DDP, by name."""
    own = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, norm in module.named_modules()
        if isinstance(norm, _NormBase) and norm.training and not isinstance(norm, SyncBatchNorm)
        for name in RUNNING_STATISTICS
    }
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in own}
    return dict(module.named_parameters()) | buffers


@torch.no_grad()
def checksums(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return one checksum of the bits of each tensor.

    The bits of element i, read as an integer b, contribute ``(b + i * MIXER) ** 2`` modulo 2**64.
    A plain sum would miss that one element grew by one unit in the last place and another one
    shrank by it, which is how networks begin to differ.

    Args:
        tensors: Tensors of any shapes and types.
        device: Device of the result.

    Returns:
        (number of tensors,) int64.
    """
    sums = []
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = real.detach().contiguous().flatten().view(INTEGERS[real.element_size()])
        values = torch.arange(bits.numel(), device=bits.device).mul_(MIXER).add_(bits)
        sums.append(values.mul_(values).sum().to(device))
    return torch.stack(sums)


def _gather(values: Tensor) -> Tensor:
    """Return the values (N,) of all ranks as (world size, N)."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def _describe(values: Sequence[int]) -> str:
    """Return which ranks differ, given a checksum by rank: ``on rank 1``."""
    (common, count), *_ = Counter(values).most_common()
    others = [rank for rank, value in enumerate(values) if value != common]
    if 2 * count > len(values):
        return f"on rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
    groups = {value: [] for value in values}  # type: dict[int, list[str]]
    for rank, value in enumerate(values):
        groups[value].append(str(rank))
    return f"between ranks {' and '.join(', '.join(group) for group in groups.values())}"
