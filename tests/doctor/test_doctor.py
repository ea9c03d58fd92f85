"""The doctor's examination as a whole."""

import pytest

from segformer_pl.doctor import Examination

pytestmark = pytest.mark.slow

NAMES = ["road", "car", "tree"]


@pytest.mark.slow
def test_a_sound_run_has_no_findings(visit):
    examination = visit()
    assert examination.findings == []
    assert examination.facts["train"]["images"] == 60
    assert set(examination.facts["train"]["share of pixels"]) == set(NAMES)
    assert examination.facts["cost"]["loading (samples/s and process)"] > 0
    assert str(examination).endswith("0 errors, 0 warnings")


def test_facts_and_counts_are_printed_as_text():
    examination = Examination()
    examination.facts["train"] = {
        "revision": None,
        "sizes (height, width)": [[64, 32], [8, 8]],
        "share of pixels": {"road": 0.75, "car": 0.25},
    }
    examination.error("open", "no file")
    assert str(examination).splitlines() == [
        "train",
        "  sizes (height, width): 64x32, 8x8",
        "  share of pixels: road 0.75, car 0.25",
        "error: [open] no file",
        "1 error, 0 warnings",
    ]
