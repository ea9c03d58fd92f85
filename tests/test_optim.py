from itertools import pairwise

import pytest
import torch

from segformer_pl.models import segformer_b0
from segformer_pl.optim import layers, parameter_groups, poly_factor, poly_with_warmup


def groups_of(network):
    groups = parameter_groups(
        network, network.encoder, lr=6e-5, weight_decay=0.01, head_lr_mult=10.0
    )
    return {group["name"]: group for group in groups}


def names_in(network, group):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize(
    ("arguments", "num_tensors"),
    [
        # Norms of B0: 4 patch, 6 reduction, 16 block, 4 stage; a weight and a bias each.
        ({}, {"encoder": 116, "encoder_no_decay": 60, "head": 13}),
        # No depthwise convolutions (2 tensors in each of 8 blocks), but four tables.
        (
            {"pos_encoding": "learned", "image_size": 64},
            {"encoder": 100, "encoder_no_decay": 64, "head": 13},
        ),
        ({"pos_encoding": "none"}, {"encoder": 100, "encoder_no_decay": 60, "head": 13}),
        ({"in_indices": (3,)}, {"encoder": 116, "encoder_no_decay": 60, "head": 6}),
    ],
    ids=str,
)
def test_groups(arguments, num_tensors):
    with torch.device("meta"):
        network = segformer_b0(19, **arguments)
    groups = groups_of(network)
    assert {name: len(group["params"]) for name, group in groups.items()} == num_tensors

    # The reference tells them apart by name: "head" first, then "norm" or a position table.
    expected = {"encoder": [], "encoder_no_decay": [], "head": []}
    for name, _ in network.named_parameters():
        if name.startswith("head."):
            expected["head"].append(name)
        elif "norm" in name or "pos_embed" in name:
            expected["encoder_no_decay"].append(name)
        else:
            expected["encoder"].append(name)
    for name, group in groups.items():
        assert sorted(names_in(network, group)) == sorted(expected[name])  # and none twice


def test_settings_of_the_groups():
    with torch.device("meta"):
        network = segformer_b0(19)
    groups = groups_of(network)
    settings = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert settings == {
        "encoder": (6e-5, 0.01),
        "encoder_no_decay": (6e-5, 0.0),
        "head": (pytest.approx(6e-4), 0.01),
    }
    decayed = names_in(network, groups["encoder"])
    assert {"stages.0.blocks.0.attn.q.bias", "stages.3.blocks.1.mlp.dwconv.bias"} <= {
        name.removeprefix("encoder.") for name in decayed
    }
    assert {"head.bn.weight", "head.bn.bias"} <= set(names_in(network, groups["head"]))


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 6.0e-11),
        (750, 2.98594e-5),
        (1499, 5.939825e-5),
        (1500, 5.94375e-5),
        (16_000, 5.4e-5),
        (80_000, 3.0e-5),
        (159_999, 3.75e-10),
        (160_000, 0.0),
        (170_000, 0.0),
    ],
)
def test_learning_rate_of_the_reference(step, lr):
    assert 6e-5 * poly_factor(step, 160_000, 1500) == pytest.approx(lr, rel=2e-6)


def test_learning_rate_of_other_schedules():
    assert poly_factor(0, 100, 0) == 1.0
    assert poly_factor(25, 100, 0, power=2.0) == pytest.approx(0.5625)
    factors = [poly_factor(step, 100, 10) for step in range(101)]
    assert all(earlier < later for earlier, later in pairwise(factors[:11]))
    assert all(earlier > later for earlier, later in pairwise(factors[10:]))


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 6e-11), (1499, 6e-5), (1500, 6e-5), (16_000, 5.4511e-5), (159_999, 0.0), (160_000, 0.0)],
)
def test_learning_rate_of_mmsegmentation_1(step, lr):
    """Warms up to the full rate, then decays over what is left, to 0 in the last step."""
    factor = poly_factor(step, 160_000, 1500, schedule="mmseg1")
    assert 6e-5 * factor == pytest.approx(lr, rel=2e-6)


def test_mmsegmentation_1_without_warm_up_and_with_a_power():
    assert poly_factor(0, 101, 0, schedule="mmseg1") == 1.0
    assert poly_factor(25, 101, 0, power=2.0, schedule="mmseg1") == pytest.approx(0.5625)
    assert poly_factor(0, 10, 1, schedule="mmseg1") == pytest.approx(1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule='cosine': choose one of paper, mmseg1"):
        poly_factor(0, 10, 1, schedule="cosine")


def test_layer_decay_falls_from_block_to_block():
    with torch.device("meta"):
        network = segformer_b0(19)
    groups = {
        group["name"]: group
        for group in parameter_groups(network, network.encoder, 1.0, 0.01, 10.0, layer_decay=0.5)
    }
    assert list(groups) == [
        *(f"encoder_{n:02d}{suffix}" for n in range(8) for suffix in ("", "_no_decay")),
        "head",
    ]
    for number in range(8):
        for suffix, decay in (("", 0.01), ("_no_decay", 0.0)):
            group = groups[f"encoder_{number:02d}{suffix}"]
            assert (group["lr"], group["weight_decay"]) == (0.5 ** (7 - number), decay)
    assert groups["head"]["lr"] == 10.0
    # Stage 2 begins with its patch embedding and ends with its norm.
    third, fourth = (
        [
            *names_in(network, groups[f"encoder_{n:02d}"]),
            *names_in(network, groups[f"encoder_{n:02d}_no_decay"]),
        ]
        for n in (2, 3)
    )
    assert "encoder.stages.1.patch_embed.proj.weight" in third
    assert "encoder.stages.1.blocks.0.attn.q.weight" in third
    assert "encoder.stages.1.norm.weight" in fourth
    together = [name for group in groups.values() for name in names_in(network, group)]
    assert sorted(together) == sorted(name for name, _ in network.named_parameters())


def test_layer_decay_with_position_tables():
    with torch.device("meta"):
        network = segformer_b0(19, pos_encoding="learned", image_size=64)
    found = [len(parameters) for parameters in layers(network.encoder)]
    assert sum(found) == len(list(network.encoder.parameters()))


def test_layer_decay_is_refused_where_there_are_no_layers():
    encoder = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="Conv2d has 2 parameters elsewhere: leave it at 1"):
        parameter_groups(encoder, encoder, 1.0, 0.01, 10.0, layer_decay=0.9)
    # One that has some outside: they would be in no group, and never trained.
    partly = segformer_b0(2).encoder
    partly.register_module("last", torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match="MixTransformer has 2 parameters elsewhere"):
        layers(partly)
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            parameter_groups(encoder, encoder, 1.0, 0.01, 10.0, layer_decay=wrong)


def test_scheduler_keeps_the_ratio_of_the_groups():
    network = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    groups = parameter_groups(network, network["encoder"], 6e-5, 0.01, head_lr_mult=10.0)
    optimizer = torch.optim.AdamW(groups)
    scheduler = poly_with_warmup(optimizer, max_steps=20, warmup_steps=4, power=0.9)
    for step in range(21):
        factor = poly_factor(step, 20, 4, power=0.9)
        lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert lrs["encoder"] == lrs["encoder_no_decay"] == pytest.approx(6e-5 * factor)
        assert lrs["head"] == pytest.approx(6e-4 * factor)
        optimizer.step()
        scheduler.step()
