"""A small task for tests: two easy images, a minimal segmenter, a quiet trainer."""

import lightning.pytorch as pl
import torch
from torch import nn

from segformer_pl.models import segformer_b0
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.task import SegmentationTask

NAMES = ["background", "left half", "absent"]


def make_task(**arguments):
    palette = [[0, 0, 0], [255, 255, 255], [9, 9, 9]]
    defaults = {"lr": 1e-3, "head_lr_mult": 1.0, "warmup_steps": 2}
    return SegmentationTask(segformer_b0(len(NAMES)), NAMES, palette, **defaults | arguments)


def samples(count=4, size=32):
    """Images with a bright left half of class 1 and a dark right half of class 0."""
    image = torch.zeros(3, size, size)
    image[:, :, : size // 2] = 1.0
    label = (image[0] > 0.5).long()
    return [{"image": image, "label": label, "id": str(i)} for i in range(count)]


def make_trainer(tmp_path, **arguments):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**defaults | arguments)


class Tiny(Segmenter):
    """A minimal segmenter with nothing but what the contract requires."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.num_classes = 3, len(NAMES)
        self.features = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(4, len(NAMES), 1)

    def feature_maps(self, images):
        return {"features": self.features(images)}

    def forward(self, images):
        return self.classifier(self.features(images))

    def init_args(self):
        return {}
