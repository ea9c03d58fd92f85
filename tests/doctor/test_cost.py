"""The doctor's checks of the reading plan, the throughput and the memory."""

import re

import pytest
import torch
from torch import nn

from segformer_pl.doctor.cost import state_bytes
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.optim import build_optimizer

pytestmark = pytest.mark.slow

FAULTS = {
    # fault: (how it is planted, pattern of the expected finding)
    "fewer images than a global batch": (
        {"data": {"batch_size": 64}},
        "warning plan the global batch has 64 samples, but there are only 60",
    ),
    "more memory than there is": (
        {"data": {"batch_size": 10_000_000}},
        "error memory training needs at least .* lower --data.batch_size",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault, check_fault):
    check_fault(*FAULTS[fault])


@pytest.mark.slow
def test_large_row_groups_are_reported(visit, monkeypatch):
    monkeypatch.setattr("segformer_pl.data.order.LANES_BYTES", 1 << 18)
    (finding,) = visit().findings
    assert re.match(r"row groups of 0 MB leave memory for only \d+ at a time", finding.message)


@pytest.mark.slow
def test_slow_loading_is_reported(visit, monkeypatch):
    monkeypatch.setattr("segformer_pl.doctor.cost._time_step", lambda *_: 1e-6)
    (finding,) = visit().findings
    assert finding.check == "throughput"
    assert re.search(
        r"1 data-loader workers deliver \d+; set --data.num_workers \d+", finding.message
    )
    (finding,) = visit(data={"num_workers": 0}).findings
    assert "without data-loader workers" in finding.message


@pytest.mark.parametrize("function", ["_time_step", "complexity"])
def test_what_the_network_refuses_is_an_error_of_the_run(visit, monkeypatch, function):
    def refuse(*_):
        raise UserError("a batch of 1 image; give data.batch_size 2")

    monkeypatch.setattr(f"segformer_pl.doctor.cost.{function}", refuse)
    (finding,) = visit().findings
    assert (finding.level, finding.check) == ("error", "network")
    assert finding.message == "a batch of 1 image; give data.batch_size 2"


class OnePixel(Segmenter):
    """A network whose BatchNorm normalises a map of a single pixel, as image pooling does."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.num_classes = 3, 3
        self.norm = nn.BatchNorm2d(3)

    def feature_maps(self, images):
        return {"pooled": self.norm(images.mean((2, 3), keepdim=True))}

    def forward(self, images):
        return self.feature_maps(images)["pooled"]

    def init_args(self):
        return {}


@pytest.mark.parametrize(
    ("batch_size", "trainer", "is_refused"),
    [
        (1, {}, True),
        (2, {}, False),
        (1, {"devices": 2}, True),
        # Every device normalises with the statistics of both.
        (1, {"devices": 2, "sync_batchnorm": True}, False),
        (1, {"sync_batchnorm": True}, True),
    ],
    ids=str,
)
def test_single_images_where_batch_norm_needs_several(
    visit, monkeypatch, batch_size, trainer, is_refused
):
    monkeypatch.setitem(visit.__globals__, "network", OnePixel)
    # It refuses sync_batchnorm without a GPU.
    monkeypatch.setattr("segformer_pl.doctor.examine_recipe", lambda *_: None)
    examination = visit(data={"batch_size": batch_size}, trainer=trainer)
    refused = [one for one in examination.findings if one.check == "network"]
    assert len(refused) == is_refused
    assert all("cannot train on a batch of 1 image" in one.message for one in refused)
    assert ("a step takes (s)" in examination.facts["cost"]) != is_refused


@pytest.mark.parametrize(
    ("name", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("sgd", 0.0)], ids=str
)
def test_memory_of_the_state_is_that_of_the_optimiser(name, momentum):
    """Weights, gradients and what torch's optimiser stores for each parameter that is trained."""
    network = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 7, bias=False))
    network[0].weight.requires_grad_(False)
    optimizer = build_optimizer(name, [{"params": network.parameters()}], momentum, is_fused=False)
    network(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    moments = [t for t in moments if isinstance(t, torch.Tensor) and t.ndim]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    expected = sum(t.nbytes for t in (*network.parameters(), *gradients, *moments))
    assert state_bytes(network, name, momentum) == expected
