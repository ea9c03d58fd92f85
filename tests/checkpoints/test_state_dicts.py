"""The state dict is found under every common key; of several copies one is chosen by name."""

import pytest
import torch
from safetensors.torch import save_file

from segformer_pl.checkpoints import load_network, load_weights, read_weights
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer
from tests.checkpoints.openmmlab import nvlabs_state

EMA = 2.0  # factor between the weights and their average in these files


def small():
    encoder = MixTransformer((4, 8, 8, 16), (1, 1, 1, 1), (1, 2, 2, 4))
    return SegFormer(encoder, 3, decoder_dim=8)


@pytest.fixture
def state(randomize):
    state = nvlabs_state(randomize(small()).float())
    # Convolution weights are channels-last in memory, which safetensors does not store.
    return {key: tensor.contiguous() for key, tensor in state.items()}


def times(state, factor=EMA, prefix=""):
    return {prefix + k: t * factor if t.is_floating_point() else t for k, t in state.items()}


def same(tensors, expected):
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[key], tensor) for key, tensor in expected.items()
    )


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "network"])
def test_the_entry_of_a_training_file_is_found(state, tmp_path, key):
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}
    torch.save({key: state, "optimizer_state_dict": optimizer, "epoch": 3}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth").tensors, state)
    assert load_weights(small(), tmp_path / "w.pth").num_tensors == len(small().state_dict())


def averaged(prefix, state):
    return times(state, prefix=prefix) | {"steps": torch.tensor(7)}


# name -> content, name of the average, name of the weights
COPIES = {
    "mmengine": lambda s: (
        {"state_dict": s, "ema_state_dict": averaged("module.", s)},
        "ema_state_dict",
        "state_dict",
    ),
    "timm": lambda s: (
        {"state_dict": s, "state_dict_ema": times(s), "epoch": 1},
        "state_dict_ema",
        "state_dict",
    ),
    "model_ema": lambda s: ({"model": s, "model_ema": times(s)}, "model_ema", "model"),
    "DAFormer": lambda s: (
        {
            "state_dict": times(s, 1, "model.")
            | times(s, prefix="ema_model.")
            | times(s, 3, "imnet_model."),
            "meta": {"CLASSES": ("a", "b", "c")},
        },
        "ema_model",
        "model",
    ),
    "mmcv": lambda s: (
        {"state_dict": s | {f"ema_{k.replace('.', '_')}": t for k, t in times(s).items()}},
        "ema",
        "state_dict",
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_an_average_beside_the_weights_is_named_and_chosen(state, tmp_path, kind):
    content, ema, plain = COPIES[kind](state)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "w.pth")
    message = str(error.value)
    assert f"'{tmp_path / 'w.pth'}' holds the state dicts " in message
    assert f"--state {ema}, of `fit` --model.weights_state {ema}, or state={ema!r} of" in message
    assert plain in message
    with pytest.raises(UserError, match="and none is 'other'; choose one"):
        read_weights(tmp_path / "w.pth", state="other")
    for name, factor in ((plain, 1), (ema, EMA)):
        weights = read_weights(tmp_path / "w.pth", state=name)
        network = small()
        load_weights(network, weights)
        key = "decode_head.linear_pred.weight"
        assert torch.equal(network.head.classifier.weight, state[key] * factor), name
        if kind == "DAFormer":
            assert weights.task["class_names"] == ["a", "b", "c"]


def test_a_file_without_an_average_has_one_state(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors", state="state_dict").tensors, state)
    with pytest.raises(UserError, match="holds the state dict state_dict, and none is 'ema'"):
        read_weights(tmp_path / "w.safetensors", state="ema")


def test_branches_that_are_alike_are_no_copies():
    tensors = {f"{branch}.{key}": torch.ones(1) for branch in "ab" for key in ("weight", "bias")}
    assert same(read_weights(tensors).tensors, tensors)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("where", ["", "backbone.", "decode_head."])
def test_compiled_parts_load_as_if_they_were_not(state, tmp_path, suffix, where):
    compiled = {
        f"{where}_orig_mod.{k.removeprefix(where)}" if k.startswith(where) else k: t
        for k, t in state.items()
    }
    file = tmp_path / f"w{suffix}"
    (torch.save if suffix == ".pth" else save_file)(compiled, file)
    assert same(read_weights(file).tensors, state)


def test_what_a_loss_stores_is_left_out(state, tmp_path):
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(3)}}, tmp_path / "w.pth")
    network, spec = small(), small().spec()
    report = load_weights(network, tmp_path / "w.pth")
    assert report.dropped == {"criterion.weight": "part of the training loss"}
    own = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    content = {"state_dict": own | {"loss.weight": torch.ones(3)}}
    content["hyper_parameters"] = {"network": spec}
    torch.save(content, tmp_path / "own.pth")
    loaded, report = load_network(tmp_path / "own.pth")
    assert set(report.dropped) == {"loss.weight"}
    assert same(loaded.state_dict(), network.state_dict())
    # A tensor of any other name is an error, as before.
    with pytest.raises(UserError, match=r"no place for \(critic\.weight\)"):
        load_weights(network, state | {"critic.weight": torch.ones(3)})


def test_another_head_is_named_and_its_backbone_loads(state, tmp_path):
    """DAFormer's file has the backbone's keys and a head of its own."""
    backbone = {key: tensor for key, tensor in state.items() if key.startswith("backbone.")}
    head = {f"decode_head.fuse_layer.{key}": torch.ones(1) for key in ("weight", "bias")}
    torch.save({"state_dict": backbone | head}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"its own head \(decode_head.*its backbone can: parts="):
        load_weights(small(), tmp_path / "w.pth")
    report = load_weights(small(), tmp_path / "w.pth", parts="encoder")
    assert head.keys() <= report.dropped.keys()
