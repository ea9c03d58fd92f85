"""The command ``export``."""

import numpy as np
import pytest
import torch
from PIL import Image

from segformer_pl.checkpoints import export_weights, load_network, read_weights
from segformer_pl.inference.targets import TARGETS
from segformer_pl.models import SegFormer, mit_b0
from segformer_pl.models.mit import MixTransformer


@pytest.fixture
def weights(tmp_path, randomize):
    """Native weights that state a protocol with padding."""
    encoder = MixTransformer((4, 4, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2))
    network = randomize(SegFormer(encoder, 3, decoder_dim=8)).float()
    protocol = {"class_path": "segformer_pl.inference.Inference", "init_args": {"pad_to": 32}}
    facts = {"class_names": ["sky", "road", "car"], "ignore_index": 7, "inference": protocol}
    export_weights(network, tmp_path / "w.safetensors", "native", facts)
    return tmp_path / "w.safetensors"


def test_a_file_beside_the_checkpoint_is_verified_on_given_images(run, weights, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    for kind in ("masks", "overlays"):  # of an earlier `predict`
        (tmp_path / "photos" / kind).mkdir()
        (tmp_path / "photos" / kind / "0.png").write_bytes(b"no image to compare on")
    given = ["--verify", tmp_path / "photos", "--num_images", 5, "--size", 64, 96]
    text = run("export", weights, "--to", "torch-export", *given)
    assert text.startswith(f"written to '{tmp_path / 'w.pt2'}': ")
    assert "of the pixels of 3 images get the checkpoint's class (worst image: " in text
    assert "of 3 classes occur in them" in text
    graph = TARGETS["torch-export"].open(tmp_path / "w.pt2")
    assert graph.run(torch.zeros(1, 64, 96, 3, dtype=torch.uint8)).shape == (1, 64, 96)
    assert (graph.description["pad_to"], graph.description["ignore_index"]) == ("32", "7")


def test_a_network_that_merges_queries_is_exported(run, weights, tmp_path):
    """It is verified with the network that merges, and has fewer queries in its graph."""
    given = ["--to", "torch-export", "--size", 64, 96]
    given += ["--network", "{merged_queries: [1, 1, 0, 0]}"]
    assert "the checkpoint's class" in run("export", weights, *given)
    program = torch.export.load(tmp_path / "w.pt2")
    queries = [
        node.args[0].meta["val"].shape[2]
        for node in program.graph.nodes
        if "scaled_dot_product_attention" in str(node.target)
    ]
    assert queries == [16 * 24 // 4, 8 * 12 // 4, 4 * 6, 2 * 3]


def test_bad_arguments_get_a_sentence(fail, weights, tmp_path):
    there = tmp_path / "there.pt2"
    there.write_bytes(b"")
    to = ("--to", "torch-export")
    for arguments, sentence in (
        ((weights, "--to", "keras"), "--to"),
        ((tmp_path / "nowhere.ckpt", *to), "there is no file or folder"),
        ((weights, *to, "--output", there), f"--output: '{there}' exists already; remove it"),
        ((weights, *to, "--output", tmp_path / "m.onnx"), "does not end in .pt2"),
        ((weights, *to, "--inference.flip", "true"), "--inference.flip false, or --network_only"),
        ((weights, *to, "--size", 64, 64, "--verify", tmp_path / "no"), "--verify: there is no"),
        ((weights, *to, "--network", "{merged: [1]}"), "a SegFormer has no argument 'merged'"),
        ((weights, *to, "--size", 64, 64, "--verify", "validation"), "CKPT: "),
        ((weights, *to, "--size", 8, 8, "--inference.pad_to", "null"), "sr_ratio 8 is larger than"),
    ):
        assert sentence in fail("export", *arguments), sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.pt2", "w.safetensors"]


def test_a_folder_that_states_a_size_needs_no_option(run, weights, tmp_path):
    network, _ = load_network(weights)
    facts = {"class_names": ["sky", "road", "car"]}
    stated = {"do_resize": True, "size": {"height": 48, "width": 64}}
    export_weights(network, tmp_path / "folder", "huggingface", facts, stated)
    run("export", tmp_path / "folder", "--to", "torch-export", "--output", tmp_path / "m.pt2")
    graph = TARGETS["torch-export"].open(tmp_path / "m.pt2")
    assert graph.description["image_size"] == "[48, 64]"
    assert graph.run(torch.zeros(1, 30, 20, 3, dtype=torch.uint8)).shape == (1, 30, 20)


def test_an_average_beside_the_weights_is_chosen(run, fail, weights, tmp_path):
    network, _ = load_network(weights)
    state, facts = network.state_dict(), read_weights(weights).task
    average = {key: tensor.clone() for key, tensor in state.items()}
    average["head.classifier.bias"][:] = torch.tensor([-1e4, 1e4, 0])
    content = {"state_dict": state, "ema_state_dict": average, "hyper_parameters": facts}
    torch.save(content, tmp_path / "w.pth")
    given = ["export", tmp_path / "w.pth", "--to", "torch-export", "--size", 64, 64]
    assert "choose one: --state ema_state_dict, of " in fail(*given)
    assert "1 of 3 classes occur in them" in run(*given, "--state", "ema_state_dict")
    masks = TARGETS["torch-export"].open(tmp_path / "w.pt2").run
    assert (masks(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)) == 1).all()


def test_an_encoder_is_refused(fail, tmp_path):
    torch.save(mit_b0().state_dict(), tmp_path / "encoder.pth")
    message = fail("export", tmp_path / "encoder.pth", "--to", "torch-export")
    assert "holds an encoder and no decode head" in message
