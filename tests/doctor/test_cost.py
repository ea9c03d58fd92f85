"""The doctor's checks of the reading plan, the throughput and the memory."""

import re

import pytest

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
