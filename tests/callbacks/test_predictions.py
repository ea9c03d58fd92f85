"""Which validation images the prediction panel shows."""

from types import SimpleNamespace

import torch

from segformer_pl.callbacks import PredictionPanel


def test_blank_images_of_skipped_samples_are_left_out():
    panel = PredictionPanel(num_images=3)
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False)
    for first in (0, 3):
        maps = torch.arange(first, first + 3).view(3, 1, 1).expand(3, 4, 4)
        batch = {
            "image": maps[:, None].float(),
            "label": maps,
            "id": [str(number) for number in range(first, first + 3)],
            "skipped": {"1": "not an image"} if first == 0 else {},
        }
        panel.on_validation_batch_end(trainer, None, {"pred": maps}, batch, 0)
    assert [name for name, *_ in panel.shown] == ["0", "2", "3"]
    for name, image, target, pred in panel.shown:
        assert image.shape == (1, 4, 4)
        assert (image == int(name)).all()
        assert (target == int(name)).all()
        assert (pred == int(name)).all()
