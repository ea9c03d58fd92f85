"""Networks outside of the package, as in a user's module."""

from torch import Tensor, nn

from segformer_pl.models.segmenter import Encoder, Segmenter


class ToySegmenter(Segmenter):
    """Three convolutions. No submodule is named ``encoder`` or ``head``."""

    def __init__(self, num_classes: int, width: int = 8, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.min_size = in_channels, num_classes, 8
        self.fine = nn.Conv2d(in_channels, width, 5, stride=4, padding=2)
        self.norm = nn.BatchNorm2d(width)
        self.coarse = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.classes = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.feature_maps(images)["coarse"])

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.norm(self.fine(images)).relu()
        return {"fine": fine, "coarse": self.coarse(fine).relu()}

    def init_args(self) -> dict[str, int]:
        width = self.classes.in_channels
        return {"num_classes": self.num_classes, "width": width, "in_channels": self.in_channels}

    def layer_ids(self) -> dict[str, int]:
        depths = {"fine": 0, "norm": 0, "coarse": 1}
        names = (name for name, _ in self.named_parameters())
        return {name: depths[name.split(".")[0]] for name in names if "classes" not in name}

    def no_weight_decay(self) -> set[str]:
        return {"norm.weight", "norm.bias"}


class ToyEncoder(Encoder):
    """An encoder with a pyramid of two maps."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.out_strides = 3, (width, 2 * width), (4, 8)
        self.fine = nn.Conv2d(3, width, 4, stride=4)
        self.coarse = nn.Conv2d(width, 2 * width, 2, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images).relu()
        return [fine, self.coarse(fine)]

    def init_args(self) -> dict[str, int]:
        return {"width": self.out_channels[0]}


def toy_encoder(width: int = 4) -> ToyEncoder:
    return ToyEncoder(width)
