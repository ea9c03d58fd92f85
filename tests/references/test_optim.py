"""Comparison of learning rates and parameter groups with mmengine."""

import pytest
import torch
from torch import nn

from segformer_pl.checkpoints.layouts import detect, to_canonical
from segformer_pl.models import segformer_b0
from segformer_pl.optim import parameter_groups, poly_factor, poly_with_warmup

LR, WEIGHT_DECAY = 6e-5, 0.01
# From the SegFormer configurations of NVlabs and mmsegmentation
PARAMWISE = {
    "custom_keys": {
        "pos_block": {"decay_mult": 0.0},
        "norm": {"decay_mult": 0.0},
        "head": {"lr_mult": 10.0},
    }
}


def rates_of(make_schedulers, num_steps):
    """Return the learning rate of every step under mmengine's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    schedulers = make_schedulers(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1600, 15), (3000, 1500), (200, 2)])
def test_schedule_of_mmsegmentation_1(mmseg, max_steps, warmup_steps):
    from mmengine.optim import LinearLR, PolyLR

    def schedulers(optimizer):
        warm_up = {"start_factor": 1e-6, "by_epoch": False, "begin": 0, "end": warmup_steps}
        decay = {"eta_min": 0.0, "power": 1.0, "begin": warmup_steps, "end": max_steps}
        return [LinearLR(optimizer, **warm_up), PolyLR(optimizer, **decay, by_epoch=False)]

    expected = rates_of(schedulers, max_steps)
    ours = [
        LR * poly_factor(step, max_steps, warmup_steps, schedule="mmseg1")
        for step in range(max_steps)
    ]
    assert ours == pytest.approx(expected, rel=1e-10, abs=1e-18)
    paper = [LR * poly_factor(step, max_steps, warmup_steps) for step in range(max_steps)]
    assert paper != pytest.approx(expected, rel=1e-4, abs=1e-18)
    shifted = [*ours[1:], 0.0]
    assert shifted != pytest.approx(expected, rel=1e-4, abs=1e-18)


def test_a_floor_is_the_same_in_every_group(mmseg):
    """Multipliers of the learning rate do not multiply ``eta_min``."""
    from mmengine.optim import PolyLR

    def groups():
        return [
            {"name": name, "params": [nn.Parameter(torch.zeros(1))], "lr": lr}
            for name, lr in (("encoder", 1e-3), ("head", 1e-2))
        ]

    def rates(optimizer, scheduler):
        found = []
        for _ in range(101):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return torch.tensor(found, dtype=torch.float64)

    theirs, ours = torch.optim.SGD(groups()), torch.optim.SGD(groups())
    # As below, mmcv 1 counts one step further.
    poly = PolyLR(theirs, eta_min=1e-4, power=0.9, begin=0, end=101, by_epoch=False)
    found = rates(ours, poly_with_warmup(ours, 100, 0, 0.9, min_lr=1e-4))
    torch.testing.assert_close(found, rates(theirs, poly), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1600, 15), (3000, 1500)])
def test_schedule_of_the_paper(mmseg, max_steps, warmup_steps):
    """mmcv 1 multiplies decay and warm-up; mmengine multiplies schedulers that overlap.

    Both end one step later than in mmengine's configurations, because mmcv 1 counts that far.
    """
    from mmengine.optim import LinearLR, PolyLR

    def schedulers(optimizer):
        warm_up = {"start_factor": 1e-6, "by_epoch": False, "begin": 0, "end": warmup_steps + 1}
        decay = {"eta_min": 0.0, "power": 1.0, "begin": 0, "end": max_steps + 1}
        return [PolyLR(optimizer, **decay, by_epoch=False), LinearLR(optimizer, **warm_up)]

    expected = rates_of(schedulers, max_steps)
    ours = [LR * poly_factor(step, max_steps, warmup_steps) for step in range(max_steps)]
    assert ours == pytest.approx(expected, rel=1e-9)
    later = [LR * poly_factor(step, max_steps, warmup_steps + 1) for step in range(max_steps)]
    assert later != pytest.approx(expected, rel=1e-4)


def their_settings(model):
    """Return name -> (learning rate, weight decay) of mmengine's optimiser constructor."""
    from mmengine.optim import build_optim_wrapper

    wrapper = build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": WEIGHT_DECAY},
            "paramwise_cfg": PARAMWISE,
        },
    )
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in wrapper.param_groups
        for parameter in group["params"]
    }
    return {name: settings[id(parameter)] for name, parameter in model.named_parameters()}


def our_settings(network, head_lr_mult=10.0):
    """Return name -> (learning rate, weight decay) of :func:`parameter_groups`."""
    groups = parameter_groups(network, lr=LR, weight_decay=WEIGHT_DECAY, head_lr_mult=head_lr_mult)
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    return {name: settings[id(parameter)] for name, parameter in network.named_parameters()}


def differing(ours, theirs):
    """Return the names of the parameters whose settings differ."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if ours[name] != pytest.approx(theirs[name], rel=1e-12)]


def test_groups_of_our_network(mmseg):
    """mmengine groups by name, ours by module. Our names contain the same words, so both agree."""
    network = segformer_b0(19)
    theirs = their_settings(network)
    assert differing(our_settings(network), theirs) == []
    heads = differing(our_settings(network, head_lr_mult=1.0), theirs)
    assert heads == [name for name in theirs if name.startswith("head.")]


def by_part(settings, parameters):
    """Return learning rates and weight decays by the key names that all layouts share.

    Fill a tensor of the shape of each parameter with the value and convert it like weights.
    """
    layout, prefix, _ = detect(parameters)
    return [
        to_canonical(
            layout,
            prefix,
            {
                name: torch.full(parameter.shape, settings[name][which], dtype=torch.float64)
                for name, parameter in parameters.items()
            },
        )[0]
        for which in (0, 1)
    ]


def test_groups_of_their_network(mmseg):
    """All settings of the encoder agree except those of the stages' last norms.

    mmsegmentation 1 decays them, because their names lack the word "norm".
    """
    from mmseg.models.backbones import MixVisionTransformer

    holder = nn.Module()
    holder.backbone = MixVisionTransformer(
        embed_dims=32, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8]
    )
    their_rates, their_decays = by_part(their_settings(holder), dict(holder.named_parameters()))
    network = segformer_b0(19)
    rates, decays = by_part(our_settings(network), dict(network.named_parameters()))
    encoder = {name for name in rates if name.startswith("encoder.")}
    assert their_rates.keys() == encoder
    assert all(torch.equal(rates[name], their_rates[name]) for name in encoder)
    different = {name for name in encoder if not torch.equal(decays[name], their_decays[name])}
    assert different == {
        f"encoder.stages.{stage}.norm.{kind}" for stage in range(4) for kind in ("weight", "bias")
    }
