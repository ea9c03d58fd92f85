"""The published recipes of the systems: their values, and the files in experiments/recipes."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import yaml

from segformer_pl import models
from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.recipes import RECIPES
from segformer_pl.analysis.recipes.settings import NETWORK, NOT_STATED, PROTOCOL
from segformer_pl.cli.training import resolve

ROOT = Path(__file__).parents[2]


def files_of(file):
    """Return the files that the command in a header merges, a base first."""
    return [
        ROOT / name for name in re.findall(r"--config (experiments/[\w/]+\.yaml)", file.read_text())
    ]


def stated(file, *keys):
    """Return the value of a key in the files that a header merges; the last file wins."""
    found = None
    for one in files_of(file):
        value = yaml.safe_load(one.read_text())
        for key in keys:
            value = value.get(key, {})
        found = value or found
    return found


def system_of(file):
    return stated(file, "model", "network", "class_path").rpartition(".")[2]


# Those of SegFormer are tested in test_recipe.py.
FILES = [
    file
    for file in sorted(ROOT.glob("experiments/recipes/*.yaml"))
    if not file.stem.startswith("segformer_b")
    and files_of(file)[-1:] == [file]
    and stated(file, "model", "network")
]
CASES = [
    (name, number, dataset)
    for name, recipes in RECIPES.items()
    for number, recipe in enumerate(recipes)
    for dataset in range(len(recipe.datasets))
]


def config_of(name, number, dataset):
    """Return a configuration that has the value of the paper in every setting."""
    recipe = RECIPES[name][number]
    dataset = recipe.datasets[dataset]
    config = {}

    def put(key, value):
        *path, last = key.split(".")
        parent = config
        for part in path:
            parent = parent.setdefault(part, {})
        parent[last] = value

    put("model.network.class_path", f"segformer_pl.models.{name}")
    if recipe.backbones:
        put(f"{NETWORK}backbone", f"{recipe.backbones[-1]}.some_tag")
    for setting in (*recipe.settings, *dataset.all_settings()):
        put(setting.key, setting.paper)
    put(f"{PROTOCOL}scales", [1.0])
    put(f"{PROTOCOL}flip", False)
    put("model.encoder_weights", "encoder.pth")
    put("data.dataset", dataset.names[0])
    put("data.batch_size", (dataset.samples_per_step or 16) // 4)
    for key, value in {"devices": 2, "num_nodes": 2, "accumulate_grad_batches": 1}.items():
        put(f"trainer.{key}", value)
    put("trainer.sync_batchnorm", True)
    put("trainer.val_check_interval", dataset.validation_interval)
    return config


def changed(config, key, value):
    """Return a copy with another value; ``...`` removes the key."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    parent = config
    for part in path:
        parent = parent[part]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return config


@pytest.mark.parametrize(("name", "number", "dataset"), CASES)
def test_every_planted_change_of_every_recipe_is_reported(name, number, dataset):
    config = config_of(name, number, dataset)
    recipe = RECIPES[name][number]
    stated = [*recipe.settings, *recipe.datasets[dataset].all_settings()]
    assert departures(config) == []
    title = recipe.datasets[dataset].title
    assert scope(config) == f"Compared with the paper's recipe for {recipe.title} on {title}."
    keys = [setting.key for setting in stated]
    assert len(set(keys)) == len(keys)  # no two recipes of one setting
    for setting in stated:
        for wrong in ("something else", ...):
            if wrong is ... and NOT_STATED in setting.same:
                continue
            (one,) = departures(changed(config, setting.key, wrong))
            assert (one.setting, one.source) == (setting.key, setting.source)
            assert one.source
        for same in setting.same:
            same = ... if same is NOT_STATED else same
            assert departures(changed(config, setting.key, same)) == []


@pytest.mark.parametrize(("name", "number", "dataset"), CASES)
def test_computed_settings_of_every_recipe(name, number, dataset):
    config = config_of(name, number, dataset)
    recipe, dataset = RECIPES[name][number], RECIPES[name][number].datasets[dataset]

    def reported(key, value):
        return [one.setting for one in departures(changed(config, key, value))]

    assert reported("model.encoder_weights", None) == ["model.encoder_weights"]
    assert reported("model.weights", "whole.pth") == ["model.weights"]
    pretrained = changed(config, f"{NETWORK}pretrained", True)
    assert departures(changed(pretrained, "model.encoder_weights", None)) == []
    assert reported("data.batch_size", 1000) == ["data.batch_size"] * bool(dataset.samples_per_step)
    expected = ["trainer.sync_batchnorm"] * bool(recipe.batch_norm)
    assert reported("trainer.sync_batchnorm", False) == expected
    if dataset.validation_interval:
        assert reported("trainer.val_check_interval", 7) == ["trainer.val_check_interval"]
    for scales in dataset.scales:
        multi = changed(config, f"{PROTOCOL}flip", True)
        assert departures(changed(multi, f"{PROTOCOL}scales", list(scales))) == []
    if recipe.backbones:
        assert f"{NETWORK}backbone" in reported(f"{NETWORK}backbone", "resnet18")


def test_values_of_the_papers():
    """Copied by hand from the papers and the released configurations.

    lr, head multiplier, weight decay, power, floor | steps, samples per step, crop, window, stride
    """
    rows = {
        "setr_naive ade20k": "0.001 10 0 0.9 0.0001 160000 16 (512, 512) 512 341",
        "setr_naive cityscapes": "0.01 10 0 0.9 0.0001 80000 8 (768, 768) 768 512",
        "setr_pup ade20k": "0.001 10 0 0.9 0.0001 160000 16 (512, 512) 512 341",
        "setr_pup cityscapes": "0.01 10 0 0.9 0.0001 80000 8 (768, 768) 768 512",
        "setr_mla ade20k": "0.001 10 0 0.9 0.0001 160000 16 (512, 512) 512 341",
        "setr_mla cityscapes": "0.01 10 0 0.9 0.0001 80000 8 (768, 768) 768 512",
        "maskformer ade20k": "1e-05 10 0.0001 0.9 0 160000 16 (512, 512) None None",
        "maskformer cityscapes": "1e-05 10 0.0001 0.9 0 90000 16 (512, 1024) None None",
        "maskformer_swin ade20k": "6e-05 1 0.01 0.9 0 160000 16 (512, 512) None None",
        "semask_fpn ade20k": "0.0001 1 0.0001 1 0 80000 16 (512, 512) None None",
        "semask_fpn cityscapes": "0.001 1 0.05 1 0 80000 8 (768, 768) None None",
        "deeplabv3plus ade20k": "0.007 1 0.0001 0.9 0 150000 None (513, 513) None None",
        "deeplabv3plus cityscapes": "0.007 1 0.0001 0.9 0 90000 None (769, 769) None None",
        "deeplabv3plus_mmseg ade20k": "0.01 1 0.0005 0.9 0.0001 160000 16 (512, 512) None None",
        "deeplabv3plus_mmseg cityscapes": "0.01 1 0.0005 0.9 0.0001 80000 8 (512, 1024) None None",
    }
    found = {}
    for name, (recipe, *_) in RECIPES.items():
        for dataset in recipe.datasets:
            values = {one.key: one.paper for one in (*recipe.settings, *dataset.all_settings())}
            keys = ("lr", "head_lr_mult", "weight_decay", "poly_power", "min_lr")
            row = [values[f"model.{key}"] for key in keys]
            row += [dataset.max_steps, dataset.samples_per_step, dataset.crop]
            found[f"{name} {dataset.names[0]}"] = " ".join(
                map(str, [*row, dataset.window, dataset.stride])
            )
    assert {key: row for key, row in found.items() if "segformer" not in key} == rows


def test_the_optimisers_warm_ups_and_clips():
    def values(name, number=0):
        return {one.key.rpartition(".")[2]: one.paper for one in RECIPES[name][number].settings}

    for name in RECIPES:
        is_sgd = name.startswith(("setr", "deeplab"))
        assert values(name)["optimizer"] == ("sgd" if is_sgd else "adamw")
        assert values(name).get("momentum") == (0.9 if is_sgd else None)
        assert values(name)["gradient_clip_val"] == (0.01 if "maskformer" in name else None)
        warms_up = name.startswith(("segformer", "semask")) or name == "maskformer_swin"
        assert values(name)["warmup_steps"] == (1500 if warms_up else 0)
        assert values(name)["photometric"] == (name != "deeplabv3plus")


def test_the_recipe_is_the_one_of_the_backbone():
    for name, backbone, crop in (
        ("semask_fpn", "swin_tiny_patch4_window7_224.ms_in1k", 512),
        ("semask_fpn", "swin_large_patch4_window12_384", 640),
        ("maskformer_swin", "swin_small_patch4_window7_224", 512),
        ("maskformer_swin", "swin_base_patch4_window12_384.ms_in22k", 640),
    ):
        config = changed(config_of(name, 0, 0), f"{NETWORK}backbone", backbone)
        listed = {one.setting: one.paper for one in departures(config)}
        assert listed.get("data.crop_size", "[512, 512]") == f"[{crop}, {crop}]"
    unknown = changed(config_of("semask_fpn", 0, 0), f"{NETWORK}backbone", "swinv2_tiny")
    (one,) = departures(unknown)
    assert (one.paper, one.here) == ("swin_tiny_patch4_window7_224", "swinv2_tiny")


def test_other_data_sets_and_remarks():
    config = changed(config_of("setr_mla", 0, 0), "data.dataset", "camvid")
    assert departures(config) == []
    assert departures(changed(config, "model.lr", 1.0)) == []  # the paper's differs by data set
    assert scope(config).endswith(
        "test size and windows, model.lr, model.network.init_args.image_size)."
    )
    assert [one.setting for one in departures(changed(config, "model.min_lr", 0))] == [
        "model.min_lr"
    ]
    assert any("neck of MLA" in text for text in remarks(config))
    assert not any("neck of MLA" in text for text in remarks(config_of("setr_pup", 0, 0)))
    assert any("warm-up begins at 1e-5" in text for text in remarks(config_of("semask_fpn", 0, 1)))
    texts = remarks(config_of("semask_fpn", 2, 1))
    assert not any("warm-up begins at" in text for text in texts)


def resolved(file):
    """Resolve the files of a header's command, with pretrained weights as on the command line."""
    config = resolve([str(one) for one in files_of(file)])
    return changed(config, f"{NETWORK}pretrained", True)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_files_have_no_departure_from_their_own_paper(file):
    config = resolved(file)
    assert departures(config) == []
    assert scope(config).startswith("Compared with the paper's recipe for ")
    # Every argument of the network is compared, or has no published value.
    free = {"backbone", "pretrained", "num_classes"}
    recipes = RECIPES[system_of(file)]
    known = {one.key for recipe in recipes for one in recipe.settings}
    known |= {one.key for recipe in recipes for data in recipe.datasets for one in data.settings}
    arguments = {NETWORK + name for name in config["model"]["network"]["init_args"].keys() - free}
    assert arguments == {key for key in known if key.startswith(NETWORK)}


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("segformer")])
def test_the_default_backbone_is_a_published_one(name):
    if not hasattr(models, name):
        pytest.skip(f"{name} is not part of segformer_pl.models")
    default = inspect.signature(getattr(models, name)).parameters["backbone"].default
    assert any(default in recipe.backbones for recipe in RECIPES[name])


@pytest.mark.parametrize("system", ["setr", "maskformer", "semask", "deeplabv3plus"])
def test_every_system_has_files_for_both_data_sets(system):
    if not any(hasattr(models, name) for name in RECIPES if name.startswith(system)):
        pytest.skip(f"{system} is not part of segformer_pl.models")
    files = [file for file in FILES if file.stem.startswith(f"{system}_")]
    datasets = {stated(file, "data", "dataset") for file in files}
    assert datasets == {"ade20k", "cityscapes"}
    assert all(system_of(file).startswith(system) for file in files)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_headers_have_the_published_figure(file):
    header = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"\d\d\.\d+\b", header), f"{file.name} states no published mIoU"
