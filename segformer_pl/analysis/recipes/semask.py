"""The recipes of SeMask-FPN (Jain et al. 2021; Picsart-AI-Research/SeMask-Segmentation)."""

from segformer_pl.analysis.recipes.settings import (
    NETWORK,
    PROTOCOL,
    REMARKS,
    DatasetRecipe,
    Recipe,
    Setting,
    adamw,
    cross_entropy,
    settings,
    training,
)

CONFIG = "reference, SeMask-FPN/configs/semask_swin"
PIPELINE = "reference, SeMask-FPN/configs/_base_/datasets/semask"
BATCH = "reference, SeMask-FPN/README.md"
LOSS = "reference, semask_decode_head.py: cross-entropy, averaged over all pixels"
ADE20K_SCALES = (
    "On ADE20K the reference draws the scale from 0.5, 0.75, 1, 1.25, 1.5 and 1.75; here it is "
    "uniform between the first and the last."
)


def _recipe(
    title: str,
    backbones: tuple[str, ...],
    weights: str,
    short: int = 512,
    warmup_ratio: str = "1e-5",
    ade20k_remarks: tuple[str, ...] = (),
) -> Recipe:
    """Return the recipe of some backbones.

    Args:
        title: Name in texts.
        backbones: Names of the backbones in timm.
        weights: The initial weights, as text.
        short: Side of the crop on ADE20K in pixels.
        warmup_ratio: Begin of the warm-up on Cityscapes as a fraction of the learning rate.
        ade20k_remarks: Further differences on ADE20K.
    """
    ade20k = DatasetRecipe(
        names=("ade20k",),
        title="ADE20K",
        source=PIPELINE,
        schedule_source=BATCH,
        max_steps=80_000,
        samples_per_step=16,
        crop=(short, short),
        base=(4 * short, short),
        validation_interval=8_000,
        settings=(
            *settings({"lr": 1e-4, "weight_decay": 1e-4}, CONFIG, "model."),
            Setting("data.scale_range", [0.5, 1.75], PIPELINE),
        ),
        remarks=(ADE20K_SCALES, *ade20k_remarks),
    )
    cityscapes = DatasetRecipe(
        names=("cityscapes",),
        title="Cityscapes",
        source=PIPELINE,
        schedule_source=BATCH,
        max_steps=80_000,
        samples_per_step=8,
        crop=(768, 768),
        base=(2048, 1024),
        image_size=(2048, 1024),
        validation_interval=8_000,
        settings=(
            *settings({"lr": 1e-3, "weight_decay": 0.05}, CONFIG, "model."),
            Setting("data.scale_range", [0.5, 2], PIPELINE),
        ),
        remarks=(
            ()
            if warmup_ratio == "1e-6"
            else (
                f"On Cityscapes the reference's warm-up begins at {warmup_ratio} times the "
                "learning rate; here at 1e-6 times.",
            )
        ),
    )
    # None takes the sizes that the name of the backbone stands for.
    arguments = {
        "decoder_dim": 256,
        "dropout": 0.1,
        "semantic_dropout": 0.1,
        "global_stages": None,
        "aux_weight": 0.4,
        "drop_path_rate": 0.3,
        "in_channels": 3,
        **dict.fromkeys(("embed_dim", "depths", "num_heads", "window_size")),
    }
    by_dataset = {one.key for one in ade20k.settings}
    shared = (
        *settings(arguments, CONFIG, NETWORK),
        *adamw(1e-4, 1, 1e-4, 1500, 1, CONFIG),
        *training(CONFIG, PIPELINE),
        *cross_entropy("all", LOSS),
        Setting(PROTOCOL + "pad_to", None, PIPELINE),
    )
    return Recipe(
        title=title,
        reference=CONFIG,
        settings=tuple(one for one in shared if one.key not in by_dataset),
        datasets=(ade20k, cityscapes),
        encoder_weights=weights,
        batch_norm="reference, configs/_base_/models/semfpn_semask_swin.py",
        backbones=backbones,
        remarks=(
            *REMARKS,
            "UNVERIFIED: the interval between validations, which is mmsegmentation's.",
        ),
    )


IN_1K = "pretrained on ImageNet-1K at 224x224"
IN_22K = "pretrained on ImageNet-22K at 384x384"
ANY_CROP = (
    "On ADE20K the reference does not check the share of one class in a crop; here crops of more "
    "than 75 % of one class are drawn anew.",
)
OHEM = (
    "On ADE20K the reference's main loss counts hard pixels only (OHEM, min_kept 100000), and its "
    "auxiliary loss all; here one loss serves both.",
)
RECIPES = {
    "semask_fpn": (
        _recipe("SeMask-FPN with Swin-T", ("swin_tiny_patch4_window7_224",), IN_1K),
        _recipe(
            "SeMask-FPN with Swin-S",
            ("swin_small_patch4_window7_224",),
            IN_1K,
            ade20k_remarks=ANY_CROP,
        ),
        _recipe(
            "SeMask-FPN with Swin-B",
            ("swin_base_patch4_window12_384",),
            IN_22K,
            warmup_ratio="1e-6",
            ade20k_remarks=ANY_CROP,
        ),
        _recipe(
            "SeMask-FPN with Swin-L",
            ("swin_large_patch4_window12_384",),
            IN_22K,
            short=640,
            ade20k_remarks=(*ANY_CROP, *OHEM),
        ),
    )
}
