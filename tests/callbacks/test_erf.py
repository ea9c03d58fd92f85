"""The ERF callback: the same images at each validation, all ranks, logged curves."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from segformer_pl.analysis.erf import effective_receptive_field
from segformer_pl.analysis.report.curves import draw_charts
from segformer_pl.analysis.run import Run
from segformer_pl.callbacks import EffectiveReceptiveField
from segformer_pl.models import segformer_b0
from segformer_pl.task import SegmentationTask

LAYERS = ["stage1", "stage2", "stage3", "stage4", "head"]


def make_task():
    torch.manual_seed(0)
    return SegmentationTask(segformer_b0(2), ["a", "b"], [[0, 0, 0], [9, 9, 9]], warmup_steps=0)


def samples(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, 32, 48, generator=generator),
            "label": torch.randint(0, 2, (32, 48), generator=generator),
            "id": f"image-{number}",
        }
        for number in range(count)
    ]


def fit(callback, folder, max_steps=4):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=2,
        num_sanity_val_steps=1,
        logger=CSVLogger(folder, name="run"),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = make_task()
    trainer.fit(task, DataLoader(samples(4), batch_size=2), DataLoader(samples(5), batch_size=2))
    return task, folder / "run" / "version_0"


@pytest.mark.slow
def test_curves_are_those_of_the_network_on_the_first_images(tmp_path):
    task, run = fit(EffectiveReceptiveField(3), tmp_path)
    columns = Run(run).metrics
    images = torch.stack([sample["image"] for sample in samples(3)])
    erf = effective_receptive_field(task.network, images, preprocess=task.normalize)
    for layer in LAYERS:
        series = columns[f"val/erf/{layer}/radius50"]
        assert list(series.step) == [2, 4]
        assert series.last == pytest.approx(erf[layer].radius(0.5))
        radius95 = columns[f"val/erf/{layer}/radius95"].last
        assert radius95 == pytest.approx(erf[layer].radius(0.95))
        area50 = erf[layer].interval(lambda erf: erf.area_ratio(0.5)).value
        assert columns[f"val/erf/{layer}/area50"].last == pytest.approx(area50)
    titles = [chart["title"] for chart in draw_charts(columns, "CrossEntropy")]
    assert "Effective receptive field" in titles
    svg = draw_charts(columns, "CrossEntropy")[titles.index("Effective receptive field")]["svg"]
    assert svg.index(">stage1<") < svg.index(">stage4<") < svg.index(">head<")
    assert [file.name for file in sorted((run / "erf").iterdir())] == [
        *("step_0000002.png", "step_0000004.png")
    ]


@pytest.mark.slow
def test_every_n_steps_skips_validations(tmp_path):
    callback = EffectiveReceptiveField(2, every_n_steps=3)
    _, run = fit(callback, tmp_path, max_steps=8)
    assert sorted(file.name for file in (run / "erf").iterdir()) == [
        *("step_0000002.png", "step_0000006.png")
    ]
    assert [name for batch in callback.batches for name in batch["id"]] == [
        "image-0",
        "image-1",
    ]


def batch(numbers):
    selected = [samples(6)[number] for number in numbers]
    return {
        "image": torch.stack([sample["image"] for sample in selected]),
        "id": [sample["id"] for sample in selected],
        "skipped": {"image-1": "damaged"},
    }


def test_ranks_are_merged_also_if_one_has_no_image(monkeypatch):
    task = make_task()
    callback = EffectiveReceptiveField(4)
    trainer = SimpleNamespace(world_size=3, sanity_checking=False)
    # ceil(4 images / 3 ranks) = 2 images for each rank; a damaged one is replaced by the next.
    callback.on_validation_batch_end(trainer, task, None, batch([0, 1, 2, 3]), 0)
    assert [name for kept in callback.batches for name in kept["id"]] == ["image-0", "image-2"]
    other = effective_receptive_field(
        task.network, batch([4, 5])["image"], preprocess=task.normalize
    )

    def gather(parts, own):
        parts[:] = [own, other, None]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    merged = callback._measure(trainer, task)
    whole = effective_receptive_field(
        task.network, batch([0, 2, 4, 5])["image"], preprocess=task.normalize
    )
    assert merged.num_images == 4
    for layer in LAYERS:
        np.testing.assert_allclose(merged[layer].mean, whole[layer].mean, rtol=1e-5)
        np.testing.assert_allclose(merged[layer].variance, whole[layer].variance, rtol=1e-3)


def test_ranks_with_different_image_sizes_use_the_most_frequent_size(monkeypatch):
    task = make_task()
    callback = EffectiveReceptiveField(6)
    trainer = SimpleNamespace(world_size=3, sanity_checking=False)
    callback.on_validation_batch_end(trainer, task, None, batch([0]), 0)
    large, small = torch.rand(1, 3, 64, 64), batch([2, 3])["image"]
    others = [
        effective_receptive_field(task.network, images, preprocess=task.normalize)
        for images in (large, small)
    ]

    for rank in (0, 1):

        def gather(parts, own, rank=rank):
            parts[:] = [*others[:rank], own, *others[rank:]]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        with pytest.warns(UserWarning, match="2 sizes.*only the 3 of 32x48 pixels are used"):
            merged = callback._measure(trainer, task)
        assert merged.num_images == 3
        assert merged.settings["image_size"] == [32, 48]


def test_an_image_of_another_size_is_left_out_with_a_warning():
    callback = EffectiveReceptiveField(4)
    trainer = SimpleNamespace(world_size=1, sanity_checking=False)
    callback.on_validation_batch_end(trainer, None, None, batch([0]), 0)
    other = batch([2]) | {"image": torch.rand(1, 3, 64, 64)}
    with pytest.warns(UserWarning, match="'image-2' has another size"):
        callback.on_validation_batch_end(trainer, None, None, other, 1)
    assert len(callback.batches) == 1


def test_a_diverged_run_continues():
    task = make_task()
    with torch.no_grad():
        task.network.head.bn.weight.fill_(torch.nan)
        task.network.encoder.stages[0].norm.weight.fill_(torch.nan)
    callback = EffectiveReceptiveField(1)
    trainer = SimpleNamespace(world_size=1, sanity_checking=False)
    callback.on_validation_batch_end(trainer, None, None, batch([0]), 0)
    with pytest.warns(UserWarning, match="gradient of 1 was not finite"):
        assert callback._measure(trainer, task) is None
