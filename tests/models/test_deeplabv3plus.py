"""DeepLabv3+: published sizes, the contract, odd sizes, batches of one image, experiment files."""

import jsonargparse
import pytest
import torch
from torch import nn

from segformer_pl.checkpoints import load_network
from segformer_pl.checkpoints.conversion import export_weights
from segformer_pl.checkpoints.networks import build
from segformer_pl.cli import main
from segformer_pl.data import shapes
from segformer_pl.errors import UserError
from segformer_pl.losses import CrossEntropy
from segformer_pl.models import Segmenter, TimmEncoder, mit_b0
from segformer_pl.models.deeplabv3plus import DeepLabV3Plus, deeplabv3plus, deeplabv3plus_mmseg
from segformer_pl.models.paper_macs import counted_macs
from segformer_pl.models.timm_models import on_meta
from segformer_pl.optim import parameter_groups
from tests.models.counting import executed_gmacs, without_norms

MODULE = "segformer_pl.models.deeplabv3plus"


def small(backbone="test_resnet", output_stride=16, **arguments):
    """Return the paper's network of 5 classes in a small size."""
    return DeepLabV3Plus(TimmEncoder(backbone, output_stride=output_stride), 5, 16, **arguments)


def small_mmseg(backbone="test_resnet", output_stride=8, **arguments):
    """Return mmsegmentation's variant with 5 classes in a small size."""
    return deeplabv3plus_mmseg(5, backbone, output_stride, 16, **arguments)


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


# Sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "arguments", "at_150", "at_19", "gmacs"),
    [
        (deeplabv3plus, ("resnet50", 16), 40_385_334, 40_351_667, 69.8),
        (deeplabv3plus, ("resnet50", 8), 40_385_334, 40_351_667, 183.1),
        (deeplabv3plus, ("resnet101", 16), 59_377_462, 59_343_795, 89.2),
        (deeplabv3plus, ("resnet101", 8), 59_377_462, 59_343_795, 260.7),
        (deeplabv3plus, ("resnet50", 16, 256, None, True), 26_729_286, 26_695_619, 38.2),
        (deeplabv3plus, ("resnet101", 16, 256, None, True), 45_721_414, 45_687_747, 57.6),
        (deeplabv3plus_mmseg, ("resnet50c",), 43_690_748, 43_589_878, 177.3),
        (deeplabv3plus_mmseg, ("resnet101c",), 62_682_876, 62_582_006, 254.8),
    ],
)
def test_parameters_and_multiply_adds(variant, arguments, at_150, at_19, gmacs):
    with on_meta():
        network, other = variant(150, *arguments), variant(19, *arguments)
    assert num_parameters(network) == at_150
    assert num_parameters(other) == at_19
    assert executed_gmacs(network, (512, 512)) == pytest.approx(gmacs, abs=0.051)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "at_150", "at_19"),
    [("resnet50c", 41_292_390, 41_225_187), ("resnet101c", 60_284_518, 60_217_315)],
)
def test_parameters_without_auxiliary_head(backbone, at_150, at_19):
    with on_meta():
        assert num_parameters(deeplabv3plus_mmseg(150, backbone, aux_weight=0)) == at_150
        assert num_parameters(deeplabv3plus_mmseg(19, backbone, aux_weight=0)) == at_19


@pytest.mark.slow
def test_variants_at_513_pixels():
    """CALC of the paper's 101.28 G and 297.92 G, whose backbone has a wider stem."""
    with on_meta():
        networks = [deeplabv3plus(21, "resnet101", stride) for stride in (16, 8)]
    assert [round(executed_gmacs(n, (513, 513)), 1) for n in networks] == [92.8, 267.9]


@pytest.mark.slow
def test_parameters_of_the_parts():
    with on_meta():
        network = deeplabv3plus(19, "resnet50")
    parts = {
        "encoder": network.encoder,
        "branches": network.aspp.branches,
        "pool": network.aspp.pool,
        "project": network.aspp.project,
        "low_level": network.low_level,
        "decoder": network.decoder,
        "classifier": network.classifier,
    }
    assert {name: num_parameters(part) for name, part in parts.items()} == {
        "encoder": 23_508_032,
        "branches": 14_682_112,
        "pool": 524_800,
        "project": 328_192,
        "low_level": 12_384,
        "decoder": 1_291_264,
        "classifier": 4_883,
    }


@pytest.mark.slow
def test_paper_macs_are_those_of_segformers_table_2():
    with on_meta():
        ade20k, cityscapes = deeplabv3plus_mmseg(150), deeplabv3plus_mmseg(19)
    assert round(num_parameters(ade20k) / 1e6, 1) == 62.7
    with without_norms():
        assert round(ade20k.paper_macs(512, 512) / 1e9, 1) == 255.1
        assert round(cityscapes.paper_macs(1024, 2048) / 1e9, 1) == 2032.3


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"separable": True}, {"aux_weight": 0.4}], ids=str)
def test_paper_macs_are_those_of_the_executed_layers(arguments):
    with on_meta():
        network = small(**arguments).eval()
        counted = counted_macs(network, lambda: network(torch.empty(1, 3, 65, 97)))
        assert network.paper_macs(65, 97) == counted
        attention = DeepLabV3Plus(mit_b0(), 5, 16, (1, 2, 3))
        assert attention.paper_macs(64, 64) == counted_of_parts(attention)


def counted_of_parts(network):
    """Count encoder and head apart, as the rules for MiT differ from those for convolutions."""
    network.eval()
    maps = network.encoder(torch.empty(1, 3, 64, 64))
    of_head = counted_macs(network, lambda: network.classify(maps))
    return network.encoder.paper_macs(64, 64) + of_head


# The contract


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "low", "last"),
    [
        ((65, 97), (17, 25), (5, 7)),
        ((133, 101), (34, 26), (9, 7)),
        ((513, 513), (129, 129), (33, 33)),
    ],
)
def test_sizes_that_the_stride_does_not_divide(size, low, last):
    network = small().eval()
    assert network.min_size == 16
    with torch.no_grad():
        maps = network.feature_maps(torch.zeros(1, 3, *size))
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4", "aspp", "head"]
    assert maps["stage4"].shape[2:] == maps["aspp"].shape[2:]
    assert tuple(maps["aspp"].shape) == (1, 16, *last)
    assert tuple(maps["head"].shape) == (1, 16, *low)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [small, small_mmseg])
def test_logits_are_computed_from_the_feature_maps(randomize, variant):
    network = randomize(variant()).eval()
    image = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        head = network.feature_maps(image)["head"]
        logits = network(image)
        torch.testing.assert_close(network.classifier(head), logits, rtol=0, atol=0)
    assert logits.shape == (2, 5, 17, 25)


@pytest.mark.slow
def test_map_of_stride_4_need_not_be_the_first():
    encoder = TimmEncoder("test_resnet", out_indices=(0, 1, 4), output_stride=16)
    assert encoder.out_strides == (2, 4, 16)
    with torch.no_grad():
        assert DeepLabV3Plus(encoder, 5, 16).eval()(torch.zeros(1, 3, 64, 96)).shape[2:] == (16, 24)


@pytest.mark.slow
def test_output_strides_share_their_weights(randomize):
    fine, coarse = randomize(small(output_stride=8)).eval(), small(output_stride=16).double().eval()
    coarse.load_state_dict(fine.state_dict())
    assert fine.aspp.rates == (12, 24, 36)
    assert coarse.aspp.rates == (6, 12, 18)
    assert fine.min_size == 8
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        maps = [network.feature_maps(image) for network in (fine, coarse)]
    assert [m["aspp"].shape[-1] for m in maps] == [8, 4]
    torch.testing.assert_close(maps[0]["stage2"], maps[1]["stage2"])
    assert maps[0]["head"].shape == maps[1]["head"].shape


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("variant", [small, small_mmseg])
def test_every_parameter_gets_a_gradient(variant, backbone):
    network = variant(backbone=backbone, output_stride=16).train()
    target = torch.randint(5, (2, 65, 97))
    network.training_loss(torch.randn(2, 3, 65, 97), target, CrossEntropy(), 255).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    # With other strides DistributedDataParallel would copy the gradients in every step.
    assert [n for n, p in network.named_parameters() if p.grad.stride() != p.stride()] == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", [small, small_mmseg])
def test_every_parameter_changes_the_loss(randomize, variant):
    network = randomize(variant()).eval()
    image = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    target = torch.randint(5, (2, 65, 97))
    network.training_loss(image, target, CrossEntropy(), 255).backward()
    assert [name for name, p in network.named_parameters() if not p.grad.any()] == []


@pytest.mark.slow
def test_auxiliary_loss():
    network = small_mmseg(aux_weight=0.25).eval()
    image, target = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    seen = []

    def criterion(logits, target, ignore_index):
        seen.append((tuple(logits.shape), ignore_index))
        return torch.tensor(float(10 ** len(seen)))

    assert network.training_loss(image, target, criterion, 7) == 10 + 0.25 * 100
    assert seen == [((2, 5, 16, 16), 7), ((2, 5, 8, 8), 7)]
    assert network.classifier_paths == ("classifier", "aux_head.classifier")
    plain = small()
    assert plain.training_loss(image, target, criterion, 7) == 1000
    assert plain.classifier_paths == ("classifier",)
    assert plain.aux_head is None


@pytest.mark.slow
def test_dropouts_are_where_their_papers_have_them():
    """The paper's is after ASPP and elementwise, mmsegmentation's before both classifiers."""
    image = torch.ones(2, 3, 64, 64)
    network = small()
    network.aspp.dropout.p = 1.0
    network.train()
    assert not network.feature_maps(image)["aspp"].any()
    mmseg = small_mmseg()
    assert (mmseg.aspp.dropout.p, mmseg.dropout.p, mmseg.aux_head.dropout.p) == (0.0, 0.1, 0.1)
    assert small().dropout.p == 0
    mmseg.dropout.p = mmseg.aux_head.dropout.p = 1.0
    mmseg.train()
    features = mmseg.encoder(image)
    for logits, head in ((mmseg.classify(features), mmseg), (mmseg.aux_head(features[-2]),) * 2):
        bias = getattr(head, "classifier", mmseg.aux_head.classifier).bias
        torch.testing.assert_close(logits, bias[None, :, None, None].expand_as(logits))


@pytest.mark.slow
def test_parts_layers_and_weight_decay():
    network = small_mmseg()
    parts = network.parts()
    assert list(parts)[-5:] == ["aspp", "low_level", "decoder", "classifier", "aux_head"]
    assert list(small().parts())[-4:] == ["aspp", "low_level", "decoder", "classifier"]
    counts = [num_parameters(network.get_submodule(path)) for path in parts.values()]
    assert sum(counts) == num_parameters(network)
    encoder = {name for name, _ in network.named_parameters() if name.startswith("encoder.")}
    assert network.layer_ids().keys() == encoder
    groups = {group["name"]: group for group in parameter_groups(network, 1.0, 0.01, 10.0)}
    assert set(groups) == {"encoder", "encoder_no_decay", "head"}
    assert groups["head"]["lr"] == 10.0
    assert groups["head"]["weight_decay"] == 0.01


EVERY_ARGUMENT = {
    "decoder_dim": 8,
    "atrous_rates": (1, 5),
    "separable": True,
    "projection_kernel": 3,
    "low_channels": 6,
    "num_convs": 3,
    "aspp_dropout": 0.2,
    "dropout": 0.3,
    "aux_weight": 0.5,
}


@pytest.mark.slow
def test_arguments_rebuild_the_network(randomize, tmp_path):
    encoder = TimmEncoder("test_resnet", out_indices=(1, 3, 4), output_stride=16)
    network = DeepLabV3Plus(encoder, 4, **EVERY_ARGUMENT)
    arguments = network.init_args()
    assert {key: arguments[key] for key in EVERY_ARGUMENT} == EVERY_ARGUMENT
    network = randomize(network).float().eval()
    again = build(network.spec(), "network")
    assert again.spec() == network.spec()
    file = tmp_path / "network.safetensors"
    export_weights(network, file, "native")
    loaded, _ = load_network(file)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image), network(image), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "arguments", "sentence"),
    [
        ({}, {}, r"last map has stride 32, .* give the encoder an output_stride of 16 or 8"),
        (
            {"out_indices": (2, 4)},
            {},
            r"a map of stride 4 .* strides 8, 16; choose another encoder",
        ),
        ({"out_indices": (1, 4)}, {"aux_weight": 0.4}, r"strides 4, 16; choose .* or aux_weight 0"),
        ({}, {"atrous_rates": (6, 0)}, r"atrous_rates=\(6, 0\): give one or more rates of at le"),
        ({}, {"atrous_rates": ()}, r"atrous_rates=\(\): give one or more rates"),
        ({}, {"num_convs": 0}, r"num_convs=0: give the decoder at least 1 convolution"),
        ({}, {"aux_weight": -1.0}, r"aux_weight=-1.0: give 0 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(encoder, arguments, sentence):
    stride = None if "stride 32" in sentence else 16
    with on_meta():
        encoder = TimmEncoder("test_resnet", output_stride=stride, **encoder)
        with pytest.raises(UserError, match=sentence):
            DeepLabV3Plus(encoder, 5, 16, **arguments)


@pytest.mark.slow
def test_backbone_that_timm_cannot_dilate_is_refused():
    with pytest.raises(UserError, match=r"cannot give pvt_v2_b0 an output_stride of 16"):
        deeplabv3plus(5, "pvt_v2_b0")


@pytest.mark.slow
def test_any_encoder_with_given_rates():
    network = DeepLabV3Plus(mit_b0(), 5, 8, (1, 2), aux_weight=0.4).train()
    target = torch.randint(5, (2, 64, 64))
    network.training_loss(torch.randn(2, 3, 64, 64), target, CrossEntropy(), 255).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


# A batch of one image


@pytest.mark.slow
def test_one_image_can_be_evaluated_but_not_trained():
    network = small()
    image = torch.randn(1, 3, 64, 64)
    sentence = r"batch of 1 image, .* give data.batch_size 2 or more, or trainer.sync_batchnorm"
    with pytest.raises(UserError, match=sentence):
        network.train()(image)
    # On a single device synchronised BatchNorm has no other values either.
    with pytest.raises(UserError, match=sentence):
        nn.SyncBatchNorm.convert_sync_batchnorm(network)(image)
    assert network.eval()(image).shape == (1, 5, 16, 16)
    network = small().train()
    network(image.expand(2, -1, -1, -1))
    network.aspp.pool.eval()  # frozen statistics
    network(image)


@pytest.mark.slow
def test_one_image_on_each_of_several_devices_is_left_to_torch(monkeypatch):
    """Synchronised BatchNorm normalises over all devices, and reports its own errors."""
    network = small().train()
    image = torch.randn(1, 3, 64, 64)
    norm = network.aspp.pool[2]
    monkeypatch.setattr(norm, "forward", lambda pooled: pooled - 0.1)  # values of all devices
    network(image)

    def refuse(pooled):
        raise ValueError("SyncBatchNorm expected input tensor to be on GPU")

    monkeypatch.setattr(norm, "forward", refuse)
    with pytest.raises(ValueError, match="to be on GPU"):
        network(image)


# The command line


@pytest.mark.parametrize("variant", ["deeplabv3plus", "deeplabv3plus_mmseg"])
@pytest.mark.slow
def test_variants_in_an_experiment_file(variant):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Segmenter, "network")
    init_args = {
        "num_classes": 5,
        "backbone": "test_resnet",
        "decoder_dim": 8,
        "output_stride": 8,
        "drop_path_rate": 0.1,
    }
    spec = {"class_path": f"{MODULE}.{variant}", "init_args": init_args}
    config = parser.parse_object({"network": spec})
    with on_meta():
        network = parser.instantiate(config).network
    assert network.encoder.init_args()["drop_path_rate"] == 0.1
    assert network.encoder.out_strides == (4, 8, 8, 8)
    assert (network.aux_head is None) == (variant == "deeplabv3plus")
    spec["init_args"] = init_args | {"output_strides": 8}
    with pytest.raises(jsonargparse.ArgumentError, match="output_strides"):
        parser.parse_object({"network": spec})


@pytest.mark.slow
def test_fit_and_load(tmp_path):
    shapes.generate(tmp_path / "shapes", {"train": 8, "validation": 2})
    file = tmp_path / "deeplab.yaml"
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
    init_args: {{save_dir: {tmp_path / "runs"}, name: deeplab}}
model:
  network:
    class_path: {MODULE}.deeplabv3plus_mmseg
    init_args: {{backbone: test_resnet, decoder_dim: 16}}
  warmup_steps: 0
data:
  path: {tmp_path / "shapes"}
  batch_size: 2
  num_workers: 0
"""
    )
    cli = main(["fit", "--config", str(file)])
    assert cli.trainer.callback_metrics["val/loss"] > 0
    run = tmp_path / "runs" / "deeplab" / "version_0"
    network, _ = load_network(run / "checkpoints" / "last.ckpt")
    assert network.init_args() == cli.model.network.init_args()
    assert network.aux_weight == 0.4
