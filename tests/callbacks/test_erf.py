"""Receptive fields over a training: the same pictures each time, of all ranks, as curves."""

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
            "id": f"picture-{number}",
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
def test_curves_are_those_of_the_network_on_the_first_pictures(tmp_path):
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
        area50 = erf[layer].interval(lambda field: field.area_ratio(0.5)).value
        assert columns[f"val/erf/{layer}/area50"].last == pytest.approx(area50)
    titles = [chart["title"] for chart in draw_charts(columns, "CrossEntropy")]
    assert "Effective receptive field" in titles
    svg = draw_charts(columns, "CrossEntropy")[titles.index("Effective receptive field")]["svg"]
    assert svg.index(">stage1<") < svg.index(">stage4<") < svg.index(">head<")
    assert [file.name for file in sorted((run / "erf").iterdir())] == [
        *("step_0000002.png", "step_0000004.png")
    ]


@pytest.mark.slow
def test_every_n_steps_thins_it_out(tmp_path):
    callback = EffectiveReceptiveField(2, every_n_steps=3)
    _, run = fit(callback, tmp_path, max_steps=8)
    assert sorted(file.name for file in (run / "erf").iterdir()) == [
        *("step_0000002.png", "step_0000006.png")
    ]
    assert [name for batch in callback.batches for name in batch["id"]] == [
        "picture-0",
        "picture-1",
    ]


def batch(numbers):
    chosen = [samples(6)[number] for number in numbers]
    return {
        "image": torch.stack([one["image"] for one in chosen]),
        "id": [one["id"] for one in chosen],
        "skipped": {"picture-1": "damaged"},
    }


def test_ranks_are_summed_up_and_one_without_a_picture_is_none(monkeypatch):
    task = make_task()
    callback = EffectiveReceptiveField(4)
    trainer = SimpleNamespace(world_size=3, sanity_checking=False)
    # Of four pictures two fall to each of three ranks; a damaged one does not count.
    callback.on_validation_batch_end(trainer, task, None, batch([0, 1, 2, 3]), 0)
    assert [name for kept in callback.batches for name in kept["id"]] == ["picture-0", "picture-2"]
    other = effective_receptive_field(
        task.network, batch([4, 5])["image"], preprocess=task.normalize
    )

    def gather(parts, own):
        parts[:] = [own, other, None]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    found = callback._measure(trainer, task)
    whole = effective_receptive_field(
        task.network, batch([0, 2, 4, 5])["image"], preprocess=task.normalize
    )
    assert found.num_images == 4
    for layer in LAYERS:
        np.testing.assert_allclose(found[layer].mean, whole[layer].mean, rtol=1e-5)
        np.testing.assert_allclose(found[layer].variance, whole[layer].variance, rtol=1e-3)


def test_ranks_whose_first_pictures_differ_in_size_take_that_of_the_most(monkeypatch):
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
        with pytest.warns(UserWarning, match="2 sizes.*the 3 of 32x48 pixels are taken"):
            found = callback._measure(trainer, task)
        assert found.num_images == 3
        assert found.settings["image_size"] == [32, 48]


def test_a_picture_of_another_size_is_passed_over_aloud():
    callback = EffectiveReceptiveField(4)
    trainer = SimpleNamespace(world_size=1, sanity_checking=False)
    callback.on_validation_batch_end(trainer, None, None, batch([0]), 0)
    other = batch([2]) | {"image": torch.rand(1, 3, 64, 64)}
    with pytest.warns(UserWarning, match="'picture-2' is of another size"):
        callback.on_validation_batch_end(trainer, None, None, other, 1)
    assert len(callback.batches) == 1


def test_a_run_that_diverged_goes_on():
    task = make_task()
    with torch.no_grad():
        task.network.head.bn.weight.fill_(torch.nan)
        task.network.encoder.stages[0].norm.weight.fill_(torch.nan)
    callback = EffectiveReceptiveField(1)
    trainer = SimpleNamespace(world_size=1, sanity_checking=False)
    callback.on_validation_batch_end(trainer, None, None, batch([0]), 0)
    with pytest.warns(UserWarning, match="gradient of 1 was not finite"):
        assert callback._measure(trainer, task) is None
