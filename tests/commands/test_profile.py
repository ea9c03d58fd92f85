"""The command ``profile``."""

import importlib
import json
from functools import partial

import pytest


@pytest.fixture(autouse=True)
def _short_latency_measurement(monkeypatch):
    command = importlib.import_module("segformer_pl.commands.profile")
    quick = partial(command.measure_latency, min_seconds=0.01)
    monkeypatch.setattr(command, "measure_latency", quick)


@pytest.mark.slow
def test_profile_in_json(run):
    text = run(
        *["profile", "segformer_b0", "--size", "512", "512", "--num_classes", "150", "--json"]
    )
    results = json.loads(text)
    assert results["paper_gflops"] == 8.4
    assert results["gmacs"] == 4.1
    assert results["num_parameters"] == 3_752_694
    assert [part["key_length"] for part in results["parts"]] == [256, 256, 256, 256, None]
    assert results["latency"]["num_threads"] == 1


@pytest.mark.slow
def test_profile_of_an_ablation(run):
    text = run(
        *[
            "profile",
            "segformer_b1",
            "--size",
            "64",
            "96",
            "--num_classes",
            "3",
            "--sr_ratios",
            "[4,4,2,1]",
        ],
        *["--in_channels", "4", "--decoder_dim", "32"],
    )
    assert text.startswith("segformer_b1, one image of 64x96 pixels, 3 classes")
    stage1 = next(line for line in text.splitlines() if line.startswith("stage1"))
    assert stage1.split()[-2:] == ["384", "24"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("segformer_b9", "there is no network 'segformer_b9'"),
        ("segformer_b0 --size 20 20", "sr_ratio 8 is larger than the 5x5 token grid"),
        ("segformer_b0 --size 0 64", "give integers of at least 1"),
        ("segformer_b0 --sr_ratio [1,1,1,1]", "there is no option --sr_ratio"),
        ("segformer_b0 --sr_ratios [1,1]", "one integer of at least 1 for each"),
        ("--json segformer_b0", "give MODEL first"),
        ("", "MODEL is not given"),
    ],
)
def test_profile_refuses(fail, arguments, message):
    assert message in fail("profile", *arguments.split())
