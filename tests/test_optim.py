import hashlib
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from segformer_pl import models
from segformer_pl.errors import UserError
from segformer_pl.models import segformer_b0
from segformer_pl.optim import (
    build_optimizer,
    check_settings,
    parameter_groups,
    poly_factor,
    poly_with_warmup,
)


def groups_of(network, **settings):
    defaults = {"lr": 6e-5, "weight_decay": 0.01, "head_lr_mult": 10.0}
    groups = parameter_groups(network, **defaults | settings)
    return {group["name"]: group for group in groups}


class Hinted(nn.Module):
    """A network with the given layer ids and names without weight decay."""

    def __init__(self, layers, undecayed=(), **modules):
        super().__init__()
        self.layers, self.undecayed = layers, set(undecayed)
        for name, module in modules.items():
            self.add_module(name, module)

    def layer_ids(self):
        return self.layers

    def no_weight_decay(self):
        return self.undecayed


def names_in(network, group):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize(
    ("arguments", "num_tensors"),
    [
        # Norms of B0, each with weight and bias: 4 of patch embeddings, 6 of spatial reductions,
        # 16 of blocks, 4 of stages.
        ({}, {"encoder": 116, "encoder_no_decay": 60, "head": 13}),
        # Without depthwise convolutions (2 tensors in each of 8 blocks), with four position tables.
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

    # The reference groups by name: "head" first, then "norm" or a position table.
    expected = {"encoder": [], "encoder_no_decay": [], "head": []}
    for name, _ in network.named_parameters():
        if name.startswith("head."):
            expected["head"].append(name)
        elif "norm" in name or "pos_embed" in name:
            expected["encoder_no_decay"].append(name)
        else:
            expected["encoder"].append(name)
    for name, group in groups.items():
        assert sorted(names_in(network, group)) == sorted(expected[name])  # each exactly once


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
def test_learning_rate_equals_the_reference(step, lr):
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
    """Warm-up to the full rate, then decay over the remaining steps, to 0 in the last step."""
    factor = poly_factor(step, 160_000, 1500, schedule="mmseg1")
    assert 6e-5 * factor == pytest.approx(lr, rel=2e-6)


def test_mmsegmentation_1_without_warm_up_and_with_a_power():
    assert poly_factor(0, 101, 0, schedule="mmseg1") == 1.0
    assert poly_factor(25, 101, 0, power=2.0, schedule="mmseg1") == pytest.approx(0.5625)
    assert poly_factor(0, 10, 1, schedule="mmseg1") == pytest.approx(1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule='cosine': choose one of paper, mmseg1"):
        poly_factor(0, 10, 1, schedule="cosine")


def test_layer_decay_decreases_from_block_to_block():
    with torch.device("meta"):
        network = segformer_b0(19)
    groups = groups_of(network, lr=1.0, layer_decay=0.5)
    assert list(groups) == [
        *(f"encoder_{n:02d}{suffix}" for n in range(8) for suffix in ("", "_no_decay")),
        "head",
    ]
    for number in range(8):
        for suffix, decay in (("", 0.01), ("_no_decay", 0.0)):
            group = groups[f"encoder_{number:02d}{suffix}"]
            assert (group["lr"], group["weight_decay"]) == (0.5 ** (7 - number), decay)
    assert groups["head"]["lr"] == 10.0
    # The layers of stage 2: the first has its patch embedding, the last its norm.
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
    groups = groups_of(network, layer_decay=0.5)
    encoder = [
        name
        for key, group in groups.items()
        if key.startswith("encoder_")
        for name in names_in(network, group)
    ]
    assert sorted(encoder) == sorted(f"encoder.{n}" for n, _ in network.encoder.named_parameters())
    for stage in range(4):
        first_block = groups[f"encoder_{2 * stage:02d}_no_decay"]
        assert f"encoder.stages.{stage}.pos_embed" in names_in(network, first_block)


# SHA-256 of the groups' names, learning rates, decays and parameter order in version 0.1 of the
# package, which the optimiser state of its checkpoints depends on.
STORED_ORDER = {
    "b0 mix_ffn 1.0": "2834ce96da2c7a66",
    "b0 mix_ffn 0.9": "aeaa9acbe6adb282",
    "b0 learned 1.0": "566674a939413aea",
    "b0 learned 0.9": "1fffb4b9b7f935a2",
    "b1 mix_ffn 1.0": "2834ce96da2c7a66",
    "b1 mix_ffn 0.9": "aeaa9acbe6adb282",
    "b1 learned 1.0": "566674a939413aea",
    "b1 learned 0.9": "1fffb4b9b7f935a2",
    "b2 mix_ffn 1.0": "03633af6fdd74c47",
    "b2 mix_ffn 0.9": "64b812914f6b2a18",
    "b2 learned 1.0": "42f10cf0bdeddaa7",
    "b2 learned 0.9": "80ec7aa1413943d4",
    "b3 mix_ffn 1.0": "ef865251abc0a14e",
    "b3 mix_ffn 0.9": "3a8fedaef7e53778",
    "b3 learned 1.0": "c992fa4e64425950",
    "b3 learned 0.9": "837f9a00da5d3504",
    "b4 mix_ffn 1.0": "4c44227df1a3e140",
    "b4 mix_ffn 0.9": "fd56542cb81710b9",
    "b4 learned 1.0": "711cd80deb81ce5a",
    "b4 learned 0.9": "6166e3d72ba13b9e",
    "b5 mix_ffn 1.0": "7a75038938d7773a",
    "b5 mix_ffn 0.9": "1a708e8faa4e83f1",
    "b5 learned 1.0": "1b3ee717a305deb8",
    "b5 learned 0.9": "6aae62d0226146aa",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STORED_ORDER)
def test_groups_equal_those_of_version_0_1(case):
    variant, pos_encoding, layer_decay = case.split()
    tables = {"image_size": 64} if pos_encoding == "learned" else {}
    with torch.device("meta"):
        build = getattr(models, f"segformer_{variant}")
        network = build(19, pos_encoding=pos_encoding, **tables)
    groups = parameter_groups(network, 6e-5, 0.01, 10.0, float(layer_decay))
    content = [[g["name"], g["lr"], g["weight_decay"], names_in(network, g)] for g in groups]
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] == STORED_ORDER[case]


def test_groups_follow_the_network_and_empty_ones_are_left_out():
    network = Hinted(
        {"stem.weight": 0, "stem.bias": 0, "top.weight": 2},
        {"stem.bias", "top.bias"},
        stem=nn.Linear(2, 2),
        top=nn.Linear(2, 2),
    )
    named = {key: names_in(network, group) for key, group in groups_of(network).items()}
    assert named == {
        "encoder": ["stem.weight", "top.weight"],
        "encoder_no_decay": ["stem.bias"],
        "head_no_decay": ["top.bias"],
    }
    groups = groups_of(network, lr=1.0, layer_decay=0.5)
    assert {key: (g["lr"], g["weight_decay"]) for key, g in groups.items()} == {
        "encoder_00": (0.25, 0.01),  # depth 1 has no parameters but counts as a layer
        "encoder_00_no_decay": (0.25, 0.0),
        "encoder_02": (1.0, 0.01),
        "head_no_decay": (10.0, 0.0),
    }
    # Without layer ids all parameters are the head.
    assert list(groups_of(Hinted({}, only=nn.Linear(2, 2)))) == ["head"]


def test_layer_decay_needs_several_layers():
    for layers, count in (({}, 0), ({"only.weight": 0, "only.bias": 0}, 1)):
        network = Hinted(layers, only=nn.Linear(2, 2))
        with pytest.raises(ValueError, match=f"but Hinted has {count}: leave it at 1"):
            groups_of(network, layer_decay=0.9)
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            groups_of(network, layer_decay=wrong)


def test_names_of_missing_parameters_are_refused():
    for arguments in (({"onyl.weight": 0},), ({}, {"onyl.weight"})):
        with pytest.raises(ValueError, match=r"Hinted has no parameter 'onyl\.weight'"):
            groups_of(Hinted(*arguments, only=nn.Linear(2, 2)))
    # Encoder parameters without a layer would be trained at the head's learning rate.
    network = segformer_b0(2)
    network.encoder.register_module("last", nn.LayerNorm(4))
    for layer_decay in (0.9, 1.0):
        with pytest.raises(ValueError, match=r"leaves out 2 parameters, such as last\.bias"):
            groups_of(network, layer_decay=layer_decay)


def test_scheduler_keeps_the_ratio_of_the_groups():
    network = Hinted(
        {"encoder.weight": 0, "encoder.bias": 0},
        {"encoder.bias"},
        encoder=nn.Linear(2, 2),
        head=nn.Linear(2, 2),
    )
    optimizer = torch.optim.AdamW(parameter_groups(network, 6e-5, 0.01, head_lr_mult=10.0))
    scheduler = poly_with_warmup(optimizer, max_steps=20, warmup_steps=4, power=0.9)
    for step in range(21):
        factor = poly_factor(step, 20, 4, power=0.9)
        lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert lrs["encoder"] == lrs["encoder_no_decay"] == pytest.approx(6e-5 * factor)
        assert lrs["head"] == pytest.approx(6e-4 * factor)
        optimizer.step()
        scheduler.step()


def rates_of(schedule_of, base_rates, num_steps):
    """Return the learning rates (num_steps, groups) that a scheduler sets."""
    groups = [
        {"name": str(lr), "params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base_rates
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = schedule_of(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def of_mmcv(base, step, max_steps, warmup_steps, power, min_lr):
    """Return the learning rate of mmcv 1's ``PolyLrUpdaterHook`` with a linear warm-up."""
    regular = (base - min_lr) * (1 - step / max_steps) ** power + min_lr
    if step >= warmup_steps:
        return regular
    return regular * (1 - (1 - step / warmup_steps) * (1 - 1e-6))


# (base rates of encoder and head, steps, warm-up steps, power, min_lr); the recipes, shortened
SCHEDULES = {
    "SETR on ADE20K": ((1e-3, 1e-2), 160, 0, 0.9, 1e-4),
    "SETR-PUP on Cityscapes": ((1e-2, 1e-1), 80, 0, 0.9, 1e-4),
    "DeepLabv3+ of mmsegmentation": ((1e-2, 1e-2), 80, 0, 0.9, 1e-4),
    "MaskFormer": ((1e-5, 1e-4), 160, 0, 0.9, 0.0),
    "SeMask": ((1e-4, 1e-4), 80, 15, 1.0, 0.0),
    "a floor with a warm-up": ((1e-3, 1e-2), 60, 20, 0.9, 5e-4),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_rates_of_the_recipes_equal_those_of_mmcv_in_every_group(case):
    bases, max_steps, warmup_steps, power, min_lr = SCHEDULES[case]
    ours = rates_of(
        lambda optimizer: poly_with_warmup(
            optimizer, max_steps, warmup_steps, power, min_lr=min_lr
        ),
        bases,
        max_steps + 1,
    )
    expected = [
        [of_mmcv(base, step, max_steps, warmup_steps, power, min_lr) for base in bases]
        for step in range(max_steps + 1)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert ours[-1].tolist() == pytest.approx([min_lr, min_lr], abs=1e-18)


@pytest.mark.parametrize(("power", "min_lr"), [(0.9, 1e-4), (1.0, 1e-4), (0.9, 0.0), (2.0, 5e-4)])
def test_the_decay_equals_that_of_torch_above_the_floor(power, min_lr):
    """torch's schedule has no floor, so its base rates are the distances to it."""
    from torch.optim.lr_scheduler import PolynomialLR

    bases = (1e-3, 1e-2)
    theirs = rates_of(
        lambda optimizer: PolynomialLR(optimizer, total_iters=50, power=power),
        [base - min_lr for base in bases],
        56,
    )
    ours = rates_of(
        lambda optimizer: poly_with_warmup(optimizer, 50, 0, power, min_lr=min_lr), bases, 56
    )
    torch.testing.assert_close(ours, theirs + min_lr, rtol=1e-9, atol=1e-15)
    # Neither a clipped rate nor a floor that is multiplied in the head is the same.
    clipped = rates_of(lambda optimizer: poly_with_warmup(optimizer, 50, 0, power), bases, 56)
    if min_lr:
        assert not torch.allclose(clipped.clamp(min=min_lr), ours, rtol=1e-3)
        assert not torch.allclose(ours[:, :1] * 10, ours[:, 1:], rtol=1e-3)


def test_a_floor_in_the_schedule_of_mmsegmentation_1():
    ours = rates_of(
        lambda optimizer: poly_with_warmup(optimizer, 11, 1, 1.0, "mmseg1", min_lr=0.1),
        (1.0, 0.1),
        12,
    )
    assert ours[:, 0].tolist() == pytest.approx(
        [1e-6, *(0.9 * (1 - step / 9) + 0.1 for step in range(10)), 0.1]
    )
    assert ours[1:, 1].tolist() == pytest.approx([0.1] * 11)


def test_a_floor_above_the_rate_of_a_group_is_refused():
    network = Hinted({"0.weight": 0, "0.bias": 1}, **{"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})
    for settings, group in (({"lr": 1e-5}, "encoder"), ({"layer_decay": 0.5}, "encoder_00")):
        groups = list(groups_of(network, **{"lr": 1e-4, **settings}).values())
        with pytest.raises(UserError, match=rf"min_lr is 0\.0001.* group {group} begins at"):
            poly_with_warmup(torch.optim.SGD(groups), 10, 0, min_lr=1e-4)
    frozen = [{"name": "head", "params": [nn.Parameter(torch.zeros(1))], "lr": 0.0}]
    assert poly_with_warmup(torch.optim.SGD(frozen), 10, 0).get_last_lr() == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adam", 0.9), "model.optimizer is 'adam'; choose one of adamw, sgd"),
        (("adamw", 0.8), "model.momentum is 0.8, but adamw has no such setting; leave it out"),
        (("adamw", 0.0), "model.momentum is 0.0, but adamw has no such setting"),
        (("sgd", 1.0), "model.momentum is 1.0; give a number below 1"),
        (("sgd", -0.1), "model.momentum is -0.1; give a finite number of at least 0"),
        (("sgd", float("nan")), "model.momentum is nan; give a finite number"),
    ],
)
def test_settings_out_of_range_or_ignored_are_refused(arguments, message):
    check_settings("sgd", 0.0, lr=0.0)
    check_settings("adamw", 0.9, lr=1.0)
    with pytest.raises(UserError) as error:
        check_settings(*arguments)
    assert message in str(error.value)
    with pytest.raises(UserError, match=r"model\.min_lr is inf"):
        check_settings("sgd", 0.9, min_lr=float("inf"))


@pytest.mark.parametrize("is_fused", [True, False])
def test_sgd_follows_its_textbook_rule(is_fused):
    """Velocity v <- 0.9 v + (g + weight decay * w), weight w <- w - lr v."""
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)
    weights = [nn.Parameter(start[:4].clone()), nn.Parameter(start[4:].clone())]
    groups = [
        {"name": "encoder", "params": weights[:1], "lr": 0.1, "weight_decay": 0.5},
        {"name": "head", "params": weights[1:], "lr": 1.0, "weight_decay": 0.0},
    ]
    optimizer = build_optimizer("sgd", groups, momentum=0.9, is_fused=is_fused)
    expected, velocity = start.clone(), torch.zeros(6, dtype=torch.float64)
    rate, decay = torch.tensor([0.1] * 4 + [1.0] * 2), torch.tensor([0.5] * 4 + [0.0] * 2)
    for _ in range(4):
        optimizer.zero_grad()
        sum((weight**3).sum() for weight in weights).backward()
        optimizer.step()
        velocity = 0.9 * velocity + 3 * expected**2 + decay * expected
        expected = expected - rate * velocity
    torch.testing.assert_close(torch.cat([w.detach() for w in weights]), expected)
