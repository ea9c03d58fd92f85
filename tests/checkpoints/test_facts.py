"""Facts about classes and images that a source states, compared with those of the run."""

import json

import pytest
import torch
from safetensors.torch import save_file

from segformer_pl.checkpoints import export_weights, load_network, load_weights, read_weights
from segformer_pl.checkpoints.facts import class_difference, match_names
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.mit_block import NormEps

NAMES = ["sky", "road", "car"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small(num_classes=3, **arguments):
    arguments = {"num_heads": (1, 2, 2, 4)} | arguments
    encoder = MixTransformer(embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), **arguments)
    return SegFormer(encoder, num_classes, decoder_dim=8)


@pytest.fixture
def run(randomize):
    """Content of a run's checkpoint: tensors and hyperparameters of the task."""
    network = randomize(small()).float().eval()
    state = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    return {
        "state_dict": state,
        "hyper_parameters": {"class_names": NAMES, "image_mean": MEAN, "image_std": STD},
    }


def logits(network):
    return network.eval()(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))


def refuse(content, network=None, **arguments):
    with pytest.raises(UserError) as error:
        load_weights(network or small(), content, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_classes_in_another_order_are_refused_with_both_lists(run):
    message = refuse(run, class_names=["sky", "car", "road"])
    assert "of its 3 classes 2 differ from the data set's (the same names in another order)" in (
        message
    )
    assert "1: 'road' there, 'car' here; 2: 'car' there, 'road' here" in message
    assert message.endswith("give --model.match_classes by_name, which reorders the classifier")


def test_other_classes_of_the_same_number_are_refused(run):
    message = refuse(run, class_names=["sky", "road", "tree"])
    assert "1 differ from the data set's: 2: 'car' there, 'tree' here" in message
    assert "--model.encoder_weights" in message
    assert "by_index if only the spelling differs" in message


def test_spelling_of_names_is_ignored_unless_it_distinguishes_classes():
    assert match_names(["Traffic_Light", "road"], ["road ", "traffic light"]) == [1, 0]
    assert class_difference(["traffic-light"], ["Traffic Light"]) is None
    # Two classes of one list differ in case alone, so case is compared.
    assert match_names(["Car", "car"], ["car", "Car"]) == [1, 0]
    assert "0: 'Car' there, 'car' here" in class_difference(["Car", "car"], ["car", "Car"])
    many = [f"class {n}" for n in range(150)]
    difference = class_difference(many, many[:100] + many[101:] + many[100:101])
    assert "50 differ" in difference
    assert difference.endswith("and 38 more")
    assert "99:" not in difference


def test_a_source_without_facts_is_loaded_and_reported(run):
    report = load_weights(small(), run["state_dict"], class_names=NAMES, normalization=(MEAN, STD))
    assert "the source does not name its classes; they are taken to be the data set's" in str(
        report
    )
    assert "does not state how its images were normalised" in str(report)
    message = refuse(run["state_dict"], class_names=NAMES, match_classes="by_name")
    assert "does not name its classes" in message


def test_names_that_contradict_the_classifier_are_refused(run):
    run["hyper_parameters"]["class_names"] = ["sky", "road"]
    assert "names 2 classes and its classifier has 3" in refuse(run, class_names=NAMES)
    load_weights(small(), run, class_names=NAMES, match_classes="by_index")
    run["hyper_parameters"]["class_names"] = ["sky", "sky", "road"]
    message = refuse(run, class_names=NAMES, match_classes="by_name")
    assert "two classes named 'sky'" in message
    run["hyper_parameters"]["class_names"] = "sky"
    assert "class_names as 'sky'; it has to be a list of strings" in refuse(run)


@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_another_normalisation_is_refused_with_the_arguments_that_agree(run, parts):
    message = refuse(run, parts=parts, normalization=((0.5,) * 3, STD))
    assert "image_mean [0.485, 0.456, 0.406], image_std [0.229, 0.224, 0.225] there" in message
    assert "give --model.image_mean=[0.485,0.456,0.406] --model.image_std=[0.229,0.224,0" in message
    run["hyper_parameters"]["image_mean"] = [123.675 / 255, 116.28 / 255, 103.53 / 255]
    report = load_weights(small(), run, parts=parts, normalization=(MEAN, STD))
    assert "normalisation: as in the source" in str(report)
    report = load_weights(
        small(in_channels=4), run, parts=parts, normalization=((0.5,) * 4, (0.2,) * 4)
    )
    assert "not compared: for 3 channels in the source, for 4 here" in str(report)


def test_arguments_that_no_shape_shows_are_compared(run):
    run["hyper_parameters"]["network"] = {
        "class_path": "segformer_pl.models.SegFormer",
        "init_args": {
            "encoder": {
                "class_path": "segformer_pl.models.MixTransformer",
                "init_args": {"num_heads": [1, 2, 2, 4], "strides": [4, 2, 2, 1]},
            }
        },
    }
    report = load_weights(small(), run)
    strides = "strides is (4, 2, 2, 2) here and (4, 2, 2, 1) in the source"
    assert report.changed == (strides,)
    assert strides in str(report)
    report = load_weights(small(strides=(4, 2, 2, 1), paddings=(2, 1, 1, 1)), run)
    assert report.changed == ("paddings is (2, 1, 1, 1) here and (3, 1, 1, 1) in the source",)
    free = {"kv_border": "keep", "merged_queries": (0.5, 0, 0, 0)}
    report = load_weights(small(strides=(4, 2, 2, 1), **free), run)
    assert report.changed == ()
    assert "kv_border is keep here and drop" in str(report)
    assert "merged_queries is (0.5, 0, 0, 0) here and (0, 0, 0, 0) in the source" in str(report)
    message = refuse(run, small(num_heads=(1, 1, 1, 1)))
    assert "trained with num_heads (1, 2, 2, 4), and the model has (1, 1, 1, 1)" in message


@pytest.fixture
def folder(tmp_path, randomize):
    """Function: change a file of a folder as transformers writes it; return the folder."""
    network = randomize(small()).float()
    task = {"class_names": NAMES, "image_mean": MEAN, "image_std": STD}
    export_weights(network, tmp_path / "hf", "huggingface", task)

    def change(file, **changes):
        path = tmp_path / "hf" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "hf"

    return change


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({"2": "car", "0": "sky", "1": "road"}, NAMES),
        ({str(n): f"LABEL_{n}" for n in range(3)}, None),
        ({"1": "sky", "2": "road", "3": "car"}, "has the ids 1, 2, 3, not 0 to 2"),
        ({"0": "sky", "2": "road"}, "has the ids 0, 2, not 0 to 1"),
        ({"0": "sky", "00": "road", "1": "car"}, "has the ids 0, 1, not 0 to 2"),
        ({"sky": 0}, r"has to name the classes 0, 1, 2"),
        (["sky"], r"has to name the classes 0, 1, 2"),
    ],
)
def test_id2label(folder, id2label, names):
    path = folder("config.json", id2label=id2label)
    if isinstance(names, str):
        with pytest.raises(UserError, match=names):
            read_weights(path)
    else:
        assert read_weights(path).task.get("class_names") == names


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]},
        {"do_rescale": False, "image_mean": [9.0, 8.0, 7.0], "image_std": [2.0, 3.0, 4.0]},
        {"rescale_factor": 1.0, "image_mean": [99.0, 98.0, 97.0], "image_std": [58.0] * 3},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
    ],
    ids=str,
)
def test_normalisation_is_what_transformers_computes(folder, changes):
    from transformers import SegformerImageProcessor

    path = folder("preprocessor_config.json", **changes)
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    processor = SegformerImageProcessor.from_pretrained(path)
    theirs = processor(image, return_tensors="pt").pixel_values[0].double()
    stated = read_weights(path).task
    mean, std = (
        torch.tensor(stated[k]).view(3, 1, 1).double() for k in ("image_mean", "image_std")
    )
    torch.testing.assert_close((image / 255 - mean) / std, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sizes": [4, 8, 8, 32]}, "hidden_sizes as 4,8,8,32, its tensors as 4,8,8,16"),
        ({"depths": [1, 1, 1, 2]}, "depths as 1,1,1,2, its tensors as 1,1,1,1"),
        ({"sr_ratios": [8, 4, 4, 1]}, "sr_ratios as 8,4,4,1, its tensors as 8,4,2,1"),
        ({"patch_sizes": [7, 3, 3, 5]}, "patch_sizes as 7,3,3,5, its tensors as 7,3,3,3"),
        ({"decoder_hidden_size": 9}, "decoder_hidden_size as 9, its tensors as 8"),
        ({"num_channels": 4}, "num_channels as 4, its tensors as 3"),
        ({"num_labels": 4}, "num_labels as 4, its tensors as 3"),
    ],
)
def test_a_config_of_other_tensors_is_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        load_network(folder("config.json", **changes))


FORMS = {"huggingface": "folder", "nvlabs": "w.pth", "native": "w.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("native", "huggingface"), ("huggingface", "native")])
def test_facts_survive_a_round_trip(tmp_path, randomize, layouts):
    """native -> huggingface -> native and the other way round."""
    network = randomize(small()).float().eval()
    network.encoder.norm_eps = NormEps(1e-5, 1e-5)
    facts = {
        "class_names": NAMES,
        "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "ignore_index": 200,
    }
    source: str | None = None
    for number, layout in enumerate((*layouts, layouts[0])):
        destination = tmp_path / f"{number}{FORMS[layout]}"
        if source is None:
            export_weights(network, destination, layout, facts)
        else:
            weights = read_weights(source)
            loaded, _ = load_network(weights)
            export_weights(loaded, destination, layout, weights.task, weights.preprocessor)
        source = destination
        weights = read_weights(source)
        assert {key: weights.task.get(key) for key in facts} == facts, layout
        loaded, _ = load_network(weights)
        assert loaded.encoder.norm_eps == network.encoder.norm_eps
        assert torch.equal(logits(loaded), logits(network))


def test_class_names_of_mmengine_are_read(run, tmp_path):
    meta = {"dataset_meta": {"classes": ("a", "b", "c"), "palette": [[0, 0, 0]] * 3}}
    torch.save({"state_dict": run["state_dict"], "meta": meta}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").task["class_names"] == ["a", "b", "c"]


def test_facts_of_a_native_file_are_checked(run, tmp_path):
    task = {"task": {"class_names": [1]}, "norm_eps": [1e-6, 1e-5]}
    save_file(
        run["state_dict"], tmp_path / "w.safetensors", metadata={"segformer_pl": json.dumps(task)}
    )
    assert "class_names as [1]; it has to be a list of strings" in refuse(
        tmp_path / "w.safetensors"
    )
    task = {"task": {}, "norm_eps": [1e-6]}
    save_file(
        run["state_dict"], tmp_path / "w.safetensors", metadata={"segformer_pl": json.dumps(task)}
    )
    assert "norm_eps as [1e-06]; it has to be two numbers" in refuse(tmp_path / "w.safetensors")


def test_facts_of_a_folder_are_checked(tmp_path):
    folder = tmp_path / "folder"
    export_weights(small(), folder, "huggingface", {"class_names": NAMES})
    config = json.loads((folder / "config.json").read_text())
    for facts, sentence in (
        ({"palette": 5}, "palette as 5; it has to be a list of colours"),
        ({"semantic_loss_ignore_index": "none"}, "ignore_index as 'none'; it has to be an integer"),
    ):
        (folder / "config.json").write_text(json.dumps(config | facts))
        with pytest.raises(UserError, match=sentence):
            read_weights(folder)


def test_labels_that_cannot_be_read_leave_the_model_as_it_was():
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = {f"network.{key}": tensor + 1 for key, tensor in small().state_dict().items()}
    weights = Weights("x.ckpt", tensors, task={"class_names": NAMES}, data={"labels": {"raw": 3}})
    with pytest.raises(UserError, match="does not describe its labels"):
        load_weights(model, weights, class_names=NAMES)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
