"""Settings of test time: the file, the networks and protocols, multiply-adds, timing."""

import time

import pytest
import torch

from segformer_pl.ablation.test_time import (
    AS_TRAINED,
    Setting,
    count_macs,
    predictors,
    read_settings,
    time_interleaved,
)
from segformer_pl.analysis.complexity import complexity
from segformer_pl.checkpoints.sources import weights_from_content
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer
from segformer_pl.normalization import Normalization


@pytest.fixture(scope="module")
def weights(randomize):
    encoder = MixTransformer(embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    network = randomize(SegFormer(encoder, 3, 8)).float()
    content = {
        "state_dict": {f"network.{name}": t for name, t in network.state_dict().items()},
        "hyper_parameters": {
            "network": network.spec(),
            "class_names": ["a", "b", "c"],
            "inference": {
                "class_path": "segformer_pl.inference.Inference",
                "init_args": {"window": [64, 64], "stride": [32, 32], "window_weights": "hann"},
            },
        },
    }
    return weights_from_content("the run", content)


@pytest.fixture
def settings_file(tmp_path):
    def write(text):
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        return file

    return write


def of(weights, **changes):
    trained = Predictor.from_weights(weights)
    return trained, predictors([Setting("new", **changes)], trained, weights)["new"]


def test_the_trained_network_is_the_first_setting(settings_file):
    file = settings_file("question: why?\nsettings:\n  wide: {inference: {scales: [1.5]}}\n")
    assert read_settings(file) == [
        Setting(AS_TRAINED),
        Setting("wide", inference={"scales": [1.5]}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: [", "line 1: invalid YAML"),
        ("scales: [1.5]", "has no settings; expected"),
        ("settings: {a: {inference: {flip: true}}}\nseeds: 3", "has 'seeds' beside `question`"),
        ("settings: {a/b: {inference: {flip: true}}}", "setting 'a/b': the name also names a file"),
        ("settings: {as_trained: {inference: {flip: true}}}", "another one than as_trained"),
        ("settings: {a: }", "expected changes of `network` or `inference`"),
        ("settings: {a: {sr_ratios: [1, 1, 1, 1]}}", "setting 'a': expected changes of `network`"),
        ("settings: {a: {network: 3}}", "setting 'a': expected changes of `network`"),
    ],
)
def test_a_file_of_another_form_is_refused(settings_file, text, message):
    with pytest.raises(UserError, match=message):
        read_settings(settings_file(text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere.yaml' cannot be read .*holds `settings:`"):
        read_settings(tmp_path / "nowhere.yaml")


def test_a_setting_changes_what_it_names_and_nothing_else(weights):
    trained, changed = of(weights, network={"sr_ratios": [8, 8, 2, 1], "kv_border": "keep"})
    expected = trained.network.spec()
    expected["init_args"]["encoder"]["init_args"] |= {
        "sr_ratios": (8, 8, 2, 1),
        "kv_border": "keep",
    }
    assert changed.network.spec() == expected
    assert changed.protocol == trained.protocol
    assert (changed.class_names, changed.normalization) == (["a", "b", "c"], Normalization())
    image = torch.rand(1, 3, 128, 128)
    assert not torch.allclose(changed.network(image), trained.network(image))
    trained, changed = of(weights, inference={"scales": [0.5], "flip": True})
    assert changed.network is trained.network
    assert changed.protocol == Inference(
        window=(64, 64), stride=(32, 32), window_weights="hann", scales=(0.5,), flip=True
    )
    # Stride and weights belong to the window that the run had.
    _, changed = of(weights, inference={"window": [96, 96]})
    assert changed.protocol == Inference(window=(96, 96), stride=(64, 64))
    _, changed = of(weights, inference={"window": None})
    assert changed.protocol == Inference()


def test_settings_with_equal_networks_share_one(weights):
    network = {"kv_border": "keep"}
    settings = [Setting(AS_TRAINED), Setting("a", network), Setting("b", network, {"flip": True})]
    built = predictors(settings, Predictor.from_weights(weights), weights)
    assert built["a"].network is built["b"].network
    assert built["a"].network is not built[AS_TRAINED].network


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"sr_ratio": [8, 8, 2, 1]}}, "has no argument 'sr_ratio'"),
        ({"network": {"sr_ratios": [8, 8, 2]}}, r"setting 'new': sr_ratios=\(8, 8, 2\): give one"),
        ({"network": {"kv_border": "both"}}, "setting 'new': kv_border='both': choose one of"),
        (
            {"network": {"sr_ratios": [8, 4, 2, 2]}},
            "setting 'new' needs training, so it cannot be evaluated at test time: stage 4: "
            "sr_ratio is 1 in the source and 2 here",
        ),
        (
            {"network": {"sr_ratios": [8, 4, 1, 1]}},
            "needs training.*: stage 3: sr_ratio is 1 here and was larger",
        ),
        ({"network": {"num_heads": [1, 1, 2, 4]}}, "setting 'new': .* num_heads"),
        ({"network": {"num_classes": 5}}, "needs training"),
        ({"inference": {"scale": [0.5]}}, "setting 'new', inference: .*scale"),
        ({"inference": {"scales": [-1]}}, "setting 'new', inference: .*scales"),
        ({"inference": {"stride": [128, 128]}}, "setting 'new', inference: .*leaves gaps"),
    ],
)
def test_impossible_settings_are_refused(weights, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        of(weights, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_multiply_adds_are_those_of_all_views_and_windows(weights):
    trained, flipped = of(weights, inference={"flip": True, "scales": [1.0, 2.0]})
    one = complexity(trained.network, 64, 64).macs
    assert count_macs(trained, 96, 64) == 2 * one  # windows at rows 0 and 32
    assert count_macs(flipped, 96, 64) == 2 * (2 + 5 * 3) * one
    _, whole = of(weights, inference={"window": None, "base_size": [96, 96]})
    assert count_macs(whole, 48, 96) == complexity(trained.network, 48, 96).macs
    _, pooled = of(weights, network={"sr_ratios": [16, 8, 2, 1]})
    assert count_macs(pooled, 64, 64) < one


@pytest.mark.slow
def test_images_that_are_too_small_are_refused(weights):
    _, pooled = of(weights, network={"sr_ratios": [16, 8, 4, 1]}, inference={"window": None})
    with pytest.raises(
        UserError, match=r"its images or windows of 48x64 pixels .* smaller than the"
    ):
        count_macs(pooled, 48, 64)
    _, kept = of(
        weights,
        network={"sr_ratios": [16, 8, 4, 1], "kv_border": "keep"},
        inference={"window": None},
    )
    assert count_macs(kept, 48, 64) > 0


def test_functions_are_timed_in_turn():
    calls = []

    def function(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    timings = time_interleaved(
        {"a": lambda: function("a", 0.0), "b": lambda: function("b", 0.004)}, seconds=0.0
    )
    assert calls == ["a", "b"] * 2 + ["a", "b", "b", "a"] * 5
    assert timings["b"].median_ms > timings["a"].median_ms + 3
    assert timings["a"].num_runs == timings["b"].num_runs == 10
