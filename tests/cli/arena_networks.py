"""Networks for the tests of ``arena``, outside of the package."""

from torch import Tensor, nn

from segformer_pl.models.segmenter import Segmenter


class Small(Segmenter):
    """Three convolutions, whose feature maps are named unlike SegFormer's."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.in_channels, self.num_classes = 3, num_classes
        self.stem = nn.Conv2d(3, width, 5, stride=4, padding=2)
        self.context = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.fuse = nn.Conv2d(width, width, 3, padding=1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.feature_maps(images)["fused"])

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        stage1 = self.stem(images).relu()
        context = self.context(stage1).relu()
        return {"stage1": stage1, "context": context, "fused": self.fuse(context).relu()}

    def init_args(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "width": self.classifier.in_channels}


class Unmeasurable(Small):
    """A network that trains, but whose costs and receptive fields cannot be measured."""

    def forward(self, images: Tensor) -> Tensor:
        # Reading a value breaks off a pass on fake tensors, which have shapes alone.
        return super().forward(images) + 0 * images.mean().item()

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        if not self.training and images.requires_grad:
            raise RuntimeError("planted\nsecond line of the message")
        return super().feature_maps(images)
