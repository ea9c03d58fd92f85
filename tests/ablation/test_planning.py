"""What a planned study can resolve."""

import pytest

from segformer_pl.ablation.planning import find_spread, has_costs, resolution
from segformer_pl.ablation.study_file import Spread
from segformer_pl.atomic import atomic_write_text

pytestmark = pytest.mark.slow


def lines(study, spread):
    return "\n".join(resolution(study, None if spread is None else (spread, "stated")))


def test_whether_a_point_can_be_resolved(read):
    study = read(seeds=[0, 1, 2, 3, 4])
    assert "this study can resolve a difference of 1 point" in lines(study, Spread(0.004, 0.001))
    text = lines(study, Spread(0.02, 0.001))
    assert "CANNOT resolve a difference of 1 point;" in text
    # A paired t test that must find half a standard deviation with 80 % power needs 34 pairs, in
    # the tables of Cohen (1988). The images add a little.
    number = int(text.rsplit("; ", 1)[1].split()[0])
    assert 34 <= number <= 36
    assert "no number of seeds would" in lines(study, Spread(0.004, 0.02))
    assert "unlimited with one seed" in lines(read(seeds=[0]), Spread(0.004, 0.001))
    assert "unknown, because there are no two seeds of finished runs" in lines(study, None)


def test_the_stated_spread_counts_while_there_are_no_runs(read, tmp_path):
    assert find_spread(read(), tmp_path / "none") is None
    study = read(spread={"seeds": 0.01, "images": 0.004})
    assert find_spread(study, tmp_path / "none") == (Spread(0.01, 0.004), "stated in the study")


def test_costs_of_other_settings_are_not_reused(read, tmp_path):
    study, file = read(), tmp_path / "costs.json"
    assert not has_costs(file, study)
    digests = [f'{{"variant": "{v.name}", "digest": "{v.digest}"}}' for v in study.variants]
    atomic_write_text(file, f"[{', '.join(digests)}]")
    assert has_costs(file, study)
    atomic_write_text(file, f"[{digests[0]}]")
    assert not has_costs(file, study)
    atomic_write_text(file, "[1]")
    assert not has_costs(file, study)
