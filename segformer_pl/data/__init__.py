"""Data sets: from a catalogue entry through streamed rows and joint transforms to batches."""

from typing import TYPE_CHECKING, Any

from segformer_pl.data.labels import LabelSpec

if TYPE_CHECKING:
    from segformer_pl.data.datamodule import StreamingSegmentationData

__all__ = ["LabelSpec", "StreamingSegmentationData"]


def __getattr__(name: str) -> Any:
    # Only when it is used, because it imports Lightning and datasets, which takes seconds, and a
    # Predictor needs no more of this package than decoding.py.
    if name == "StreamingSegmentationData":
        from segformer_pl.data.datamodule import StreamingSegmentationData

        return StreamingSegmentationData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
