"""Networks of timm under the names of SegFormer's stages."""

import pytest
import torch

from segformer_pl.analysis.erf.backbones import TimmStages


def test_stages_of_timm_networks():
    model = TimmStages("resnet18")
    maps = model.eval().feature_maps(torch.rand(1, 3, 64, 64))
    assert {name: tuple(m.shape[1:]) for name, m in maps.items()} == {
        "stage1": (64, 16, 16),
        "stage2": (128, 8, 8),
        "stage3": (256, 4, 4),
        "stage4": (512, 2, 2),
    }
    with pytest.raises(ValueError, match=r"no network 'resnet17x'"):
        TimmStages("resnet17x")
    with pytest.raises(ValueError, match=r"there is no file 'w\.pth'"):
        TimmStages("resnet18", "w.pth")


@pytest.mark.slow
def test_timms_channels_last_stages():
    model = TimmStages("swin_tiny_patch4_window7_224")
    maps = model.eval().feature_maps(torch.rand(1, 3, 224, 224))
    assert tuple(maps["stage2"].shape) == (1, 192, 28, 28)


def test_random_residual_branches_do_not_start_at_zero():
    """timm starts them at zero, which gives the receptive field of the shortcuts: 6 px, not 125."""
    resnet = TimmStages("resnet18").network
    assert resnet.layer4[1].bn2.weight.min() > 0
    convnext = TimmStages("convnext_atto")
    gammas = [p for name, p in convnext.named_parameters() if name.endswith("gamma")]
    assert gammas
    assert all(gamma.min() > 0.5 for gamma in gammas)


@pytest.mark.slow
def test_timms_vision_transformers_accept_images_of_other_sizes():
    maps = TimmStages("vit_tiny_patch16_224").eval().feature_maps(torch.rand(1, 3, 64, 96))
    assert tuple(maps["stage3"].shape) == (1, 192, 4, 6)
    with pytest.raises(ValueError, match=r"maxvit_tiny_tf_224 accepts no images of 64x96.*--size"):
        TimmStages("maxvit_tiny_tf_224").eval().feature_maps(torch.rand(1, 3, 64, 96))


def test_timm_weights_from_a_file(tmp_path):
    import timm

    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = TimmStages("resnet18", str(tmp_path / "w.pth"))
    torch.testing.assert_close(model.network.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
