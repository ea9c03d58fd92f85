"""Data sets: catalogue entry -> stream -> joint transforms -> batches."""

from segformer_pl.data.datamodule import StreamingSegmentationData
from segformer_pl.data.labels import LabelSpec

__all__ = ["LabelSpec", "StreamingSegmentationData"]
