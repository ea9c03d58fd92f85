"""The command ``scaling``."""

import json
from pathlib import Path

import pytest

TOY = "toy_segmenter.ToySegmenter"
# Its BatchNorm normalises one pixel for each image.
POOLED = """
from toy_segmenter import ToySegmenter

class Pooled(ToySegmenter):
    def feature_maps(self, images):
        maps = super().feature_maps(images)
        pooled = self.norm(maps["coarse"].mean((2, 3), keepdim=True))
        return maps | {"coarse": maps["coarse"] + pooled}
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    (tmp_path / "pooled.py").write_text(POOLED)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.syspath_prepend(str(tmp_path))


def arguments(*changes, network=TOY, batch=8):
    small = ["--size", 16, 24, "--num_classes", 3, "--repetitions", 1, "--device", "cpu"]
    return ["scaling", network, "--global_batch", batch, *small, *changes]


@pytest.mark.slow
def test_json_holds_assumptions_measurements_and_predictions(run):
    changes = ["--width", 16, "--node.devices", 4, "--max_devices", 40, "--gradient_bytes", 2]
    loaders = ["--worker_images_per_s", 50, "--workers_per_device", 3]
    results = json.loads(run(*arguments(*changes, *loaders, "--json")))
    assert [row["num_devices"] for row in results["predictions"]] == [1, 2, 4, 8, 16, 32]
    assert [row["num_nodes"] for row in results["predictions"]] == [1, 1, 1, 2, 4, 8]
    assert [row["local_batch"] for row in results["predictions"]] == [8, 4, 2, 1, 1, 1]
    measured = {times.pop("batch"): sum(times.values()) for times in results["measured_seconds"]}
    assert list(measured) == [1, 2, 4]
    for row in results["predictions"][1:]:
        assert row["compute"] == pytest.approx(measured[row["local_batch"]], rel=0.5)
    num_values = (3 * 25 + 1) * 16 + 2 * 16 + (16 * 9 + 1) * 16 + 17 * 3
    assert results["bucket_bytes"] == [2 * num_values]
    # The statistics of the BatchNorm, and the image mean and standard deviation of the task
    assert results["broadcast_bytes"] == [4 * (6 + 32), 8]
    assert results["batch_norm_channels"] == [16]
    assert results["loader_images_per_second"] == 150
    assert any("this machine's CPU and not on a device" in note for note in results["assumptions"])


@pytest.mark.slow
def test_text_states_the_assumptions_above_the_table(run):
    text = run(*arguments("--max_devices", 16, "--precision", "bf16-mixed", "--batches", 2))
    before, _, rows = text.partition("devices nodes")
    assert text.startswith(
        f"{TOY}, global batch of 8, crops of 16x24 pixels, 3 classes, bf16-mixed"
    )
    assert "Compute: measured on cpu" in before
    assert "extrapolated: 1, 4, 8" in before
    assert "From 16 devices on" in before
    assert "`doctor`" in before
    assert [line.split()[:3] for line in rows.splitlines()[1:6]] == [
        ["1", "1", "8"],
        ["2", "1", "4"],
        ["4", "1", "2"],
        ["8", "1", "1"],
        ["16", "2", "1"],
    ]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_one_image_that_a_batchnorm_refuses_is_extrapolated(run):
    text = run(*arguments("--max_devices", 2, network="pooled.Pooled", batch=2))
    assert "A local batch of 1 could not be measured: Expected more than 1 value" in text
    assert "Measured local batches: 2; extrapolated: 1." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("nothing --global_batch 8", "there is no network 'nothing'"),
        (f"{TOY} --global_batch 0", "global_batch"),
        (f"{TOY} --global_batch 1.5", "global_batch"),
        (f"{TOY}", "global_batch"),
        (f"{TOY} --global_batch 8 --node.link_gb_per_s 0", "node.link_gb_per_s is 0"),
        (f"{TOY} --global_batch 8 --node.network_gb_per_s nan", "node.network_gb_per_s"),
        (f"{TOY} --global_batch 8 --worker_images_per_s -1", "worker_images_per_s"),
        (f"{TOY} --global_batch 8 --gradient_bytes 3", "gradient_bytes"),
        (f"{TOY} --global_batch 8 --widht 4", "there is no option --widht"),
        ("segformer_b0 --global_batch 8 --sr_ratios [1,1]", "cannot be built with these arguments"),
        ("segformer_b0 --global_batch 8 --size 20 20", "sr_ratio 8 is larger than the 5x5"),
        (
            "pooled.Pooled --global_batch 1 --size 16 16",
            "cannot be trained on a batch of 1, images of 16x16",
        ),
        (f"--global_batch 8 {TOY}", "give MODEL first"),
        ("", "MODEL and --global_batch are not given"),
    ],
)
def test_scaling_refuses(fail, changes, message):
    assert message in fail("scaling", *changes.split())
