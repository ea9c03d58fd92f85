"""A frozen encoder keeps its weights and its statistics, and the rest is trained."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from segformer_pl.errors import UserError
from segformer_pl.freezing import check_complete
from segformer_pl.models import SegFormer
from segformer_pl.models.segmenter import Encoder
from segformer_pl.task import SegmentationTask
from tests.small_task import NAMES, Tiny, make_task, make_trainer, samples


class Convolutions(Encoder):
    """An encoder with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels, self.out_strides = 3, (4,) * 4, (4, 8, 16, 32)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.down = nn.AvgPool2d(2)

    def forward(self, images):
        maps = [self.stem(images)]
        while len(maps) < 4:
            maps.append(self.down(maps[-1]))
        return maps

    def init_args(self):
        return {}


def task_of(**arguments):
    network = SegFormer(Convolutions(), len(NAMES), decoder_dim=8)
    palette = [[0, 0, 0], [255, 255, 255], [9, 9, 9]]
    return SegmentationTask(network, NAMES, palette, warmup_steps=0, lr=0.1, **arguments)


def train(task, tmp_path, **arguments):
    """Train and validate; return the names of the tensors that changed."""
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    loader = DataLoader(samples(8), batch_size=2)
    trainer = make_trainer(tmp_path, max_steps=4, val_check_interval=2, **arguments)
    trainer.fit(task, loader, DataLoader(samples(2)))
    after = task.network.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_encoder_stays_as_it_is(tmp_path):
    task = task_of(freeze="encoder")
    changed, trainer = train(task, tmp_path)
    assert changed
    assert all(name.startswith("head.") for name in changed)
    assert {"head.classifier.weight", "head.bn.running_mean"} <= changed
    assert not any(module.training for module in task.network.encoder.modules())
    assert task.network.head.bn.training
    groups = trainer.optimizers[0].param_groups
    assert {group["name"] for group in groups} == {"head"}
    assert task.train().network.head.training
    assert not task.network.encoder.stem[1].training
    # Without the option, everything changes.
    changed, _ = train(task_of(), tmp_path)
    assert {"encoder.stem.0.weight", "encoder.stem.1.running_mean"} <= changed


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_frozen_run_resumes(tmp_path):
    task = task_of(freeze="encoder")
    _, trainer = train(task, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loader = DataLoader(samples(8), batch_size=2)
    again = make_trainer(tmp_path, max_steps=6)
    again.fit(task_of(freeze="encoder"), loader, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert again.global_step == 6


def test_weights_are_loaded_before(tmp_path):
    source = task_of().network
    torch.save(source.encoder.state_dict(), tmp_path / "w.pth")
    task = task_of(freeze="encoder", encoder_weights=str(tmp_path / "w.pth"))
    train(task, tmp_path)
    for name, tensor in task.network.encoder.state_dict().items():
        assert torch.equal(tensor, source.encoder.state_dict()[name])


def test_an_encoder_without_weights_is_noticed(tmp_path):
    match = "the encoder keeps the weights that it was built with"
    with pytest.warns(UserWarning, match=match) as warned:
        train(task_of(freeze="encoder"), tmp_path)
    # Lightning's own warning of frozen modules is left out.
    assert not any("in eval mode" in str(warning.message) for warning in warned)


def test_impossible_values_are_refused():
    with pytest.raises(UserError, match=r"model.freeze is 'head'; give encoder, or leave it out"):
        task_of(freeze="head")
    with pytest.raises(UserError, match=r"model.layer_decay 0.9 sets the learning rates of the en"):
        make_task(freeze="encoder", layer_decay=0.9)
    with pytest.raises(UserError, match=r"w.pth lacks 2 tensors of the encoder, such as a, which"):
        check_complete("w.pth", ["a", "b"])
    with pytest.raises(UserError, match="a Tiny names no parameters of an encoder"):
        SegmentationTask(Tiny(), NAMES, [[0, 0, 0]] * 3, freeze="encoder")
