"""Networks: plain ``nn.Module``s, independent of training, data and files."""

from segformer_pl.models.decode_head import AllMLPHead
from segformer_pl.models.mit import (
    MixTransformer,
    mit_b0,
    mit_b1,
    mit_b2,
    mit_b3,
    mit_b4,
    mit_b5,
)
from segformer_pl.models.segformer import (
    SegFormer,
    segformer_b0,
    segformer_b1,
    segformer_b2,
    segformer_b3,
    segformer_b4,
    segformer_b5,
)
from segformer_pl.models.segmenter import Encoder, Segmenter
from segformer_pl.models.timm_encoder import TimmEncoder

__all__ = [
    "AllMLPHead",
    "Encoder",
    "MixTransformer",
    "SegFormer",
    "Segmenter",
    "TimmEncoder",
    "mit_b0",
    "mit_b1",
    "mit_b2",
    "mit_b3",
    "mit_b4",
    "mit_b5",
    "segformer_b0",
    "segformer_b1",
    "segformer_b2",
    "segformer_b3",
    "segformer_b4",
    "segformer_b5",
]
