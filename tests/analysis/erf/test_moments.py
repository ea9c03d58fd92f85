"""Running moments against those of all maps together."""

import numpy as np

from segformer_pl.analysis.erf import ERF, LayerERF, merge
from segformer_pl.analysis.erf.moments import Moments


def layer_of(maps, gradient="abs", num_groups=16):
    moments = Moments.zeros(*maps.shape[1:], num_groups)
    moments.add(maps)
    return LayerERF.from_moments("x", moments, (4, 4), (2, 2), gradient)


def test_running_moments_are_those_of_the_whole():
    maps = np.random.default_rng(0).gamma(1.0, size=(40, 8, 9)) + 1e3
    whole = layer_of(maps)
    np.testing.assert_allclose(whole.mean, maps.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.variance, maps.var(0, ddof=1), rtol=1e-8)
    np.testing.assert_allclose(whole.standard_error, maps.std(0, ddof=1) / np.sqrt(40), rtol=1e-8)
    assert list(whole.group_counts) == [3] * 8 + [2] * 8
    np.testing.assert_allclose(whole.groups[1], maps[1::16].mean(0), rtol=1e-5)
    parts = [ERF({"x": layer_of(part)}, len(part)) for part in np.split(maps, [1, 14])]
    merged = merge(parts)["x"]
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-8)
    assert merged.num_images == 40
    assert np.isnan(layer_of(maps[:1]).variance).all()
