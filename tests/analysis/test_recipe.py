"""The recipe files have no departure from the paper, and every planted departure is reported."""

import copy
import inspect
import re
from pathlib import Path

import pytest

from segformer_pl import models
from segformer_pl.analysis.recipe import DEFAULTS, departures, remarks, scope
from segformer_pl.analysis.recipes import RECIPES as PUBLISHED
from segformer_pl.analysis.recipes.segformer import ADE20K, CITYSCAPES, COCO_STUFF, DECODER_DIM
from segformer_pl.analysis.recipes.settings import NOT_STATED, PROTOCOL
from segformer_pl.cli.training import resolve
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.inference import Inference
from segformer_pl.losses import CrossEntropy
from segformer_pl.task import SegmentationTask

RECIPES = Path(__file__).parents[2] / "experiments" / "recipes"
DELTAS = sorted(RECIPES.glob("segformer_b*.yaml"))
GIVEN = {"model.encoder_weights": "mit_b0.pth"}  # given on the command line, not in the files


def recipe(delta):
    """Resolve the configuration of a delta with its base and the weights of the encoder."""
    (base,) = [file for file in RECIPES.glob("*.yaml") if f"_{file.stem}_" in delta]
    return put(resolve([str(base), str(RECIPES / f"{delta}.yaml")]), GIVEN)


def put(config, changes):
    """Return a changed copy; the value ``...`` removes a key."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *path, name = key.split(".")
        parent = config
        for part in path:
            parent = parent[part]
        if value is ...:
            del parent[name]
        else:
            parent[name] = value
    return config


@pytest.fixture(scope="module")
def ade20k():
    return recipe("segformer_b0_ade20k_512_160k")


# Changes that turn the recipe for B0 on ADE20K into the one for Cityscapes.
CITYSCAPES_CHANGES = {
    "data.dataset": "cityscapes",
    "data.crop_size": [1024, 1024],
    "data.base_size": [2048, 1024],
    "data.batch_size": 1,
    "trainer.val_check_interval": 4000,
    f"{PROTOCOL}base_size": None,  # original size
    f"{PROTOCOL}resize_to": None,
    f"{PROTOCOL}window": [1024, 1024],
    f"{PROTOCOL}stride": [768, 768],
}


@pytest.fixture
def report(ade20k):
    """Return a function: changes of the B0 recipe on ADE20K -> departures by setting."""

    def call(**changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        listed = departures(put(ade20k, changes))
        assert len({one.setting for one in listed}) == len(listed)
        return {one.setting: one for one in listed}

    return call


def test_every_network_and_data_set_has_a_recipe():
    stems = {delta.stem for delta in DELTAS}
    for number in range(6):
        crop = 640 if number == 5 else 512
        assert stems >= {
            f"segformer_b{number}_ade20k_{crop}_160k",
            f"segformer_b{number}_cityscapes_1024_160k",
            f"segformer_b{number}_coco_stuff_512_80k",
        }
    assert len(stems) == 18


def test_b0_on_ade20k_has_no_departure(ade20k):
    assert departures(ade20k) == []


@pytest.mark.slow
@pytest.mark.parametrize("delta", [delta.stem for delta in DELTAS])
def test_recipe_files_have_no_departure(delta):
    config = recipe(delta)
    assert departures(config) == []
    name, dataset = delta.split("_")[1].upper(), config["data"]["dataset"]
    title = {"ade20k": "ADE20K", "cityscapes": "Cityscapes"}.get(dataset, "COCO-Stuff")
    assert scope(config) == f"Compared with the paper's recipe for SegFormer-{name} on {title}."


def test_values_of_the_paper_and_the_reference():
    """Values copied by hand from Sec. 4.1 and the data set configurations of the reference."""
    rows = [
        (one.max_steps, one.samples_per_step, one.crop, one.base, one.validation_interval)
        for one in (ADE20K, CITYSCAPES, COCO_STUFF)
    ]
    assert rows == [
        (160000, 16, (512, 512), (2048, 512), 16000),
        (160000, 8, (1024, 1024), (2048, 1024), 4000),
        (80000, 16, (512, 512), (2048, 512), None),
    ]
    assert "UNVERIFIED" in COCO_STUFF.source
    assert [DECODER_DIM[f"b{n}"] for n in range(6)] == [256, 256, 768, 768, 768, 768]


COMPARED = {
    one.key: one for one in (*PUBLISHED["segformer_b0"][0].settings, *ADE20K.all_settings())
}


@pytest.mark.parametrize("key", COMPARED)
def test_every_planted_change_is_reported(report, key):
    setting = COMPARED[key]
    for wrong in ("something else", 12345, ...):
        if wrong is ... and NOT_STATED in setting.same:
            continue
        reported = report(**{key.replace(".", "__"): wrong})
        assert set(reported) == {key}, wrong
        one = reported[key]
        assert one.source == setting.source
        assert one.here == ("not stated" if wrong is ... else str(wrong))
        assert one.paper != one.here
    for same in setting.same:
        same = ... if same is NOT_STATED else same
        assert report(**{key.replace(".", "__"): same}) == {}


@pytest.mark.parametrize(
    ("changes", "setting", "here"),
    [
        ({"data__batch_size": 4}, "data.batch_size", "batch_size 4 x devices 8 .* = 32"),
        ({"trainer__devices": 4}, "data.batch_size", "= 8$"),
        ({"trainer__devices": "auto"}, "data.batch_size", "devices auto .* = not known"),
        ({"trainer__devices": -1}, "data.batch_size", "devices -1 .* = not known"),
        ({"trainer__num_nodes": 2}, "data.batch_size", "num_nodes 2 .* = 32"),
        ({"trainer__sync_batchnorm": False}, "trainer.sync_batchnorm", "false, devices 8"),
        ({"trainer__val_check_interval": 4000}, "trainer.val_check_interval", "4000"),
        ({"trainer__precision": "bf16-mixed"}, "trainer.precision", "bf16-mixed"),
        ({"trainer__gradient_clip_val": 1.0}, "trainer.gradient_clip_val", "1"),
        ({"data__crop_size": [512, 640]}, "data.crop_size", r"\[512, 640\]"),
        ({"data__crop_size": [512]}, "data.crop_size", r"\[512\]"),
        ({"data__photometric": 1}, "data.photometric", "1"),
        ({"model__lr": 6.1e-5}, "model.lr", "6.1e-05"),
        ({"model__encoder_weights": None}, "model.encoder_weights", "none"),
        ({"model__weights": "all.pth"}, "model.weights", "all.pth"),
        ({f"{PROTOCOL}flip": True}, f"{PROTOCOL}flip", "true"),
        ({f"{PROTOCOL}scales": [0.5, 1]}, f"{PROTOCOL}scales", r"\[0.5, 1\]"),
        ({f"{PROTOCOL}stride": [256, 256]}, f"{PROTOCOL}stride", r"\[256, 256\]"),
        (
            {"model__network__init_args__decoder_dim": 768},
            "model.network.init_args.decoder_dim",
            "768",
        ),
    ],
)
def test_computed_settings(ade20k, changes, setting, here):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    (one,) = departures(put(ade20k, changes))
    assert one.setting == setting
    assert re.search(here, one.here)


def test_samples_per_step_over_devices_nodes_and_accumulated_batches(report):
    assert report(trainer__num_nodes=2, trainer__devices=4) == {}
    assert report(trainer__devices=[0, 1, 4, 5], data__batch_size=4) == {}
    assert report(trainer__devices="0,1,4,5", data__batch_size=4) == {}
    assert report(trainer__devices="8") == {}
    one_gpu = {"trainer__devices": 1, "data__batch_size": 16, "trainer__sync_batchnorm": False}
    assert report(**one_gpu) == {}
    # On the CPU, "auto" is one process.
    assert report(**one_gpu | {"trainer__devices": "auto", "trainer__accelerator": "cpu"}) == {}
    # The loss averages over 16 samples, but BatchNorm statistics are over 4.
    accumulated = {
        "trainer__accumulate_grad_batches": 4,
        "data__batch_size": 4,
        "trainer__devices": 1,
        "trainer__sync_batchnorm": False,
        "trainer__val_check_interval": 64000,  # batches
    }
    assert set(report(**accumulated)) == {"trainer.accumulate_grad_batches"}
    assert set(report(**accumulated | {"trainer__val_check_interval": 16000})) == {
        "trainer.accumulate_grad_batches",
        "trainer.val_check_interval",
    }


def test_callbacks_that_change_training(report, ade20k):
    for name in ("EMAWeightAveraging", "WeightAveraging", "EarlyStopping"):
        callbacks = [
            *ade20k["trainer"]["callbacks"],
            {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": {}},
        ]
        (one,) = report(trainer__callbacks=callbacks).values()
        assert (one.setting, one.here) == ("trainer.callbacks", name)
    assert report(trainer__callbacks=None) == {}


def test_another_class_counts_as_one_departure(report):
    loss = {"class_path": "mine.FocalLoss", "init_args": {"average": "labelled", "gamma": 2}}
    assert set(report(model__loss=loss)) == {"model.loss.class_path"}
    assert set(report(model__inference={"class_path": "mine.Inference"})) == {
        "model.inference.class_path"
    }


def test_null_means_the_default_of_the_task(report):
    assert report(model__loss=None) == {}
    assert set(report(model__inference=None)) == {f"{PROTOCOL}base_size", f"{PROTOCOL}resize_to"}
    assert set(report(model__loss=...)) == {"model.loss.class_path"}
    for key, make in {"loss": CrossEntropy, "inference": Inference}.items():
        defaults = {
            name: list(one.default) if isinstance(one.default, tuple) else one.default
            for name, one in inspect.signature(make).parameters.items()
        }
        assert DEFAULTS[key]["init_args"] == defaults


def test_multi_scale_evaluation_of_the_paper_is_no_departure(report, ade20k):
    cityscapes = put(ade20k, CITYSCAPES_CHANGES)
    assert departures(cityscapes) == []
    changes = {f"{PROTOCOL}scales": [0.75, 0.875, 1.0, 1.125, 1.25], f"{PROTOCOL}flip": True}
    assert report(**changes) == {}
    assert {one.setting for one in departures(put(cityscapes, changes))} == set(changes)
    changes[f"{PROTOCOL}scales"] = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert departures(put(cityscapes, changes)) == []


def test_b5_on_ade20k_has_larger_crops(ade20k):
    changes = {
        "model.network.class_path": "segformer_pl.models.segformer_b5",
        "model.network.init_args.decoder_dim": 768,
    }
    larger = {
        "data.crop_size": [640, 640],
        "data.base_size": [2048, 640],
        f"{PROTOCOL}base_size": [2048, 640],
    }
    assert departures(put(ade20k, changes | larger)) == []
    assert {one.setting for one in departures(put(ade20k, changes))} == set(larger)
    assert departures(put(ade20k, CITYSCAPES_CHANGES | changes)) == []


def test_other_data_sets_are_compared_in_settings_independent_of_the_data(report, ade20k):
    changes = {
        "data__dataset": "camvid",
        "data__crop_size": [352, 480],
        "data__base_size": None,
        "data__batch_size": 8,
        "trainer__max_steps": 8000,
        "trainer__val_check_interval": 500,
        f"{PROTOCOL}resize_to": None,
    }
    assert report(**changes) == {}
    assert set(report(**changes, model__lr=1e-3)) == {"model.lr"}
    sentence = scope(put(ade20k, {"data.dataset": "camvid"}))
    assert sentence.startswith("The paper does not have the data set camvid: compared with")


def test_other_networks_have_no_recipe(ade20k):
    for path in ("segformer_pl.models.SegFormer", "mine.segformer_b0", None):
        config = put(ade20k, {"model.network.class_path": path})
        assert departures(config) == []
        assert remarks(config) == []
        sentence = ": there is no published recipe for it, nothing is compared."
        assert scope(config).endswith(sentence)
    path = "segformer_pl.models.segformer.segformer_b0"  # the module that defines it
    assert scope(put(ade20k, {"model.network.class_path": path})) == scope(ade20k)


def test_remark_on_the_class_count_of_coco_stuff(ade20k):
    for name in ("coco_stuff171", "coco_stuff182"):
        assert "UNVERIFIED" in remarks(put(ade20k, {"data.dataset": name}))[-1]
    assert not any("UNVERIFIED" in remark for remark in remarks(ade20k))


def test_empty_configuration():
    assert departures({}) == []
    assert scope({}).startswith("The network is not stated: ")


# Arguments that are not compared.
FREE = {
    "model": {
        *("network", "loss", "inference"),  # their arguments are compared
        *("class_names", "palette", "ignore_index"),  # follow from the data set
        *("match_classes", "weights_state"),  # how weights are loaded
        "momentum",  # AdamW has none, and the task refuses another value than the default
    },
    "data": {
        *("dataset", "path", "seed", "num_bands"),  # data and random numbers
        *("batch_size", "num_workers", "eval_batch_size", "on_bad_sample"),
    },
    "model.network.init_args": {"num_classes", "kwargs", "embed_dims", "depths"},
    "model.loss.init_args": set(),
    PROTOCOL.rstrip("."): {"scales", "flip"},
}


@pytest.mark.parametrize(
    ("prefix", "makers"),
    [
        ("model", [SegmentationTask]),
        ("data", [StreamingSegmentationData]),
        ("model.network.init_args", [models.segformer_b0, models.MixTransformer]),
        ("model.loss.init_args", [CrossEntropy]),
        (PROTOCOL.rstrip("."), [Inference]),
    ],
)
def test_no_argument_is_forgotten(prefix, makers):
    arguments = {name for make in makers for name in inspect.signature(make).parameters}
    compared = {key.rpartition(".")[2] for key in COMPARED if key.rpartition(".")[0] == prefix}
    compared |= {"weights", "encoder_weights"} & arguments
    assert arguments - FREE[prefix] == compared
