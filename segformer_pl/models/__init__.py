"""Networks: plain ``nn.Module``s, independent of training, data and files."""

from segformer_pl.models.decode_head import AllMLPHead
from segformer_pl.models.deeplabv3plus import DeepLabV3Plus, deeplabv3plus, deeplabv3plus_mmseg
from segformer_pl.models.maskformer import MaskFormer, maskformer, maskformer_swin
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
from segformer_pl.models.semask import SeMaskFPN, semask_fpn
from segformer_pl.models.setr import SETR, setr_mla, setr_naive, setr_pup
from segformer_pl.models.swin import SwinEncoder
from segformer_pl.models.timm_encoder import TimmEncoder
from segformer_pl.models.vit_encoder import ViTEncoder

__all__ = [
    "SETR",
    "AllMLPHead",
    "DeepLabV3Plus",
    "Encoder",
    "MaskFormer",
    "MixTransformer",
    "SeMaskFPN",
    "SegFormer",
    "Segmenter",
    "SwinEncoder",
    "TimmEncoder",
    "ViTEncoder",
    "deeplabv3plus",
    "deeplabv3plus_mmseg",
    "maskformer",
    "maskformer_swin",
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
    "semask_fpn",
    "setr_mla",
    "setr_naive",
    "setr_pup",
]
