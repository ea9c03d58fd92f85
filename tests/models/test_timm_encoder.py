"""timm's backbones under the contract of an encoder."""

import importlib

import pytest
import timm
import torch
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet

from segformer_pl.analysis.complexity import complexity
from segformer_pl.checkpoints import load_network, load_weights
from segformer_pl.checkpoints.conversion import export_weights
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, TimmEncoder
from segformer_pl.models.timm_models import on_meta
from segformer_pl.optim import parameter_groups

SWIN = "swin_tiny_patch4_window7_224"
SWIN_V2 = "swinv2_tiny_window8_256"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels", "num_layers"),
    [
        ("resnet18", (64, 128, 256, 512), 8),
        ("resnet50c", (256, 512, 1024, 2048), 16),
        ("efficientnet_lite0", (24, 40, 112, 320), 16),
        ("convnext_atto", (40, 80, 160, 320), 12),
        ("pvt_v2_b0", (32, 64, 160, 256), 8),
        (SWIN_V2, (96, 192, 384, 768), 12),  # timm returns (B, H, W, C)
    ],
)
def test_contract(name, channels, num_layers):
    encoder = TimmEncoder(name).eval()
    assert encoder.out_channels == channels
    assert encoder.out_strides == (4, 8, 16, 32)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = encoder(images)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(m.shape) for m in maps] == [(2, c, *s) for c, s in zip(channels, sizes)]
    assert encoder.out_sizes(64, 96) == sizes
    names = [parameter for parameter, _ in encoder.named_parameters()]
    ids = encoder.layer_ids()
    assert list(ids) == names
    assert sorted(set(ids.values())) == list(range(num_layers))
    assert ids[names[0]] == 0
    paths = [f"{path}." for path in encoder.parts().values()]
    assert all(sum(n.startswith(path) for path in paths) == 1 for n in names)
    assert encoder.no_weight_decay() < set(names)
    again = TimmEncoder(**encoder.init_args())
    again.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        for one, other in zip(again.eval()(images), maps):
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", SWIN_V2])
def test_maps_are_those_of_timm(name):
    encoder = TimmEncoder(name).eval()
    model = timm.create_model(name, features_only=True).eval()
    model.load_state_dict(encoder.backbone.state_dict())
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        expected = model(images)[-4:]
        maps = encoder(images)
    for one, other in zip(maps, expected):
        other = other.permute(0, 3, 1, 2) if name == SWIN_V2 else other
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "convnext_atto", "efficientnet_lite0"])
def test_sizes_that_the_stride_does_not_divide(name):
    """ResNet rounds up, ConvNeXt down; the sizes are those of the real maps."""
    encoder = TimmEncoder(name).eval()
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, 70, 101))
    assert encoder.out_sizes(70, 101) == [tuple(m.shape[2:]) for m in maps]


@pytest.mark.slow
def test_layers_follow_the_image_and_join_what_is_between_blocks():
    with on_meta():
        networks = [TimmEncoder(name) for name in ("resnet18", "convnext_atto", "vgg11_bn")]
    ids = networks[0].layer_ids()
    assert ids["backbone.conv1.weight"] == ids["backbone.layer1.0.conv1.weight"] == 0
    assert ids["backbone.layer2.0.downsample.0.weight"] == 2
    assert ids["backbone.layer4.1.bn2.bias"] == 7
    ids = networks[1].layer_ids()
    assert ids["backbone.stages_1.downsample.1.weight"] == 2
    assert ids["backbone.stages_1.blocks.0.conv_dw.weight"] == 2
    ids = networks[2].layer_ids()  # no blocks: one layer for each convolution
    assert ids["backbone.features_0.weight"] == 0
    assert ids["backbone.features_25.weight"] == max(ids.values()) == 7


@pytest.mark.slow
def test_segformer_trains_every_parameter():
    network = SegFormer(TimmEncoder("efficientnet_lite0"), 5, 16).train()
    logits = network(torch.randn(2, 3, 64, 64))
    F.cross_entropy(logits, torch.randint(5, (2, 16, 16))).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    # With other strides DistributedDataParallel would copy the gradients in every step.
    assert [n for n, p in network.named_parameters() if p.grad.stride() != p.stride()] == []
    assert list(network.eval().feature_maps(torch.zeros(1, 3, 64, 64))) == [
        "stage1",
        "stage2",
        "stage3",
        "stage4",
        "head",
    ]
    groups = parameter_groups(network, 1.0, 0.01, 10.0, layer_decay=0.5)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["encoder_15"] == 1.0
    assert rates["encoder_00"] == 0.5**15
    norms = [g for g in groups if g["name"] == "encoder_00_no_decay"]
    assert norms[0]["weight_decay"] == 0


@pytest.mark.slow
def test_complexity_by_stage():
    cost = complexity(SegFormer(TimmEncoder("test_resnet"), 5, 16), 64, 96)
    assert [part.name for part in cost.parts] == [
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "head",
    ]
    assert sum(part.num_parameters for part in cost.parts) == cost.num_parameters
    assert cost.parts[-2].output_shape == (1, 96, 2, 3)
    assert cost.paper_macs > cost.macs  # the head is folded


@pytest.mark.slow
def test_paper_macs_of_attention_are_unknown():
    with on_meta():
        assert TimmEncoder("pvt_v2_b0").paper_macs(64, 64) is None


@pytest.mark.slow
def test_arguments_reach_the_backbone():
    encoder = TimmEncoder("test_resnet", out_indices=(2, 4), in_channels=5, drop_path_rate=0.3)
    assert encoder.out_strides == (8, 32)
    assert encoder.backbone.conv1[0].in_channels == 5
    assert encoder.backbone.layer4[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert [m.shape[1] for m in encoder(torch.zeros(2, 5, 64, 64))] == [48, 96]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize(
    ("output_stride", "strides"),
    [(32, (4, 8, 16, 32)), (16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))],
)
def test_output_stride(name, output_stride, strides):
    """All four stages are kept, also if several have one stride."""
    with on_meta():
        plain, dilated = TimmEncoder(name), TimmEncoder(name, output_stride=output_stride)
        maps = dilated.eval()(torch.empty(1, 3, 64, 96))
    assert dilated.out_strides == strides
    assert dilated.out_channels == plain.out_channels
    assert dilated.min_size == output_stride
    sizes = [(64 // stride, 96 // stride) for stride in strides]
    assert [tuple(m.shape[2:]) for m in maps] == dilated.out_sizes(64, 96) == sizes
    assert dilated.init_args()["output_stride"] == output_stride
    shapes_ = [{k: v.shape for k, v in e.state_dict().items()} for e in (plain, dilated)]
    assert shapes_[0] == shapes_[1]
    assert dilated.layer_ids() == plain.layer_ids()


@pytest.mark.slow
@pytest.mark.parametrize(("output_stride", "replaced"), [(16, (False, True)), (8, (True, True))])
def test_dilation_is_that_of_torchvision(randomize, output_stride, replaced):
    encoder = TimmEncoder("resnet26", out_indices=(1, 3, 4), output_stride=output_stride)
    randomize(encoder).eval()
    with on_meta():
        reference = ResNet(
            Bottleneck, [2, 2, 2, 2], replace_stride_with_dilation=[False, *replaced]
        )
    reference = IntermediateLayerGetter(reference, {f"layer{i}": f"layer{i}" for i in (1, 3, 4)})
    reference.eval().load_state_dict(encoder.backbone.state_dict(), assign=True)
    images = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        maps, expected = encoder(images), list(reference(images).values())
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_initial_weights_depend_on_the_seed_alone():
    """Also if the backbone has been examined before, which happens once for each name."""
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(TimmEncoder("test_resnet", drop_path_rate=0.123).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "resnet50x"}, r"no model 'resnet50x'; did you mean resnet50 or"),
        ({"name": "zzzz"}, r"no model 'zzzz'; see timm.list_models\(\)"),
        ({"name": "resnet18.nosuch"}, r"cannot build resnet18.nosuch .*Invalid pretrained tag"),
        ({"name": "vit_tiny_patch16_224"}, r"strides 16, 16, 16 and not .* backbone of SETR"),
        ({"name": "hiera_tiny_224"}, r"hiera_tiny_224 takes images of a single size alone"),
        ({"name": "resnet18", "out_indices": (2, 5)}, r"feature maps 0 to 4 of strides 2, 4"),
        ({"name": "resnet18", "out_indices": (3, 1)}, r"from the finest to the coarsest"),
        ({"name": "efficientnet_lite0", "out_indices": (1, 2)}, r"leaves \d+ parameters unused"),
        ({"name": "vgg11_bn", "output_stride": 16}, r"give vgg11_bn an output_stride of 16; leave"),
        ({"name": SWIN_V2, "output_stride": 8}, r"cannot give swin\w+ an output_stride of 8"),
        ({"name": SWIN}, r"computes other windows .*, or a network on a SwinEncoder"),
        ({"name": "resnet18", "output_stride": 12}, r"output_stride=12: choose one of 8, 16, 32"),
        ({"name": "vgg11_bn", "drop_path_rate": 0.1}, r"with in_chans 3, drop_path_rate 0.1"),
    ],
    ids=str,
)
def test_what_timm_cannot_give_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        TimmEncoder(**arguments)


@pytest.mark.slow
def test_output_stride_that_a_model_ignores_is_refused(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, output_stride=32, **kwargs: create(*args, **kwargs)
    )
    with pytest.raises(UserError, match="cannot give resnet10t an output_stride of 16"):
        TimmEncoder("resnet10t", output_stride=16)


@pytest.mark.slow
def test_an_undivided_size_is_refused_where_the_backbone_needs_whole_patches():
    encoder = TimmEncoder(SWIN_V2).eval()
    assert encoder.size_divisor == 32
    with pytest.raises(UserError, match=r"multiples of 32, and these have 64x97 pixels"):
        encoder(torch.zeros(1, 3, 64, 97))


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded(monkeypatch):
    """The real download, sent to a port where nobody listens."""
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"weights of resnet18 cannot be loaded.*encoder_weights"):
        TimmEncoder("resnet18", pretrained=True)
    with torch.device("meta"):  # without values there is nothing to download
        TimmEncoder("resnet18", pretrained=True)


@pytest.mark.slow
def test_native_file_rebuilds_the_network(tmp_path, randomize):
    network = randomize(SegFormer(TimmEncoder("test_resnet"), 4, 8)).float().eval()
    file = tmp_path / "network.safetensors"
    export_weights(network, file, "native")
    loaded, _ = load_network(file)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network(images))
    other = SegFormer(TimmEncoder("test_resnet"), 7, 8)
    load_weights(other, file, parts="encoder")
    stems = [one.encoder.backbone.conv1[0].weight for one in (network, other)]
    assert torch.equal(*stems)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of two steps, described by a YAML file."""
    folder = tmp_path_factory.mktemp("timm")
    shapes.generate(folder / "shapes", {"train": 8, "validation": 2})
    file = folder / "timm.yaml"
    file.write_text(
        f"""
trainer:
  accelerator: cpu
  max_steps: 2
  val_check_interval: 2
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {folder / "runs"}, name: timm}}
model:
  network:
    class_path: segformer_pl.models.SegFormer
    init_args:
      encoder:
        class_path: segformer_pl.models.TimmEncoder
        init_args: {{name: test_resnet, drop_path_rate: 0.1}}
      decoder_dim: 16
  warmup_steps: 0
  layer_decay: 0.9
data:
  path: {folder / "shapes"}
  batch_size: 2
  num_workers: 0
"""
    )
    main(["fit", "--config", str(file)])
    return folder


@pytest.mark.slow
def test_fit_and_every_command_on_its_checkpoint(run, tmp_path, monkeypatch):
    folder = run / "runs" / "timm" / "version_0"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    network, _ = load_network(checkpoint)
    assert network.encoder.init_args()["drop_path_rate"] == 0.1
    assert (folder / "report.html").is_file()
    cli = main(["validate", "--config", str(run / "timm.yaml"), "--ckpt_path", str(checkpoint)])
    assert cli.trainer.callback_metrics["val/loss"] > 0
    monkeypatch.setattr(importlib.import_module("segformer_pl.commands.erf"), "DPI", 30)
    arguments = ["--num_images", "2", "--device", "cpu", "--output", str(tmp_path / "erf")]
    main(["erf", "--ckpt", str(checkpoint), *arguments])
    assert (tmp_path / "erf" / "erf.json").is_file()
