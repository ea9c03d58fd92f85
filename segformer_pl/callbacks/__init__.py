"""Lightning callbacks: checkpoints, evaluations, figures, the report of a run, signals, ranks."""

from segformer_pl.callbacks.checkpoint_io import AtomicCheckpointIO
from segformer_pl.callbacks.communication import GradientCompression
from segformer_pl.callbacks.erf import EffectiveReceptiveField
from segformer_pl.callbacks.evaluation import EvaluationRecord
from segformer_pl.callbacks.history import RunHistory
from segformer_pl.callbacks.last_checkpoint import LastCheckpoint
from segformer_pl.callbacks.predictions import PredictionPanel
from segformer_pl.callbacks.provenance import RunProvenance
from segformer_pl.callbacks.replicas import ReplicaCheck
from segformer_pl.callbacks.report import RunReport
from segformer_pl.callbacks.signals import StopOnSignal
from segformer_pl.callbacks.throughput import ThroughputRecord
from segformer_pl.callbacks.watchdog import RankWatchdog

__all__ = [
    "AtomicCheckpointIO",
    "EffectiveReceptiveField",
    "EvaluationRecord",
    "GradientCompression",
    "LastCheckpoint",
    "PredictionPanel",
    "RankWatchdog",
    "ReplicaCheck",
    "RunHistory",
    "RunProvenance",
    "RunReport",
    "StopOnSignal",
    "ThroughputRecord",
]
