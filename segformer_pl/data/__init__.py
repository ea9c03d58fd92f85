"""Data sets: catalogue entry -> stream -> joint transforms -> batches."""

from segformer_pl.data.datamodule import StreamingSegmentationData
from segformer_pl.data.labels import LabelSpec
from segformer_pl.errors import UserError as DataError

__all__ = ["DataError", "LabelSpec", "StreamingSegmentationData"]
