"""Networks are built from the specification that a source states."""

import json
import sys

import pytest
import torch

from segformer_pl.checkpoints import export_weights, load_network
from segformer_pl.checkpoints.sources import weights_from_content
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, mit_b0, segformer_b0


@pytest.fixture
def network(randomize):
    return randomize(segformer_b0(3, decoder_dim=24, dropout=0.2)).eval()


def returns_a_network(num_classes: int) -> SegFormer:
    return SegFormer(mit_b0(), num_classes, decoder_dim=24)


def returns_without_annotation(num_classes):
    raise AssertionError("it was called")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", r"os\.system, which is no subclass of torch\.nn\.Module and no function"),
        ("subprocess.Popen", r"subprocess\.Popen, which is no subclass of torch\.nn\.Module"),
        (f"{__name__}.returns_without_annotation", "and no function that is annotated to return"),
        (
            "segformer_pl.models.segformer_b9",
            r"segformer_b9, which cannot be imported here \(Attri",
        ),
        ("nowhere.Network", r"nowhere\.Network, which cannot be imported here \(ModuleNotFound"),
        ("Network", r"a Network, which cannot be imported here"),
        ("", "which cannot be imported here"),
    ],
)
def test_a_file_cannot_choose_to_run_other_code(tmp_path, network, class_path, message):
    spec = {"class_path": class_path, "init_args": {}}
    for chosen in (
        spec,
        {"class_path": "segformer_pl.models.SegFormer", "init_args": {"encoder": spec}},
    ):
        content = {
            "state_dict": network.state_dict(),
            "hyper_parameters": {"network": chosen},
        }
        torch.save(content, tmp_path / "w.ckpt")
        with pytest.raises(UserError, match=message) as error:
            load_network(tmp_path / "w.ckpt")
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_networks_of_other_packages_are_built(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_users_module", sys.modules[__name__])
    spec = {"class_path": "a_users_module.returns_a_network", "init_args": {"num_classes": 3}}
    content = {"state_dict": network.state_dict(), "hyper_parameters": {"network": spec}}
    loaded, _ = load_network(weights_from_content("source", content))
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_descriptions_that_do_not_fit_are_refused(tmp_path, network):
    """Arguments that contradict the tensors or are unknown to this version."""
    unknown = {
        "class_path": "segformer_pl.models.segformer_b0",
        "init_args": {"num_classes": 3, "width": 1},
    }
    content = {"state_dict": network.state_dict(), "hyper_parameters": {"network": unknown}}
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=r"cannot be built here \(.*'width'"):
        load_network(tmp_path / "w.ckpt")
    task = {"class_names": ["only one"]}
    remarks = export_weights(network, tmp_path / "hf", "huggingface", task)
    assert "names 1 classes and has 3" in remarks[0]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {str(n): f"LABEL_{n}" for n in range(3)}
    config["num_attention_heads"] = [1, 2]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_heads"):
        load_network(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list; it has to hold a JSON object"):
        load_network(tmp_path / "hf")
