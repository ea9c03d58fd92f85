"""Lightning callbacks: checkpoints, evaluation records, figures, the report of a run, signals."""

from segformer_pl.callbacks.checkpoint_io import AtomicCheckpointIO
from segformer_pl.callbacks.erf import EffectiveReceptiveField
from segformer_pl.callbacks.evaluation import EvaluationRecord
from segformer_pl.callbacks.history import RunHistory
from segformer_pl.callbacks.last_checkpoint import LastCheckpoint
from segformer_pl.callbacks.predictions import PredictionPanel
from segformer_pl.callbacks.report import RunReport
from segformer_pl.callbacks.signals import Interrupted, StopOnSignal

__all__ = [
    "AtomicCheckpointIO",
    "EffectiveReceptiveField",
    "EvaluationRecord",
    "Interrupted",
    "LastCheckpoint",
    "PredictionPanel",
    "RunHistory",
    "RunReport",
    "StopOnSignal",
]
