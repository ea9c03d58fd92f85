"""Data sets: from a catalogue entry through streamed rows and joint transforms to batches."""

from segformer_pl.data.datamodule import StreamingSegmentationData
from segformer_pl.data.labels import LabelSpec

__all__ = ["LabelSpec", "StreamingSegmentationData"]
