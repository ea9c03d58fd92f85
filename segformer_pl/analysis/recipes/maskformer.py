"""The recipes of MaskFormer (Cheng et al. 2021; facebookresearch/MaskFormer at da3e60d)."""

from segformer_pl.analysis.recipes.settings import (
    DETECTRON2,
    NETWORK,
    PROTOCOL,
    REMARKS,
    DatasetRecipe,
    Recipe,
    Setting,
    adamw,
    settings,
    training,
)

PAPER = "paper Sec. 4.1"
ADE20K_CONFIG = "reference, configs/ade20k-150"
CITYSCAPES_CONFIG = "reference, configs/cityscapes-19"
SWIN_CONFIG = "reference, configs/ade20k-150/swin"

ARGUMENTS = {
    "num_queries": 100,
    "decoder_dim": 256,
    "decoder_layers": 6,
    "decoder_heads": 8,
    "decoder_mlp_dim": 2048,
    "dropout": 0.1,
    "ignored_pixels": "background",
    "in_channels": 3,
}
MASKFORMER_REMARKS = (
    *REMARKS,
    "The reference draws the scale from 0.5, 0.6, ..., 2.0; here it is uniform between them.",
    "The reference does not check the share of one class in a crop; here crops of more than 75 % "
    "of one class are drawn anew.",
    "The reference upsamples the mask logits to the image before the sigmoid; here the scores are "
    "upsampled.",
)


def _ade20k(short: int, source: str) -> DatasetRecipe:
    return DatasetRecipe(
        names=("ade20k",),
        title="ADE20K",
        source=source,
        schedule_source=PAPER + " and " + source,
        max_steps=160_000,
        samples_per_step=16,
        crop=(short, short),
        base=(4 * short, short),
        validation_interval=5_000,
        settings=(Setting(PROTOCOL + "pad_to", 32, "reference, SIZE_DIVISIBILITY"),),
        remarks=(
            f"The reference limits the longer side to {4 * short} pixels at every scale; here the "
            "limit is scaled too.",
        ),
    )


CITYSCAPES = DatasetRecipe(
    names=("cityscapes",),
    title="Cityscapes",
    source=CITYSCAPES_CONFIG,
    schedule_source=CITYSCAPES_CONFIG,
    max_steps=90_000,
    samples_per_step=16,
    crop=(512, 1024),
    base=(2048, 1024),
    image_size=(2048, 1024),
    validation_interval=5_000,
)

RESNET = Recipe(
    title="MaskFormer with a ResNet",
    reference=ADE20K_CONFIG,
    settings=(
        *settings(ARGUMENTS, ADE20K_CONFIG, NETWORK),
        Setting(NETWORK + "freeze_batch_norm", True, "detectron2's default, FrozenBN"),
        Setting(NETWORK + "drop_path_rate", None, ADE20K_CONFIG, same=(0,)),
        Setting(NETWORK + "out_indices", None, ADE20K_CONFIG, same=([1, 2, 3, 4],)),
        Setting(NETWORK + "output_stride", None, ADE20K_CONFIG, same=(32,)),
        *adamw(1e-5, 10, 1e-4, 0, 0.9, PAPER + ": 1e-4, and 0.1 times that in the backbone"),
        *training(ADE20K_CONFIG, ADE20K_CONFIG, DETECTRON2, gradient_clip=0.01),
    ),
    datasets=(_ade20k(512, ADE20K_CONFIG), CITYSCAPES),
    encoder_weights="pretrained on ImageNet-1K, torchvision's",
    batch_norm=None,
    backbones=("resnet50", "resnet101"),
    remarks=MASKFORMER_REMARKS,
)


def _swin(backbones: tuple[str, ...], short: int, weights: str) -> Recipe:
    # None takes the sizes that the name of the backbone stands for.
    sizes = dict.fromkeys(("embed_dim", "depths", "num_heads", "window_size"))
    return Recipe(
        title="MaskFormer with Swin",
        reference=SWIN_CONFIG,
        settings=(
            *settings(ARGUMENTS | {"drop_path_rate": 0.3} | sizes, SWIN_CONFIG, NETWORK),
            *adamw(6e-5, 1, 0.01, 1500, 0.9, PAPER),
            *training(SWIN_CONFIG, SWIN_CONFIG, DETECTRON2, gradient_clip=0.01),
        ),
        datasets=(_ade20k(short, SWIN_CONFIG),),
        encoder_weights=weights,
        batch_norm=None,
        backbones=backbones,
        remarks=MASKFORMER_REMARKS,
    )


RECIPES = {
    "maskformer": (RESNET,),
    "maskformer_swin": (
        _swin(
            ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"),
            512,
            "pretrained on ImageNet-1K at 224x224",
        ),
        _swin(
            ("swin_base_patch4_window12_384", "swin_large_patch4_window12_384"),
            640,
            "pretrained on ImageNet-22K at 384x384 (Swin-B also: ImageNet-1K)",
        ),
    ),
}
