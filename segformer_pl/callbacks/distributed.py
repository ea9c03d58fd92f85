"""What the command line adds to a trainer, above all to one of several ranks.

:data:`ON_SEVERAL_RANKS` are attached by themselves, and here with other arguments; the compression
of gradients and the options of DDP are for the user to choose::

    trainer:
      devices: 8
      strategy:
        class_path: lightning.pytorch.strategies.DDPStrategy
        init_args:
          gradient_as_bucket_view: true  # saves the memory of one copy of all gradients
          static_graph: true
          timeout: "0:10:00"  # of a collective
      callbacks+:
      - class_path: segformer_pl.callbacks.RankWatchdog
        init_args: {timeout: 300}
      - class_path: segformer_pl.callbacks.ReplicaCheck
        init_args: {every_n_steps: 100}
      - class_path: segformer_pl.callbacks.GradientCompression
        init_args: {compression: bf16}
"""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from segformer_pl.callbacks.replicas import ReplicaCheck
from segformer_pl.callbacks.throughput import ThroughputRecord
from segformer_pl.callbacks.watchdog import RankWatchdog
from segformer_pl.lightning_workarounds import turn_off_synchronized_batch_norm

# In the order in which they are called, before all other callbacks.
ON_SEVERAL_RANKS = (RankWatchdog, ReplicaCheck, ThroughputRecord)


def attach_to_ranks(trainer: pl.Trainer) -> None:
    """Attach :data:`ON_SEVERAL_RANKS` to a trainer of several ranks, and the throughput to any.

    A callback that the user has given, with other arguments, takes the place of the default.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = ON_SEVERAL_RANKS if trainer.world_size > 1 else (ThroughputRecord,)
    for kind in reversed(kinds):
        given = [callback for callback in callbacks if isinstance(callback, kind)]
        for callback in given:
            callbacks.remove(callback)
        is_possible = kind is not ReplicaCheck or isinstance(trainer.strategy, DDPStrategy)
        callbacks[:0] = given or [kind()] * is_possible


def use_possible_batch_norm(trainer: pl.Trainer) -> None:
    """Replace ``sync_batchnorm`` by plain BatchNorm on one rank, and on devices that lack it.

    torch has SyncBatchNorm for GPUs alone, and DDP raises an error of its own for others. Call this
    for a trainer that is to train with ``sync_batchnorm``.
    """
    device = trainer.strategy.root_device.type
    if trainer.world_size > 1 and device == "cuda":
        return
    turn_off_synchronized_batch_norm(trainer)
    reason = (
        f"torch synchronises it on GPUs only and this run uses the {device.upper()}"
        if trainer.world_size > 1
        else "this run has one rank"
    )
    rank_zero_info(
        f"trainer.sync_batchnorm: trains with plain BatchNorm, since {reason}; each rank "
        "normalises by its own data.batch_size images"
    )
