"""The recipes of SETR-Naive, PUP and MLA (Zheng et al. 2021; fudan-zvg/SETR at 1361561)."""

from dataclasses import dataclass

from segformer_pl.analysis.recipes.settings import (
    NETWORK,
    PROTOCOL,
    REMARKS,
    SIX_SCALES,
    DatasetRecipe,
    Recipe,
    Setting,
    cross_entropy,
    settings,
    sgd,
    training,
)

PAPER = "paper Sec. 4.1"
CONFIG = "reference, configs/SETR"
PIPELINE = "reference, configs/_base_/datasets"
LOSS = "reference, mmseg/models/losses: one cross-entropy, averaged over all pixels"
BACKBONES = (
    "vit_large_patch16_384",
    "vit_base_patch16_384",
    "deit_base_distilled_patch16_384",
)
ENCODER_WEIGHTS = (
    "pretrained on ImageNet-21K and then ImageNet-1K; of DeiT-B: on ImageNet-1K alone. Without "
    "them SETR-PUP has 42.27 % on Cityscapes, not 78.39 % (paper, Table 5)"
)


@dataclass(frozen=True)
class _Decoder:
    """What differs between the decoders.

    Attributes:
        title: Name in texts.
        blocks: Blocks of T-Large and T-Base whose output is used, counted from 0.
        ade20k_lr: Learning rates on ADE20K: the paper's, then another one of the configurations.
        cityscapes_lr: The same on Cityscapes.
        ade20k_scales: Scales of a multi-scale evaluation on ADE20K in the configurations.
        remarks: Further differences.
    """

    title: str
    blocks: tuple[list[int], list[int]]
    ade20k_lr: tuple[float, ...]
    cityscapes_lr: tuple[float, ...]
    ade20k_scales: tuple[float, ...] = (0.5, 0.75, 1)
    remarks: tuple[str, ...] = ()


def _lr(rates: tuple[float, ...]) -> Setting:
    paper, *released = rates
    note = f"; {CONFIG} has {released[0]:g}" if released else f" and {CONFIG}"
    return Setting("model.lr", paper, PAPER + note, same=tuple(released))


def _image_size(side: int) -> Setting:
    return Setting(NETWORK + "image_size", side, CONFIG, same=([side, side],))


def _recipe(decoder: _Decoder) -> Recipe:
    ade20k = DatasetRecipe(
        names=("ade20k",),
        title="ADE20K",
        source=PIPELINE,
        schedule_source=PAPER,
        max_steps=160_000,
        samples_per_step=16,
        crop=(512, 512),
        base=(2048, 512),
        validation_interval=16_000,
        window=512,
        stride=341,
        scales=(SIX_SCALES, decoder.ade20k_scales),
        settings=(_lr(decoder.ade20k_lr), _image_size(512)),
    )
    cityscapes = DatasetRecipe(
        names=("cityscapes",),
        title="Cityscapes",
        source=PIPELINE,
        schedule_source=PAPER + " (Table 2 has both)",
        max_steps=80_000,
        other_schedules=((40_000, 4_000),),
        samples_per_step=8,
        crop=(768, 768),
        base=(2048, 1024),
        image_size=(2048, 1024),
        validation_interval=8_000,
        window=768,
        stride=512,
        settings=(_lr(decoder.cityscapes_lr), _image_size(768)),
        remarks=("The reference resizes the images to 2049x1025; here they keep 2048x1024.",),
    )
    arguments = {"decoder_dim": 256, "aux_weight": 0.4, "in_channels": 3}
    blocks = Setting(NETWORK + "out_indices", None, CONFIG, same=decoder.blocks)
    return Recipe(
        title=decoder.title,
        reference=CONFIG,
        settings=(
            *settings(arguments, CONFIG, NETWORK),
            blocks,
            *sgd(10, 0, 0.9, 1e-4, PAPER + f" and {CONFIG}"),
            *training(CONFIG, PIPELINE),
            *cross_entropy("all", LOSS),
            # Windows are whole patches of 16. Padding is for images that are smaller than one.
            Setting(PROTOCOL + "pad_to", None, PIPELINE, same=(16,)),
        ),
        datasets=(ade20k, cityscapes),
        encoder_weights=ENCODER_WEIGHTS,
        batch_norm=CONFIG,
        backbones=BACKBONES,
        remarks=(
            *REMARKS,
            "timm resamples the position table by bicubic interpolation with antialiasing, the "
            "reference by bilinear interpolation, once, when the weights are loaded.",
            "UNVERIFIED: the interval between validations, which is mmsegmentation's.",
            *decoder.remarks,
        ),
    )


NAIVE = _Decoder(
    "SETR-Naive",
    blocks=([9, 14, 19, 23], [2, 5, 8, 11]),
    ade20k_lr=(0.001, 0.01),
    cityscapes_lr=(0.01,),
)
PUP = _Decoder(
    "SETR-PUP",
    blocks=([9, 14, 19, 23], [4, 7, 9, 11]),
    ade20k_lr=(0.001,),
    cityscapes_lr=(0.01,),
    ade20k_scales=SIX_SCALES,
)
MLA = _Decoder(
    "SETR-MLA",
    blocks=([5, 11, 17, 23], [2, 5, 8, 11]),
    ade20k_lr=(0.001,),
    cityscapes_lr=(0.01, 0.002),
    remarks=(
        "The reference counts the neck of MLA as part of the encoder, so it trains it at a tenth "
        "of the head's learning rate; here it is part of the head.",
    ),
)
RECIPES = {
    "setr_naive": (_recipe(NAIVE),),
    "setr_pup": (_recipe(PUP),),
    "setr_mla": (_recipe(MLA),),
}
