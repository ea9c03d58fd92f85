"""SETR: goldens of the authors' code, the paper's sizes, the contract."""

import inspect
import re
from functools import partial

import jsonargparse
import pytest
import torch
from torch.nn import functional as F

from segformer_pl.analysis.complexity import complexity
from segformer_pl.checkpoints import load_network, load_weights
from segformer_pl.checkpoints.conversion import export_weights
from segformer_pl.cli import main
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, predict_classes
from segformer_pl.models import TimmEncoder
from segformer_pl.models.segmenter import check_segmenter
from segformer_pl.models.setr import SETR, setr_mla, setr_naive, setr_pup
from segformer_pl.models.timm_models import on_meta
from segformer_pl.models.vit_encoder import ViTEncoder
from tests.models import golden_fill as golden
from tests.models.counting import executed_gmacs

TINY = "test_vit"  # 6 blocks, 64 channels
VARIANTS = {"naive": setr_naive, "pup": setr_pup, "mla": setr_mla}
STRIDES = {"naive": 16, "pup": 2, "mla": 4}
decoders = pytest.mark.parametrize("decoder", VARIANTS)


def cross_entropy(logits, target, ignore_index):
    """Cross-entropy over labelled pixels, at the size of the target, as in the authors' code."""
    upsampled = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, target, ignore_index=ignore_index)


# Goldens of the authors' code: parameters are filled by their original keys.


def original_key(key, decoder):
    """Return the key of the authors' code for one of ours."""
    part, *path = key.split(".")
    if part == "encoder":
        return ".".join(path)
    if part == "neck":
        kind, level, *rest = path
        if kind == "norms":
            return ".".join(["backbone", f"norm_{level}", *rest])
        suffix = "_1x1" if kind == "projections" else ""
        return ".".join(["backbone.mla", f"mla_p{int(level) + 2}{suffix}", *rest])
    head = "decode_head" if part == "head" else f"auxiliary_head.{path.pop(0)}"
    kind, *rest = path
    if kind == "branches":
        level, conv, layer, name = rest
        return f"{head}.mlahead.head{int(level) + 2}.{3 * int(conv) + int(layer)}.{name}"
    if kind == "convs":
        number, layer, name = rest
        return f"{head}.{('conv', 'syncbn_fc')[int(layer)]}_{number}.{name}"
    if kind == "classifier":
        names = {"mla": {"head": "cls", "aux_heads": "aux"}, "pup": {"head": "conv_4"}}
        return f"{head}.{names.get(decoder, {}).get(part, 'conv_1')}.{rest[0]}"
    return f"{head}.{'.'.join(path)}"  # LayerNorm


def filled(decoder):
    """Return a network of the goldens."""
    build = partial(VARIANTS[decoder], 19, "vit_tiny_patch16_224", 96)
    network = golden.filled(build, partial(original_key, decoder=decoder))
    table = network.encoder.backbone.pos_embed
    # In MLA, row 0 of the original's table belongs to the class token that is left out.
    table.data = golden.fill("backbone.pos_embed", (1, 37, 192))[:, -table.shape[1] :]
    return network


# Sum and probes of the logits at the size of the image; total loss.
GOLDENS = {
    "naive": (381.4798, (-1.64884, 1.00369, 0.24292, 0.66797, -0.30766), 7.120800),
    "pup": (20507.3850, (0.10861, 0.12514, -0.01202, -0.11084, 0.10391), 7.941826),
    "mla": (8224.0955, (-0.17675, 0.14596, -0.03981, -0.17367, 0.47915), 8.198718),
}


@pytest.mark.slow
@decoders
def test_goldens_of_the_authors_code(decoder):
    network, images = filled(decoder), golden.images(96, 96)
    with torch.no_grad():
        logits = network(images)
        loss = network.training_loss(images, golden.labels(96, 96, 19), cross_entropy, 255)
    logits = F.interpolate(logits, size=(96, 96), mode="bilinear")
    total, expected_probes, expected_loss = GOLDENS[decoder]
    assert logits.sum().item() == pytest.approx(total, rel=0, abs=6e-5)
    assert golden.probes(logits) == pytest.approx(expected_probes, rel=0, abs=6e-6)
    assert loss.item() == pytest.approx(expected_loss, rel=0, abs=6e-7)


# (decoder, backbone) -> for 150 classes at 512x512 and for 19 classes at 768x768: parameters with
# auxiliary heads, parameters without, GMACs without. Counted in a build of the authors' modules
# without those that their forward does not use.
SIZES = {
    ("naive", "large"): ((305361496, 304450966, 362.3), (306537548, 305728019, 959.7)),
    ("pup", "large"): ((317922542, 308319894, 417.7), (319064927, 309596947, 1079.3)),
    ("mla", "large"): ((310184086, 310030486, 378.6), (310756883, 310737427, 974.2)),
    ("naive", "base"): ((87382872, 86670486, 107.3), (88231244, 87619859, 295.5)),
    ("pup", "base"): ((97256430, 90015126, 162.1), (98071135, 90964499, 414.0)),
    ("mla", "base"): ((92205462, 92051862, 123.4), (92450579, 92431123, 309.6)),
}


BLOCKS = {
    ("naive", "large"): (9, 14, 19, 23),
    ("pup", "large"): (9, 14, 19, 23),
    ("mla", "large"): (5, 11, 17, 23),
    ("naive", "base"): (2, 5, 8, 11),
    ("pup", "base"): (4, 7, 9, 11),
    ("mla", "base"): (2, 5, 8, 11),
}


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def unused_in_mla(network):
    """Return the class token and its row of the table, which the authors' MLA holds but drops."""
    return 2 * network.encoder.out_channels[0] if network.decoder == "mla" else 0


@pytest.mark.slow
@pytest.mark.parametrize("setting", [0, 1], ids=["ade20k", "cityscapes"])
@pytest.mark.parametrize(("decoder", "size"), SIZES)
def test_parameters_and_macs(decoder, size, setting):
    with_aux, without_aux, gmacs = SIZES[decoder, size][setting]
    num_classes, side = ((150, 512), (19, 768))[setting]
    with on_meta():
        network = VARIANTS[decoder](num_classes, f"vit_{size}_patch16_384", side)
    assert network.encoder.backbone.out_indices == BLOCKS[decoder, size]
    assert len(network.aux_heads) == (3 if decoder == "naive" else 4)
    unused = unused_in_mla(network)
    assert num_parameters(network) + unused == with_aux
    aux_parameters = num_parameters(network.aux_heads)
    assert num_parameters(network) - aux_parameters + unused == without_aux
    assert executed_gmacs(network, (side, side)) == pytest.approx(gmacs, rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "expected"), [("mla", 91467539), ("pup", 97088095), ("naive", 87248204)]
)
def test_parameters_with_19_classes_at_512(decoder, expected):
    with on_meta():
        network = VARIANTS[decoder](19, "vit_base_patch16_384", 512)
    assert num_parameters(network) + unused_in_mla(network) == expected


@decoders
@pytest.mark.parametrize("size", [(32, 48), (80, 16)], ids=str)
def test_rectangles_and_feature_maps(decoder, size):
    network = VARIANTS[decoder](5, TINY, (32, 48), decoder_dim=8).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = network(images)
        maps = network.feature_maps(images)
        assert torch.equal(network.head.classifier(maps["head"]), logits)
    stride = STRIDES[decoder]
    assert logits.shape == (2, 5, size[0] // stride, size[1] // stride)
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4", "head"]
    for name in ("stage1", "stage2", "stage3", "stage4"):
        assert maps[name].shape == (2, 64, size[0] // 16, size[1] // 16)
    assert maps["head"].shape[1] == (16 if decoder == "mla" else 8)


@decoders
@pytest.mark.parametrize("aux_weight", [0.4, 0])
def test_every_parameter_gets_a_gradient_of_its_own_strides(decoder, aux_weight):
    network = VARIANTS[decoder](5, TINY, 32, decoder_dim=8, aux_weight=aux_weight).train()
    for size in ((32, 32), (48, 16)):
        network.zero_grad()
        target = torch.randint(5, (2, *size))
        network.training_loss(torch.randn(2, 3, *size), target, cross_entropy, 255).backward()
        parameters = dict(network.named_parameters())
        assert [n for n, p in parameters.items() if p.grad is None] == []
        # With other strides DistributedDataParallel would copy the gradients in every step.
        assert [n for n, p in parameters.items() if p.grad.stride() != p.stride()] == []


@decoders
def test_auxiliary_heads_belong_to_the_training_loss_alone(decoder):
    network = VARIANTS[decoder](5, TINY, 32, decoder_dim=8).eval()
    plain = VARIANTS[decoder](5, TINY, 32, decoder_dim=8, aux_weight=0).eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("aux_heads.")}
    plain.load_state_dict(state)  # strict
    images, target = torch.randn(1, 3, 32, 32), torch.randint(5, (1, 32, 32))
    seen = []

    def criterion(logits, target, ignore_index):
        assert ignore_index == 7
        seen.append(tuple(logits.shape[2:]))
        return cross_entropy(logits, target, ignore_index)

    with torch.no_grad():
        assert torch.equal(network(images), plain(images))
        total = network.training_loss(images, target, criterion, 7)
        main_loss = plain.training_loss(images, target, cross_entropy, 7)
        torch.testing.assert_close(main_loss, cross_entropy(plain(images), target, 7))
    sizes = {
        "naive": [(2, 2)] * 4,
        "pup": [(16, 16)] + [(8, 8)] * 4,
        "mla": [(8, 8)] + [(2, 2)] * 4,
    }
    assert seen == sizes[decoder]
    # Untrained heads predict nearly uniformly: each costs about ln 5.
    num_aux_heads = len(seen) - 1
    assert total / main_loss == pytest.approx(1 + 0.4 * num_aux_heads, rel=0.2)


@decoders
def test_contract(decoder):
    network = VARIANTS[decoder](5, TINY, 32, decoder_dim=8)
    check_segmenter(network)
    assert network.min_size == 16
    names = {name for name, _ in network.named_parameters()}
    encoder = {name for name in names if name.startswith("encoder.")}
    assert network.encoder_parameters() == encoder
    assert network.no_weight_decay() < encoder
    # In the authors' code only the heads train at ten times the rate, and the neck is none.
    ids = network.layer_ids()
    neck = {name for name in names if name.startswith("neck.")}
    assert ids.keys() == encoder | neck
    assert {ids[name] for name in neck} == ({max(ids.values())} if decoder == "mla" else set())
    paths = [f"{path}." for path in network.parts().values()]
    assert all(sum(name.startswith(path) for path in paths) == 1 for name in names)
    classifiers = [network.get_submodule(path) for path in network.classifier_paths]
    assert len(classifiers) == 1 + len(network.aux_heads)
    assert all(p.shape[0] == 5 for module in classifiers for p in module.parameters())
    rest = {n for n in names if not any(n.startswith(f"{p}.") for p in network.classifier_paths)}
    assert {n for n, p in network.named_parameters() if p.shape[0] == 5} & rest == set()


@pytest.mark.slow
@decoders
def test_native_file_rebuilds_the_network(decoder, tmp_path, randomize):
    network = VARIANTS[decoder](
        5, TINY, (32, 48), out_indices=(1, 4), decoder_dim=8, aux_weight=0.3, in_channels=2
    )
    network = randomize(network).float().eval()
    export_weights(network, tmp_path / "network.safetensors", "native")
    loaded, _ = load_network(tmp_path / "network.safetensors")
    assert loaded.init_args() == network.init_args()
    images, target = torch.rand(1, 2, 32, 32), torch.randint(5, (1, 32, 32))
    with torch.no_grad():
        expected = network.training_loss(images, target, cross_entropy, 255)
        loss = loaded.eval().training_loss(images, target, cross_entropy, 255)
        assert torch.equal(loaded(images), network(images))
    assert loss == expected
    other = VARIANTS[decoder](3, TINY, (32, 48), out_indices=(1, 4), in_channels=2)
    load_weights(other, tmp_path / "network.safetensors", parts="encoder")
    for key, tensor in other.encoder.state_dict().items():
        assert torch.equal(tensor, network.encoder.state_dict()[key])


@pytest.mark.slow
def test_complexity_by_part():
    cost = complexity(setr_mla(5, TINY, 32, out_indices=(0, 1), decoder_dim=8), 32, 48)
    assert [part.name for part in cost.parts] == ["backbone", "neck", "head", "aux_heads"]
    assert sum(part.num_parameters for part in cost.parts) == cost.num_parameters
    assert sum(part.macs for part in cost.parts) == cost.macs
    assert cost.parts[2].output_shape == (1, 5, 8, 12)
    assert cost.paper_macs is None


def test_any_size_by_padding():
    network = setr_pup(5, TINY, 32, decoder_dim=8).eval()
    images = torch.randn(1, 3, 45, 37)
    with pytest.raises(UserError, match=r"these have 45x37 pixels; give such a size .* pad_to 16"):
        network(images)
    labels = predict_classes(network, images, (45, 37), Inference(pad_to=16))
    assert labels.shape == (1, 45, 37)


@pytest.mark.slow
def test_on_the_command_line():
    arguments = [
        "--model.network=segformer_pl.models.setr.setr_mla",
        f"--model.network.backbone={TINY}",
        "--model.network.image_size=[32, 64]",
        "--model.network.out_indices=[1, 4]",
        "--model.network.aux_weight=0.2",
        "--trainer.accelerator=cpu",
        "--data.path=unused",
    ]
    network = main(arguments, run=False).model.network
    assert network.encoder.image_size == (32, 64)
    assert network.encoder.backbone.out_indices == (1, 4)
    assert network.decoder == "mla"
    assert network.aux_weight == 0.2
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(setr_mla, "network")
    options = re.findall(r"^  --network\.(\w+)", parser.format_help(), re.MULTILINE)
    own, encoder = (inspect.signature(one).parameters for one in (SETR, ViTEncoder))
    fixed = {"encoder", "name", "decoder", "class_token"}
    assert set(options) == (own.keys() | encoder.keys() | {"backbone"}) - fixed
    for wrong in ("aux_weight=much", "class_token=false"):
        with pytest.raises(jsonargparse.ArgumentError, match=wrong.partition("=")[0]):
            parser.parse_args(["--network.num_classes=3", f"--network.{wrong}"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"decoder": "up"}, r"decoder='up': choose one of naive, pup, mla"),
        ({"decoder_dim": 9}, r"decoder_dim=9: give an even number"),
        ({"aux_weight": -0.1}, r"aux_weight=-0.1: give 0 \(no auxiliary heads\) or more"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        SETR(ViTEncoder(TINY, 32), 5, **arguments)


@pytest.mark.slow
def test_encoders_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"one stride, and TimmEncoder has strides 4, 8, 16, 32"):
        SETR(TimmEncoder("test_resnet"), 5)
    with pytest.raises(UserError, match=r"no plain vision transformer but a ResNet"):
        setr_pup(5, "resnet18")
    single = ViTEncoder(TINY, 32, (5,))
    with pytest.raises(UserError, match=r"encoder has a single map; name more out_indices"):
        SETR(single, 5, "naive")
    SETR(single, 5, "naive", aux_weight=0)
