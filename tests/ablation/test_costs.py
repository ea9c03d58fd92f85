"""Costs of the variants of a study, before training."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from segformer_pl.ablation.costs import (
    VariantCost,
    VariantLatency,
    as_dict,
    costs_table,
    variant_costs,
)
from segformer_pl.analysis.complexity import complexity
from segformer_pl.errors import UserError
from segformer_pl.models import MixTransformer, SegFormer, segformer_b2
from segformer_pl.models.segmenter import Segmenter


@dataclass(frozen=True)
class StandIn:
    """The attributes of a study's variant that the costs depend on."""

    name: str
    build: Any
    changes: dict[str, Any] = field(default_factory=dict)

    def build_network(self):
        return self.build()


def small(sr_ratios=(8, 4, 2, 1), **arguments):
    encoder = MixTransformer(
        embed_dims=(4, 8, 8, 16),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        sr_ratios=sr_ratios,
        **arguments,
    )
    return SegFormer(encoder, num_classes=3, decoder_dim=8)


class Waiting(Segmenter):
    """A network whose forward pass takes a known time, slower in every pass (a hot machine).

    The time is that of a simulated clock, which other load on the machine does not change.
    """

    drift = now = 0.0

    def __init__(self, seconds):
        super().__init__()
        self.in_channels, self.num_classes, self.seconds = 3, 2, seconds
        self.classifier = nn.Conv2d(3, 2, 1)

    def feature_maps(self, images):
        return {"images": images}

    def forward(self, images):
        if not torch.is_grad_enabled() and torch.is_inference_mode_enabled():
            Waiting.drift += 1e-4
            Waiting.now += self.seconds * (1 + Waiting.drift)
        return self.classifier(images)

    def init_args(self):
        return {}


@pytest.fixture(scope="module")
def costs():
    torch.set_num_threads(1)
    variants = [
        StandIn("r8-4-2-1", small),
        StandIn("r1-1-1-1", lambda: small((1, 1, 1, 1)), {"sr_ratios": [1, 1, 1, 1]}),
        StandIn("a name that is longer than its column", lambda: small((4, 4, 2, 1))),
    ]
    return variant_costs(variants, "r8-4-2-1", 64, 64, min_seconds=0.05)


@pytest.mark.slow
def test_counts_are_those_of_each_network(costs):
    assert [cost.name for cost in costs][:2] == ["r8-4-2-1", "r1-1-1-1"]
    assert [cost.is_reference for cost in costs] == [True, False, False]
    assert costs[1].changes == {"sr_ratios": [1, 1, 1, 1]}
    assert costs[1].cost == complexity(small((1, 1, 1, 1)), 64, 64)
    # Keys per query: 16x16 tokens, reduced by the square of 8 or by nothing.
    assert [cost.cost.parts[0].key_length for cost in costs] == [4, 256, 16]
    # QK^T and AV in a block: 2 N N_kv C.
    expected = 2 * sum(n * n * c for n, c in ((256, 4), (64, 8), (16, 8), (4, 16)))
    assert costs[1].attention_macs == expected
    assert costs[1].cost.activation_bytes != costs[0].cost.activation_bytes


@pytest.mark.slow
def test_table_has_a_row_for_every_variant_and_part(costs):
    text = costs_table(costs)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "64x64 pixels, 3 classes" in lines[0]
    assert "a name that is longer than its column" in lines
    assert sum(line.startswith("  stage1 ") for line in lines) == 3
    assert sum(line.startswith("  head ") for line in lines) == 3
    (row,) = (line for line in lines if line.startswith("r8-4-2-1 *"))
    assert f"{costs[0].cost.num_parameters / 1e6:.2f}" in row
    assert f"{costs[0].cost.paper_macs / 1e6:.2f}" in row
    assert "1.00 [1.00, 1.00]" in row
    data = json.loads(json.dumps(as_dict(costs)))
    assert data[1]["attention_macs"] == costs[1].attention_macs
    assert data[0]["cost"]["parts"][0]["activation_bytes"] > 0
    assert data[0]["latency"]["num_rounds"] >= 3


@pytest.mark.slow
def test_large_variants_fit_into_the_columns():
    with torch.device("meta"):
        cost = complexity(segformer_b2(150, decoder_dim=2048), 512, 512)
    latency = VariantLatency(12345.6, 1234.5, 10.25, 10.01, 11.75, 3, "cpu", 16)
    text = costs_table([VariantCost("C2048", {}, True, cost, latency)])
    assert max(map(len, text.splitlines())) <= 100
    (row,) = (line for line in text.splitlines() if line.startswith("C2048 *"))
    assert (row.split()[2], row.split()[4]) == ("43.39", "304.38")  # Table 1b: 43.4, 304.4


@pytest.mark.slow
def test_drift_does_not_change_the_ratio(monkeypatch):
    """Measured one variant after the other, the second would look slower."""
    variants = [StandIn(n, lambda s=s: Waiting(s)) for n, s in (("a", 0.03), ("b", 0.03))]
    variants.append(StandIn("c", lambda: Waiting(0.06)))
    monkeypatch.setattr(Waiting, "drift", 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: Waiting.now)
    a, b, c = (cost.latency for cost in variant_costs(variants, "a", 8, 8, min_seconds=0.4))
    assert a.num_rounds >= 8
    assert (a.ratio, a.ratio_low, a.ratio_high) == (1, 1, 1)
    assert b.ratio == pytest.approx(1, abs=0.05)
    assert c.ratio == pytest.approx(2, abs=0.1)
    assert c.median_ms == pytest.approx(60, rel=0.3)
    assert np.isfinite(a.iqr_ms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        (StandIn("r3", lambda: small((0, 1, 1, 1))), r"variant r3: .*cannot be built \(sr_ratios"),
        (StandIn("linear", lambda: nn.Linear(2, 2)), r"variant linear: .*the network is a Linear"),
        (StandIn("r16", lambda: small((32, 4, 2, 1))), r"variant r16: .*at least 125 pixels"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_impossible_variant_is_named(variant, sentence):
    with pytest.raises(UserError, match=sentence):
        variant_costs([StandIn("base", small), variant], "base", 64, 64)


def test_a_reference_that_is_no_variant():
    with pytest.raises(UserError, match=r"reference 'r0' is none of the variants \(r1\)"):
        variant_costs([StandIn("r1", small)], "r0", 64, 64)
