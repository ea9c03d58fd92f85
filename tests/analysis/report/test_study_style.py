"""Names and numbers of a study's figures."""

import math

import pytest

from segformer_pl.analysis.report.study_style import draw_panels, p_text, signed, spread, wrapped

pytestmark = pytest.mark.slow


def test_names_are_broken_after_separators():
    assert wrapped("r8-4-2-1") == "r8-4-2-1"
    assert wrapped("drop_path_rate=0.1+decoder_dim=256") == "drop_path_rate=0.1+decoder_\ndim=256"
    name = "model.network.init_args.sr_ratios=16-8-4-2+model.network.init_args.drop_path=0.1"
    lines = wrapped(name).split("\n")
    assert len(lines) == 2
    assert max(map(len, lines)) <= 28
    assert lines[0].startswith("model.")
    assert lines[1].endswith("drop_path=0.1")
    assert wrapped("x" * 40).replace("\n", "") == "x" * 40


def test_numbers():
    assert signed(-1.234) == "−1.23"
    assert signed(-0.001) == "+0.00"
    assert signed(math.nan) == "+nan" or "nan" in signed(math.nan)
    assert [p_text(p) for p in (0.00003, 0.0123, 0.4567, 1.0, math.nan)] == [
        "< 0.001",
        "0.012",
        "0.46",
        "1.00",
        "–",
    ]
    assert spread([1.0, math.nan, 3.0]) == (2.0, 1.0, 3.0)
    assert all(math.isnan(value) for value in spread([]))


@pytest.mark.parametrize("number", [2, 5, 6, 20])
def test_panels_show_every_variant_beside_the_reference(number):
    names = [f"v{i}" for i in range(number)]
    _, parts = draw_panels(names)
    if number <= 5:
        assert [drawn for _, drawn in parts] == [names]
    else:
        assert [drawn for _, drawn in parts] == [["v0", name] for name in names[1:]]
        assert [axes.get_title(loc="left") for axes, _ in parts] == names[1:]
