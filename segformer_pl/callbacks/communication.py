"""Compression of the gradients that the ranks exchange."""

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from segformer_pl.errors import UserError

Compression = Literal["none", "bf16", "fp16", "powersgd"]
HALF = {"bf16": (torch.bfloat16, bf16_compress_hook), "fp16": (torch.float16, fp16_compress_hook)}
FLOAT32_GRADIENTS = ("32-true", "16-mixed", "bf16-mixed")
BACKENDS = ("gloo", "nccl")
# DDP rebuilds its buckets after the first step, and PowerSGD stores one error of each.
MIN_START = 2


class GradientCompression(pl.Callback):
    """Compresses the gradients that the ranks of DDP exchange, with a communication hook of torch.

    Worth it where the network between machines is slow. ``DDPStrategy(ddp_comm_hook=...)`` does
    the same on GPUs, but Lightning ignores it on the CPU without a word.

    ``"bf16"``, ``"fp16"``
        Half the bytes: each rank's gradient is divided by the world size, rounded and summed in
        16 bits. float16 loses gradients below 6e-8 and overflows above 65504.
    ``"powersgd"``
        PowerSGD (Vogels et al. 2019): of the gradient of a matrix, an approximation of low rank is
        exchanged. What it leaves out, each rank adds to its next gradient (error feedback). These
        errors, one per parameter and rank, are not stored in checkpoints: a resumed run starts
        without them, which is stated in one line, and differs from an uninterrupted one.
    ``"none"``
        DDP's own all-reduce in 32 bits, to turn off a compression of another configuration file.

    Args:
        compression: ``"none"``, ``"bf16"``, ``"fp16"`` or ``"powersgd"``.
        powersgd_rank: Rank of PowerSGD's approximation, usually 1 to 4. Default: 1.
        powersgd_start: Optimiser steps before PowerSGD starts, with uncompressed gradients. They
            should include the warm-up of the learning rate. Default: 1000, as in torch.

    Raises:
        UserError: A setting of PowerSGD is given for another compression, or is too small. Before
            the first step: strategy, backend or precision do not allow the compression.
    """

    def __init__(
        self,
        compression: Compression,
        powersgd_rank: PositiveInt | None = None,
        powersgd_start: int | None = None,
    ) -> None:
        for name, value in (("rank", powersgd_rank), ("start", powersgd_start)):
            if value is not None and compression != "powersgd":
                raise UserError(
                    f"GradientCompression: powersgd_{name} is {value}, but compression is "
                    f"{compression}; leave it out, or give compression powersgd"
                )
        if powersgd_start is not None and powersgd_start < MIN_START:
            raise UserError(
                f"GradientCompression: powersgd_start is {powersgd_start}; give at least "
                f"{MIN_START}, since DDP rearranges the gradients after its first step"
            )
        self.compression = compression
        self.powersgd_rank = powersgd_rank or 1
        self.powersgd_start = powersgd_start or 1000

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.compression == "none":
            return
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self._check(trainer)
        elif trainer.world_size > 1:
            raise UserError(
                "GradientCompression compresses the gradients of DDP, but trainer.strategy is "
                f"{type(trainer.strategy).__name__}; leave it out, or give --trainer.strategy ddp"
            )
        else:
            rank_zero_info(
                f"GradientCompression {self.compression} is not used, since one rank exchanges no "
                "gradients"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here and not before, since the step of a resumed run is known now.
        model = trainer.strategy.model
        if self.compression == "none" or not isinstance(model, DistributedDataParallel):
            return
        state = None
        hook: Callable[[Any, dist.GradBucket], Future[Tensor]]
        if self.compression == "powersgd":
            state, hook = self._powersgd_state(trainer.global_step), powerSGD_hook
        else:
            hook = HALF[self.compression][1]

        # DDP recognises torch's bf16 hook by its name and refuses it without NCCL, though gloo
        # can add bfloat16, which `_check` has tried.
        def compress(state: Any, bucket: dist.GradBucket) -> Future[Tensor]:
            return hook(state, bucket)

        model.register_comm_hook(state, compress)

    def _check(self, trainer: pl.Trainer) -> None:
        """Check that backend and precision allow the compression.

        Raises:
            UserError: They do not.
        """
        backend = dist.get_backend()
        name = f"GradientCompression {self.compression}"
        if backend not in BACKENDS:
            raise UserError(
                f"{name} was not tried with the backend {backend} of the process group; leave it "
                f"out, or use {' or '.join(BACKENDS)}"
            )
        if trainer.precision not in FLOAT32_GRADIENTS:
            raise UserError(
                f"{name} needs gradients of 32 bits, but trainer.precision is "
                f"{trainer.precision}; leave it out, or give one of "
                f"{', '.join(FLOAT32_GRADIENTS)}"
            )
        if self.compression == "powersgd" and trainer.precision == "16-mixed":
            raise UserError(
                f"{name} does not work with trainer.precision 16-mixed, whose loss scale changes: "
                "what an overflow leaves out of one step would be added to the next; give "
                "bf16-mixed or 32-true"
            )
        if self.compression in HALF:
            number = torch.ones(1, dtype=HALF[self.compression][0])
            try:  # the only complete answer: devices and versions of NCCL differ
                dist.all_reduce(number.to(trainer.strategy.root_device))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{name}: the backend {backend} cannot add numbers of {number.dtype} "
                    f"({reason}); choose another compression, or leave it out"
                ) from error

    def _powersgd_state(self, step: int) -> PowerSGDState:
        """Return the initial state of PowerSGD.

        Args:
            step: Optimiser steps that the run has made before.
        """
        start = max(self.powersgd_start - step, MIN_START)
        if step > self.powersgd_start:
            rank_zero_info(
                "GradientCompression powersgd: the error feedback of the interrupted run is not "
                f"in its checkpoint; it starts anew after {start} steps with uncompressed gradients"
            )
        return PowerSGDState(
            None, matrix_approximation_rank=self.powersgd_rank, start_powerSGD_iter=start
        )
