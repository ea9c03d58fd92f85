import pytest
import torch
from torchvision import tv_tensors

from segformer_pl.data.transforms import PADDING_COLOR, to_float, train_transforms


def coordinate_sample(height=40, width=60):
    """Every pixel of the image says where it was, and the label says the same."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    return {
        "image": tv_tensors.Image(image),
        "label": tv_tensors.Mask((rows * 1000 + columns).long()),
        "id": "a",
    }


@pytest.mark.parametrize("crop_size", [None, (16, 24)])
def test_image_and_label_move_together(crop_size):
    transforms = train_transforms(crop_size, None, photometric=False, ignore_index=255)
    flipped = set()
    for _ in range(20):
        sample = transforms(coordinate_sample())
        position = (sample["image"] * 255).round().long()
        torch.testing.assert_close(
            sample["label"].as_subclass(torch.Tensor),
            (position[0] * 1000 + position[1]).as_subclass(torch.Tensor),
        )
        assert tuple(sample["label"].shape) == (crop_size or (40, 60))
        assert sample["id"] == "a"
        flipped.add(bool(position[1, 0, 0] > position[1, 0, -1]))
    assert flipped == {True, False}


def test_labels_stay_whole_when_scaled():
    transforms = train_transforms((50, 50), (0.5, 2.0), photometric=True, ignore_index=255)
    known = set(coordinate_sample()["label"].unique().tolist()) | {255}
    for _ in range(10):
        sample = transforms(coordinate_sample())
        assert sample["label"].dtype == torch.int64
        assert set(sample["label"].unique().tolist()) <= known
        assert sample["image"].dtype == torch.float32
        assert 0 <= sample["image"].min() <= sample["image"].max() <= 1


def test_padding_is_ignored_and_has_the_mean_color():
    transforms = train_transforms((64, 64), None, photometric=False, ignore_index=255)
    sample = transforms(coordinate_sample())
    padded = sample["label"] == 255
    assert padded.sum() >= 64 * 64 - 40 * 60
    color = sample["image"][:, 0, 0] if padded[0, 0] else sample["image"][:, -1, -1]
    torch.testing.assert_close(
        color.as_subclass(torch.Tensor), torch.tensor(PADDING_COLOR) / 255, atol=1 / 255, rtol=0
    )


def test_scale_range_is_respected():
    transforms = train_transforms(None, (0.5, 2.0), photometric=False, ignore_index=255)
    heights = {transforms(coordinate_sample())["label"].shape[0] for _ in range(40)}
    assert min(heights) >= 20
    assert max(heights) <= 80
    assert len(heights) > 10


@pytest.mark.parametrize("scale_range", [(2.0, 0.5), (0.0, 1.0)])
def test_an_impossible_scale_range_is_refused(scale_range):
    with pytest.raises(ValueError, match="give two factors above 0, the smaller one first"):
        train_transforms(None, scale_range, photometric=False, ignore_index=255)


def test_to_float_leaves_the_label_alone():
    sample = to_float()(coordinate_sample())
    assert sample["label"].dtype == torch.int64
    assert sample["image"].max() == pytest.approx(59 / 255)
