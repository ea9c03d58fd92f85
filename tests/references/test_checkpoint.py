"""A checkpoint written by mmengine's Runner is loaded, although it holds more than tensors."""

import pytest
import torch

from segformer_pl.checkpoints import load_weights
from segformer_pl.models.mit import mit_b0


@pytest.fixture(scope="module")
def runner_checkpoint(mmseg, tmp_path_factory):
    """Encoder trained for two steps, and its checkpoint file."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from mmseg.models.backbones import MixVisionTransformer

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = MixVisionTransformer(
                embed_dims=32, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8]
            )

        def forward(self, inputs, mode="tensor"):
            return {"loss": sum(stage.square().mean() for stage in self.backbone(inputs))}

    folder = tmp_path_factory.mktemp("runner")
    loader = torch.utils.data.DataLoader([{"inputs": torch.randn(3, 64, 64)}] * 2)
    runner = Runner(
        Model(),
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 2},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-3}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False}},
        default_scope="mmseg",
        log_level="ERROR",
    )
    runner.train()
    return runner.model.backbone, folder / "iter_2.pth"


@torch.no_grad()
def test_a_runner_checkpoint_is_loaded(runner_checkpoint):
    backbone, file = runner_checkpoint
    with pytest.raises(Exception, match="HistoryBuffer"):  # which torch alone refuses
        torch.load(file, weights_only=True)
    encoder = mit_b0().eval()
    load_weights(encoder, file)
    images = torch.randn(1, 3, 65, 97)
    for ours, theirs in zip(encoder(images), backbone.eval()(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
