"""The recipes of DeepLabv3+: the paper's (Chen et al. 2018) and mmsegmentation's.

The paper trains ResNets on PASCAL VOC only. For ADE20K and Cityscapes, the guides of the authors'
code (tensorflow/models, research/deeplab) state steps and crops, for Xception.
"""

from segformer_pl.analysis.recipes.settings import (
    NETWORK,
    PROTOCOL,
    REMARKS,
    DatasetRecipe,
    Recipe,
    Setting,
    cross_entropy,
    settings,
    sgd,
    training,
)

TRAIN = "authors' code, research/deeplab/train.py"
GUIDE = "authors' code, research/deeplab/g3doc, for Xception"
PAPER_ARGUMENTS = {
    "output_stride": 16,
    "decoder_dim": 256,
    "separable": False,
    "aux_weight": 0,
    "in_channels": 3,
    "out_indices": None,
}
AVERAGE = "authors' code, train_utils.py: averaged over the labelled pixels"

PAPER = Recipe(
    title="DeepLabv3+",
    reference=TRAIN,
    settings=(
        *settings(PAPER_ARGUMENTS, "paper Sec. 4", NETWORK),
        Setting(NETWORK + "atrous_rates", None, "paper Sec. 4", same=([6, 12, 18],)),
        Setting(NETWORK + "drop_path_rate", None, TRAIN, same=(0,)),
        Setting("model.lr", 0.007, "paper Sec. 4, on PASCAL VOC"),
        *sgd(1, 1e-4, 0.9, 0, TRAIN),
        *training(TRAIN, TRAIN, TRAIN, photometric=False),
        *cross_entropy("valid", AVERAGE),
        Setting(PROTOCOL + "pad_to", None, GUIDE),
    ),
    datasets=(
        DatasetRecipe(
            names=("ade20k",),
            title="ADE20K",
            source=GUIDE,
            schedule_source=GUIDE,
            max_steps=150_000,
            samples_per_step=None,
            crop=(513, 513),
            base=(513, 513),
            resizes_test_images=False,
            validation_interval=None,
        ),
        DatasetRecipe(
            names=("cityscapes",),
            title="Cityscapes",
            source=GUIDE,
            schedule_source=GUIDE,
            max_steps=90_000,
            samples_per_step=None,
            crop=(769, 769),
            base=(2048, 1024),
            image_size=(2048, 1024),
            validation_interval=None,
        ),
    ),
    encoder_weights="pretrained on ImageNet-1K",
    batch_norm=TRAIN,
    backbones=("resnet101", "resnet50"),
    remarks=(
        *REMARKS,
        "The authors published no results of a ResNet on ADE20K and Cityscapes, and the guides ask "
        "for more than 12 samples per step on ADE20K and more than 8 on Cityscapes.",
        "The authors draw the scale from 0.5, 0.75, ..., 2.0; here it is uniform between them. "
        "They do not check the share of one class in a crop; here crops of more than 75 % of one "
        "class are drawn anew.",
        "The authors train biases at twice the learning rate.",
        "The authors upsample with aligned corners; here corners are not aligned.",
        "The authors' ResNet takes images minus their mean; timm's weights are for images that are "
        "divided by their standard deviation too.",
    ),
)

CONFIG = "mmsegmentation, configs/deeplabv3plus"
SCHEDULE = "mmsegmentation, configs/_base_/schedules"
PIPELINE = "mmsegmentation, configs/_base_/datasets"
LOSS = "mmsegmentation: one cross-entropy, averaged over all pixels"
MMSEG_ARGUMENTS = {
    "output_stride": 8,
    "decoder_dim": 512,
    "separable": True,
    "aux_weight": 0.4,
    "in_channels": 3,
    "out_indices": None,
}

MMSEG = Recipe(
    title="DeepLabv3+ of mmsegmentation",
    reference=CONFIG,
    settings=(
        *settings(MMSEG_ARGUMENTS, CONFIG, NETWORK),
        Setting(NETWORK + "atrous_rates", None, CONFIG, same=([12, 24, 36],)),
        Setting(NETWORK + "drop_path_rate", None, CONFIG, same=(0,)),
        Setting("model.lr", 0.01, SCHEDULE),
        *sgd(1, 5e-4, 0.9, 1e-4, SCHEDULE),
        *training(SCHEDULE, PIPELINE),
        *cross_entropy("all", LOSS),
        Setting(PROTOCOL + "pad_to", None, PIPELINE),
    ),
    datasets=(
        DatasetRecipe(
            names=("ade20k",),
            title="ADE20K",
            source=PIPELINE,
            schedule_source=SCHEDULE,
            max_steps=160_000,
            other_schedules=((80_000, 8_000),),
            samples_per_step=16,
            crop=(512, 512),
            base=(2048, 512),
            validation_interval=16_000,
        ),
        DatasetRecipe(
            names=("cityscapes",),
            title="Cityscapes",
            source=PIPELINE,
            schedule_source=SCHEDULE,
            max_steps=80_000,
            other_schedules=((40_000, 4_000),),
            samples_per_step=8,
            crop=(512, 1024),
            base=(2048, 1024),
            image_size=(2048, 1024),
            validation_interval=8_000,
        ),
    ),
    encoder_weights="pretrained on ImageNet-1K, resnet101_v1c",
    batch_norm=CONFIG,
    backbones=("resnet101c", "resnet50c"),
    remarks=(
        *REMARKS,
        "mmsegmentation decays all weights; here those of the encoder's norms are not decayed.",
        "timm has ImageNet weights of gluon for this stem, mmsegmentation its own.",
    ),
)

RECIPES = {"deeplabv3plus": (PAPER,), "deeplabv3plus_mmseg": (MMSEG,)}
