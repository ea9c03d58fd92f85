"""The recipe of SegFormer-B0 ... B5 (Xie et al. 2021; NVlabs/SegFormer at 65fa8cf)."""

from segformer_pl.analysis.recipes.settings import (
    EARLIER,
    NETWORK,
    PROTOCOL,
    REMARKS,
    SIX_SCALES,
    DatasetRecipe,
    Recipe,
    Setting,
    adamw,
    cross_entropy,
    training,
)

PAPER = "paper Sec. 4.1"
STEPS = PAPER + " (its ablations: 40000 steps)"
CONFIG = "reference, local_configs/segformer"
PIPELINE = "reference, local_configs/_base_/datasets"
ENCODER = "reference, mix_transformer.py"
HEAD = "reference, segformer_head.py"
LOSS = "reference, mmseg/models/losses: one cross-entropy, averaged over all pixels"
CLOSEST = "UNVERIFIED, no configuration was released; closest: NVlabs/FAN cocostuff_repeat.py"

ANY_DATASET = (
    *adamw(6e-5, 10, 0.01, 1500, 1, CONFIG),
    *training(CONFIG, PIPELINE),
    *cross_entropy("all", LOSS),
    Setting(PROTOCOL + "pad_to", None, PIPELINE),
)

ARGUMENTS = (
    Setting("num_heads", [1, 2, 5, 8], ENCODER),
    Setting("mlp_ratio", 4, ENCODER + "; Table 6 prints 8 for stages 1 and 2 of B0 to B4"),
    Setting("sr_ratios", [8, 4, 2, 1], ENCODER),
    Setting("kv_border", "drop", ENCODER),
    Setting("merged_queries", [0, 0, 0, 0], ENCODER, EARLIER),
    Setting("patch_sizes", [7, 3, 3, 3], ENCODER),
    Setting("strides", [4, 2, 2, 2], ENCODER),
    # None means K // 2 for overlapping patches; for others, patch_sizes is already a departure.
    Setting("paddings", [3, 1, 1, 1], ENCODER, same=(None,)),
    Setting("pos_encoding", "mix_ffn", "paper Sec. 3.1"),
    Setting("image_size", None, ENCODER),
    Setting("in_channels", 3, ENCODER),
    Setting("drop_path_rate", 0.1, ENCODER),
    Setting("norm_eps", 1e-6, ENCODER),
    Setting("conv_norm_eps", 1e-5, ENCODER),
    Setting("in_indices", [0, 1, 2, 3], HEAD),
    Setting("dropout", 0.1, HEAD),
)
DECODER_DIM = {"b0": 256, "b1": 256, "b2": 768, "b3": 768, "b4": 768, "b5": 768}


def _ade20k(short: int) -> DatasetRecipe:
    return DatasetRecipe(
        names=("ade20k",),
        title="ADE20K",
        source=PIPELINE,
        schedule_source=STEPS,
        max_steps=160_000,
        samples_per_step=16,
        crop=(short, short),
        base=(2048, short),
        resize_to=32,
        validation_interval=16_000,
        scales=((0.75, 0.875, 1, 1.125, 1.25),),
    )


ADE20K = _ade20k(512)
ADE20K_B5 = _ade20k(640)
CITYSCAPES = DatasetRecipe(
    names=("cityscapes",),
    title="Cityscapes",
    source=PIPELINE,
    schedule_source=STEPS,
    max_steps=160_000,
    samples_per_step=8,
    crop=(1024, 1024),
    base=(2048, 1024),
    image_size=(2048, 1024),
    window=1024,
    stride=768,
    validation_interval=4_000,
    scales=((0.5, 0.75, 1, 1.25, 1.5, 1.75, 2),),
)
COCO_STUFF = DatasetRecipe(
    names=("coco_stuff171", "coco_stuff182"),
    title="COCO-Stuff",
    source=CLOSEST,
    schedule_source=STEPS,
    max_steps=80_000,
    samples_per_step=16,
    crop=(512, 512),
    base=(2048, 512),
    resize_to=32,
    validation_interval=None,
    scales=(SIX_SCALES,),
    remarks=(
        "The paper counts 172 classes of COCO-Stuff, the reference lists 182 and mmsegmentation "
        "171. UNVERIFIED: which of these the reported 46.7 % mIoU refers to.",
    ),
)


def _recipe(variant: str) -> Recipe:
    width = Setting("decoder_dim", DECODER_DIM[variant], f"{CONFIG}/{variant.upper()}")
    arguments = (*ARGUMENTS, width)
    ade20k = ADE20K_B5 if variant == "b5" else ADE20K
    return Recipe(
        title=f"SegFormer-{variant.upper()}",
        reference=CONFIG,
        settings=(*(one._replace(key=NETWORK + one.key) for one in arguments), *ANY_DATASET),
        datasets=(ade20k, CITYSCAPES, COCO_STUFF),
        encoder_weights="pretrained on ImageNet-1K, mit_b*.pth",
        batch_norm=HEAD,
        remarks=(
            *REMARKS,
            "The paper does not state whether it reports the last or the best checkpoint.",
        ),
    )


RECIPES = {f"segformer_{variant}": (_recipe(variant),) for variant in DECODER_DIM}
