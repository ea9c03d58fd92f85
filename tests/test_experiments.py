"""Every experiment file has a complete header, can be parsed and trains one step."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segformer_pl import models
from segformer_pl.cli import main
from segformer_pl.data.catalog import find_dataset

ROOT = Path(__file__).parents[1]
# Studies and their base are tested in ablation/test_study.py and cli/test_arena.py.
EXPERIMENTS = sorted(
    file
    for file in ROOT.glob("experiments/**/*.yaml")
    if file.parent.name not in ("ablations", "arena") and "results" not in file.parts
)


def header(file):
    return "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))


def configs(file):
    """Return the files that the command in a file's header merges: itself, or base and delta."""
    return [
        ROOT / name for name in re.findall(r"--config (experiments/[\w/]+\.yaml)", header(file))
    ]


def settings(files):
    """Merge the settings of files as plain data; later files take precedence."""

    def merge(base, delta):
        if not isinstance(base, dict) or not isinstance(delta, dict):
            return delta
        return base | {key: merge(base.get(key), value) for key, value in delta.items()}

    merged = {}
    for file in files:
        merged = merge(merged, yaml.safe_load(file.read_text()))
    return merged


# A base is trained with the delta in its command. Of the other systems one file each is trained, on
# a tiny backbone.
TINY_BACKBONES = {
    "setr_pup_l_ade20k_512_160k": {"backbone": "vit_tiny_patch16_224", "image_size": 32},
    "maskformer_r50_ade20k_512_160k": {"backbone": "resnet18"},
    "semask_fpn_ade20k_512_80k": {
        "backbone": "swin_tiny_patch4_window7_224",
        "embed_dim": 24,
        "depths": [1, 1, 1, 1],
    },
    "deeplabv3plus_r50_ade20k": {"backbone": "resnet18"},
}


def b0_of(file):
    """Return B0's file beside that of a larger SegFormer, on the same data and crops."""
    return file.with_name(re.sub("^segformer_b[1-5]", "segformer_b0", file.name))


LARGER = [file for file in EXPERIMENTS if b0_of(file) != file and b0_of(file).is_file()]
BUILT = [
    file
    for file in EXPERIMENTS
    if re.match("(segformer_b[1-5]|setr|maskformer|semask|deeplabv3plus)_", file.stem)
    and file not in LARGER
]
# They take half of the time. ADE20K has many classes, and the demo receptive fields.
WITH_FIGURES = ("camvid_b0", "demo", "segformer_b0_ade20k_512_160k")
TRAINED = [
    file
    for file in EXPERIMENTS
    if file.stem in TINY_BACKBONES
    or (file not in [*LARGER, *BUILT] and configs(file)[-1:] == [file])
]


@pytest.fixture
def tiny_copy(tmp_path):
    """Function data set name -> folder of random images with all raw label values of that set."""

    def write(name):
        entry = find_dataset(name)
        raw_values = entry.labels.raw_to_train or range(entry.labels.num_classes)
        values = [value for value in (*raw_values, *entry.labels.ignored) if value >= 0]
        rng = np.random.default_rng(0)
        for split in ("train", "validation"):
            stored = entry.splits.get(split, split)
            pixels = {
                "images": rng.integers(0, 256, (4, 48, 64, 3), np.uint8),
                "labels": rng.choice(values, (4, 48, 64)).astype(np.uint8),
            }
            for kind, arrays in pixels.items():
                folder = tmp_path / kind / stored
                folder.mkdir(parents=True)
                for number, array in enumerate(arrays):
                    Image.fromarray(array).save(folder / f"{number}.png")
        return tmp_path

    return write


def on_one_cpu(files):
    changes = ["accelerator=cpu", "devices=1", "strategy=auto", "sync_batchnorm=false"]
    return [*(f"--config={file}" for file in files), *(f"--trainer.{change}" for change in changes)]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_header_states_question_command_hardware_and_expectation(file):
    stated = [line.split()[1] for line in header(file).splitlines() if len(line.split()) > 1]
    for word in ("question", "command", "hardware", "expectation"):
        assert word in stated, f"{file.name} does not state its {word}"
    assert file in configs(file), f"the command of {file.name} does not use the file"
    assert all(named.is_file() for named in configs(file))


@pytest.mark.slow
@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_trains_one_step_and_validates(file, tiny_copy, tmp_path, request):
    has_figures = file.stem in WITH_FIGURES
    if not has_figures:
        request.getfixturevalue("without_figures")
    config = settings(configs(file))
    changes = {
        "data.path": tiny_copy(config["data"]["dataset"]),
        "data.batch_size": 2,
        "data.eval_batch_size": 2,
        "data.num_workers": 0,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": tmp_path / "runs",
    }
    if "crop_size" in config["data"]:
        changes["data.crop_size"] = "[32,64]"
    tiny = {"base_size": "[64,48]", "window": "[32,32]", "stride": "[24,24]"}
    for key in tiny.keys() & config["model"].get("inference", {}).get("init_args", {}).keys():
        changes[f"model.inference.init_args.{key}"] = tiny[key]
    for key, value in TINY_BACKBONES.get(file.stem, {}).items():
        changes[f"model.network.init_args.{key}"] = value
    main(
        ["fit", *on_one_cpu(configs(file)), *(f"--{key}={value}" for key, value in changes.items())]
    )
    (run,) = (tmp_path / "runs").glob("*/version_0")
    assert "val/miou" in (run / "metrics.csv").read_text()
    if has_figures:
        callbacks = {c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]}
        figures = {"PredictionPanel": "predictions", "EffectiveReceptiveField": "erf"}
        expected = {folder for callback, folder in figures.items() if callback in callbacks}
        assert {"report.html", "config.yaml"} | expected <= {path.name for path in run.iterdir()}


def check_size(file, network):
    """Compare the numbers of parameters with those in the header, if it states them by part."""
    stated = re.search(r"([\d.]+) M \(encoder\) \+ ([\d.]+) M \((?:head|decoders)\)", header(file))
    if stated is None:  # a base, or a file that states the size in its own words
        return
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    encoder = sum(sizes[name] for name in network.encoder_parameters())
    for size, millions in zip((encoder, sum(sizes.values()) - encoder), stated.groups()):
        # SegFormer's paper counts the parameters with 150 classes on every data set.
        assert size / 1e6 == pytest.approx(float(millions), abs=0.2)


@pytest.mark.parametrize("file", LARGER, ids=lambda file: file.stem)
def test_a_larger_segformer_differs_from_b0_in_its_network_only(file):
    """B0's file is trained above."""
    b0 = b0_of(file)
    variant = file.stem[: len("segformer_b1")]
    expected = yaml.safe_load(b0.read_text().replace("segformer_b0", variant))
    assert yaml.safe_load(file.read_text()) == expected
    assert [named for named in configs(file) if named != file] == [
        named for named in configs(b0) if named != b0
    ]
    with torch.device("meta"):  # shapes of the parameters without values
        check_size(file, getattr(models, variant)(num_classes=150))


@pytest.mark.slow
@pytest.mark.parametrize("file", BUILT, ids=lambda file: file.stem)
def test_another_network_can_be_built_and_has_the_stated_size(file):
    with torch.device("meta"):
        check_size(file, main(on_one_cpu(configs(file)), run=False).model.network)


def test_there_are_experiments():
    stems = {file.stem for file in EXPERIMENTS}
    assert stems >= {"demo", "camvid_b0", "ade20k", "cityscapes", "coco_stuff"}
    assert (len(LARGER), len(BUILT)) == (14, 19)
