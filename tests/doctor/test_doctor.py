"""The doctor's examination as a whole."""

import pytest

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
