"""Pictures of what the network says: a panel while training, masks from ``predict``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from segformer_pl.callbacks.figures import publish

UNLABELLED_COLOR = (255, 255, 255)


class PredictionPanel(pl.Callback):
    """After every validation, draws image, label and prediction of the first few pictures.

    The figure goes to ``predictions/`` in the run folder and to the loggers that take images.

    Args:
        num_images: How many pictures.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = num_images
        self.shown: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.num_images - len(self.shown)
        if not trainer.is_global_zero or trainer.sanity_checking or missing <= 0:
            return
        batch = {key: batch[key][:missing] for key in ("image", "label", "id")}
        predictions = pl_module.predict_step(batch, batch_idx)
        self.shown.extend(
            zip(batch["id"], batch["image"].cpu(), batch["label"].cpu(), predictions.cpu())
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        shown, self.shown = self.shown, []
        if shown:
            figure = plot_predictions(shown, pl_module.class_names, pl_module.palette)
            publish(trainer, figure, "predictions")


def plot_predictions(
    shown: Sequence[tuple[str, Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Figure:
    """Rows of image, label, prediction, two pictures a row, and a legend.

    Args:
        shown: ``(id, image (3, H, W) in 0 to 1, label (H, W), prediction (H, W))`` each.
        class_names: By train id.
        palette: RGB 0-255 by train id.
    """
    colors = np.full((256, 3), UNLABELLED_COLOR, np.uint8)
    colors[: len(palette)] = palette
    num_columns = 2 if len(shown) > 1 else 1
    num_rows = -(-len(shown) // num_columns)
    height, width = shown[0][2].shape
    panel_width = 2.0
    figure = Figure(
        figsize=(
            3 * num_columns * panel_width,
            num_rows * (panel_width * height / width + 0.25) + 0.7,
        ),
        layout="constrained",
    )
    axes = figure.subplots(num_rows, 3 * num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (name, image, label, prediction) in enumerate(shown):
        row, column = divmod(number, num_columns)
        pictures: dict[str, npt.NDArray[Any]] = {
            name: image.permute(1, 2, 0).clamp(0, 1).numpy(),
            "label": colors[label.numpy()],
            "prediction": colors[prediction.numpy()],
        }
        for offset, (title, picture) in enumerate(pictures.items()):
            axis = axes[row, 3 * column + offset]
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=7, pad=2)
    legend = zip([*class_names, "unlabelled"], [*palette, UNLABELLED_COLOR], strict=True)
    handles = [
        Patch(facecolor=(r / 255, g / 255, b / 255), edgecolor="0.5", label=name)
        for name, (r, g, b) in legend
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8
    )
    return figure


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict`` says as indexed PNG files ``<id>.png`` with the palette.

    Args:
        output_dir: Folder for the files.
    """

    def __init__(self, output_dir: Path = Path("predictions")) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = output_dir

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        rank_zero_info(f"masks: {self.output_dir}")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for name, labels in zip(batch["id"], prediction.cpu()):
            if name in batch.get(
                "skipped", {}
            ):  # a blank in place of a picture that cannot be read
                continue
            mask = Image.fromarray(labels.numpy().astype(np.uint8), mode="P")
            mask.putpalette(np.asarray(pl_module.palette, np.uint8).tobytes())
            file = (self.output_dir / f"{name}.png").resolve()
            if not file.is_relative_to(self.output_dir.resolve()):
                raise ValueError(
                    f"sample id {name!r} leads out of predictions.output_dir; rename it"
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            mask.save(file)
