"""A user's network that fails or breaks the contract is one sentence wherever it is examined."""

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segformer_pl.ablation.study import read_study
from segformer_pl.analysis.complexity import complexity, executed_macs
from segformer_pl.cli.building import resolve_and_build
from segformer_pl.data import shapes
from segformer_pl.errors import UserError
from segformer_pl.inference import Predictor
from segformer_pl.models.forward_check import class_maps_of, feature_maps_of

CONTRACT = "see segformer_pl.models.segmenter"
# What the message says of images of 64x64 pixels and six classes.
BROKEN = {
    "Raises": (
        r"Raises\.forward fails on images of shape \(1, 3, 64, 64\) with RuntimeError: Given groups"
        r".*expected input.* \(toy_segmenter\.py, line 20\); let it return class maps "
        r"\(B, 6, h, w\) of images \(B, 3, H, W\), "
    ),
    "OtherClasses": (
        r"OtherClasses\.forward returns a tensor of shape \(1, 7, 8, 8\) for images of shape "
        r"\(1, 3, 64, 64\); let it return class maps \(B, 6, h, w\), "
    ),
    "OtherRank": r"OtherRank\.forward returns a tensor of shape \(1, 6\) for images of ",
    "Pair": r"Pair\.forward returns a tuple for images of shape \(1, 3, 64, 64\); let it return ",
}
CORRECT = ("Caches", "NeedsValues")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def build():
    """Function (name) -> network with six classes."""
    import broken_segmenter

    return lambda name: getattr(broken_segmenter, name)(num_classes=6)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(CONTRACT)


@pytest.fixture
def write_study(tmp_path):
    """Function (name) -> study whose second variant has the network."""

    def write(name, **data):
        base = {
            "trainer": {"max_steps": 1, "val_check_interval": 1, "accelerator": "cpu"},
            "model": {"network": {"class_path": "toy_segmenter.ToySegmenter"}},
            "data": {"dataset": "shapes", **data},
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        other = {"model.network": {"class_path": f"broken_segmenter.{name}"}}
        study = {"question": "Does it run?", "base": "base.yaml", "seeds": [0]}
        study |= {"variants": {"toy": {}, "other": other}, "budgets": {"small": {}}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_study_refuses_it_before_the_first_run(name, write_study):
    with pytest.raises(UserError, match=rf"variant 'other': {BROKEN[name]}") as error:
        read_study(write_study(name), "small", resolve_and_build)
    one_sentence(error)
    smaller = r"images of shape \(1, 3, 32, 48\)"
    with pytest.raises(UserError, match=smaller):
        read_study(write_study(name, crop_size=[32, 48]), "small", resolve_and_build)


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECT)
def test_a_study_takes_a_network_that_needs_values(name, write_study):
    assert len(read_study(write_study(name), "small", resolve_and_build).variants) == 2


@pytest.mark.parametrize("name", BROKEN)
def test_its_cost_is_refused(name, build):
    for count in (complexity, executed_macs):
        network = build(name)
        with pytest.raises(UserError, match=f"^{BROKEN[name]}") as error:
            count(network, 64, 64)
        one_sentence(error)
        assert network.training


def test_counting_leaves_no_tensors_without_values_behind(build):
    network = build("Caches")
    expected = copy.deepcopy(network).eval()(torch.ones(1, 3, 64, 64))
    before = set(vars(network))
    assert complexity(network, 64, 64).macs == executed_macs(network, 64, 64)
    assert set(vars(network)) == before
    assert torch.equal(network.eval()(torch.ones(1, 3, 64, 64)), expected)


def test_a_network_that_needs_values_cannot_be_counted(build):
    with pytest.raises(UserError, match=r"cost of NeedsValues cannot be counted, .*on values"):
        complexity(build("NeedsValues"), 64, 64)


def test_an_error_of_the_counting_itself_keeps_its_traceback(build, monkeypatch):
    monkeypatch.setattr("segformer_pl.analysis.complexity._marked", None)
    with pytest.raises(TypeError, match="NoneType"):
        complexity(build("Caches"), 64, 64)


@pytest.mark.parametrize("name", BROKEN)
def test_profile(name, fail):
    size = ["--size", "64", "64", "--num_classes", "6", "--device", "cpu"]
    message = fail("profile", f"broken_segmenter.{name}", *size)
    assert message.startswith(f"error: {name}.forward ")
    assert message.rstrip().endswith(CONTRACT)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, {"train": 8, "validation": 2})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Pair",
            "Pair.feature_maps returns a list for images of shape (1, 3, 64, 64); let it return a "
            "dict of maps (B, C_i, h_i, w_i), see ",
        ),
        ("Raises", "Raises.forward fails on images of shape (1, 3, 64, 64) with RuntimeError: "),
    ],
)
def test_erf(name, message, fail, data, tmp_path):
    options = ["--data.dataset=shapes", f"--data.path={data}", f"--output={tmp_path / 'erf'}"]
    options += ["--num_images=2", "--device=cpu"]
    # The feature maps of the second one are in order, so name what it returns.
    layers = ["--layers", "output"] if name == "Raises" else []
    text = fail("erf", f"--model=broken_segmenter.{name}", *options, *layers)
    assert message in text
    assert CONTRACT in text


@pytest.mark.slow
def test_an_error_of_the_measurement_itself_keeps_its_traceback(data, tmp_path, monkeypatch):
    from segformer_pl.cli import main

    monkeypatch.setattr(importlib.import_module("segformer_pl.commands.erf"), "weights_hash", None)
    options = ["--data.dataset=shapes", f"--data.path={data}", f"--output={tmp_path / 'erf'}"]
    with pytest.raises(TypeError, match="NoneType"):
        main(["erf", "--model=toy_segmenter.ToySegmenter", "--device=cpu", *options])


@pytest.mark.parametrize("name", BROKEN)
def test_predictor(name, build):
    predictor = Predictor(build(name), list("abcdef"))
    image = np.zeros((64, 64, 3), np.uint8)
    for call in (predictor, predictor.probabilities):
        with pytest.raises(UserError, match=f"^{BROKEN[name]}") as error:
            call(image)
        one_sentence(error)
    with pytest.raises(UserError, match=r"returns|fails") as error:
        predictor.predict_batch(torch.zeros(2, 3, 64, 64))
    assert "(2, 3, 64, 64)" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_predict(name, build, tmp_path, capsys):
    network = build(name)
    content = {
        "state_dict": {f"network.{key}": t for key, t in network.state_dict().items()},
        "hyper_parameters": {"network": network.spec(), "class_names": list("abcdef")},
        "datamodule_hyper_parameters": {"dataset": "shapes"},
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, tmp_path / "w.ckpt")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "image.png")
    from segformer_pl.cli import main

    files = [f"--input={tmp_path / 'image.png'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as exit_:
        main(["predict", f"--ckpt={tmp_path / 'w.ckpt'}", *files, "--device=cpu"])
    assert exit_.value.code == 1
    text = capsys.readouterr().err
    assert f"image.png: {name}.forward " in text
    assert CONTRACT in text
    assert "Traceback" not in text


def test_memory_errors_and_refusals_pass(build, monkeypatch):
    network = build("Caches")
    for kind in (torch.OutOfMemoryError, MemoryError, UserError):

        def forward(images, kind=kind):
            raise kind("planted")

        monkeypatch.setattr(network, "forward", forward)
        with pytest.raises(kind, match=r"^planted$"):
            class_maps_of(network, torch.zeros(1, 3, 64, 64))


def test_feature_maps_of_another_rank(build, monkeypatch):
    network = build("Caches")
    assert list(feature_maps_of(network, torch.zeros(1, 3, 64, 64))) == ["fine", "coarse"]
    monkeypatch.setattr(network, "feature_maps", lambda images: {"a": images, "b": images.sum()})
    with pytest.raises(UserError, match=r"feature_maps returns a tensor of shape \(\) for images"):
        feature_maps_of(network, torch.zeros(1, 3, 64, 64))


@pytest.mark.slow
def test_a_training_that_has_begun_keeps_the_users_traceback(data, tmp_path):
    from segformer_pl.cli import main

    options = {
        "model.network": "broken_segmenter.Raises",
        "data.path": data,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": tmp_path,
    }
    with pytest.raises(RuntimeError, match="Given groups") as error:
        main(["fit", *(f"--{key}={value}" for key, value in options.items())])
    assert any("toy_segmenter" in str(entry.path) for entry in error.traceback)


@pytest.mark.slow
def test_doctor_finds_it(data, tmp_path, capsys):
    from segformer_pl.cli import main

    options = ["--model.network=broken_segmenter.OtherClasses", f"--data.path={data}"]
    options += ["--data.batch_size=2", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    options += ["--trainer.max_steps=1", "--model.warmup_steps=0", "--json"]
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *options])
    assert exit_.value.code == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    messages = [finding["message"] for finding in findings]
    assert any(text.startswith("OtherClasses.forward returns") for text in messages), messages
