"""What matters in training alone does not stand in the way of trained weights."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from segformer_pl.checkpoints import export_weights, load_network, load_weights
from segformer_pl.errors import UserError
from segformer_pl.models import DeepLabV3Plus, TimmEncoder, setr_mla, setr_pup
from segformer_pl.task import SegmentationTask

NAMES = ["one", "two"]
VIT = {"backbone": "test_vit", "image_size": 32, "decoder_dim": 8}


def setr(build, aux_weight):
    return build(2, out_indices=(0, 1), aux_weight=aux_weight, **VIT)


def deeplab(aux_weight):
    return DeepLabV3Plus(TimmEncoder("test_resnet", output_stride=16), 2, 8, aux_weight=aux_weight)


SYSTEMS = {
    "setr_pup": (lambda aux_weight: setr(setr_pup, aux_weight), "aux_heads"),
    "setr_mla": (lambda aux_weight: setr(setr_mla, aux_weight), "aux_heads"),
    "deeplabv3plus": (deeplab, "aux_head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_auxiliary_heads_are_left_out_where_the_network_has_none(system, randomize, tmp_path):
    build, path = SYSTEMS[system]
    trained, plain = randomize(build(0.4)).float().eval(), build(0).eval()
    export_weights(trained, tmp_path / "weights.safetensors", "native")
    report = load_weights(plain, tmp_path / "weights.safetensors")
    auxiliary = {key for key in trained.state_dict() if key.startswith(f"{path}.")}
    assert report.dropped.keys() == auxiliary
    assert ": only the training loss uses it, and the network was built without it" in str(report)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(images), trained(images))
    # In a network that has auxiliary heads, they have to be complete.
    state = {k: v for k, v in trained.state_dict().items() if k not in auxiliary}
    with pytest.raises(UserError, match=rf"lacks {len(auxiliary)} tensors of the model \({path}"):
        load_weights(trained, state)
    with pytest.raises(UserError, match=r"1 tensor that the model has no place for \(aux\.bias\)"):
        load_weights(plain, {**plain.state_dict(), "aux.bias": torch.zeros(2)})


def trainer(folder, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


@pytest.mark.slow
def test_a_checkpoint_with_auxiliary_heads_is_evaluated_without_them(tmp_path, caplog):
    data = [
        {"image": torch.rand(3, 32, 32), "label": torch.arange(32).expand(32, -1) // 16, "id": "a"}
    ] * 2
    loader = DataLoader(data, batch_size=2)
    task = SegmentationTask(setr(setr_pup, 0.4), NAMES, [[0, 0, 0]] * 2, warmup_steps=0)
    run = trainer(tmp_path, max_steps=1)
    run.fit(task, loader)
    run.save_checkpoint(tmp_path / "run.ckpt")
    losses = []
    for aux_weight in (0.4, 0):
        task = SegmentationTask(setr(setr_pup, aux_weight), NAMES, [[0, 0, 0]] * 2)
        run = trainer(tmp_path)
        with caplog.at_level(logging.INFO):
            run.validate(task, loader, tmp_path / "run.ckpt", verbose=False, weights_only=False)
        losses.append(run.callback_metrics["val/loss"].item())
    assert losses[0] == losses[1]
    message = "the checkpoint: 22 tensors are left out (network.aux_heads.0.norm.weight, "
    assert message in caplog.text
    # Training on without them would be another training.
    with pytest.raises(UserError, match=r"has network\.aux_heads\.0.*, which the model lacks"):
        trainer(tmp_path, max_steps=2).fit(
            SegmentationTask(setr(setr_pup, 0), NAMES, [[0, 0, 0]] * 2),
            loader,
            ckpt_path=tmp_path / "run.ckpt",
            weights_only=False,
        )


@pytest.mark.slow
def test_training_arguments_are_not_compared(tmp_path):
    trained = DeepLabV3Plus(TimmEncoder("test_resnet", output_stride=16), 2, 8, dropout=0.3)
    export_weights(trained, tmp_path / "weights.safetensors", "native")
    again = DeepLabV3Plus(
        TimmEncoder("test_resnet", output_stride=16, drop_path_rate=0.2), 2, 8, aspp_dropout=0.4
    )
    assert load_weights(again, tmp_path / "weights.safetensors").changed == ()
    coarse = DeepLabV3Plus(TimmEncoder("test_resnet", output_stride=8), 2, 8)
    changed = load_weights(coarse, tmp_path / "weights.safetensors").changed
    assert {sentence.split()[0] for sentence in changed} == {"output_stride", "atrous_rates"}
    assert load_network(tmp_path / "weights.safetensors")[0].dropout.p == 0.3
