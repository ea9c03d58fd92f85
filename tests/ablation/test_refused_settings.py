"""Values that would end every run in an error are refused before the first one."""

import pytest
import torch

from segformer_pl.ablation.run_settings import check_evaluations
from segformer_pl.ablation.study import read_study
from segformer_pl.cli.building import resolve_and_build
from segformer_pl.cli.training import resolve
from segformer_pl.errors import UserError

pytestmark = pytest.mark.slow

STRIDE = {"model.inference": {"window": [32, 32], "stride": [64, 64]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.lr": -1}, r"model\.lr is -1.*give a finite number of at least 0"),
        ({"model.warmup_steps": -5}, r"model\.warmup_steps.*-5"),
        ({"model.layer_decay": 2}, r"layer_decay=2.*at most 1"),
        ({"model.min_lr": 1}, r"model\.min_lr is 1, but the learning rate"),
        ({"model.image_std": [1, 0, 1]}, r"model\.image_std is \[1.*0.*give finite numbers above"),
        ({"model.momentum": 0.5}, r"model\.momentum is 0\.5, but adamw has no such setting"),
        (STRIDE, r"a stride of .* leaves gaps"),
        ({"data.scale_range": [2, 1]}, r"scale_range"),
        ({"trainer.max_epochs": 3}, r"trainer\.max_epochs is 3"),
        ({"trainer.overfit_batches": 2}, r"trainer\.overfit_batches is 2"),
        ({"trainer.limit_train_batches": 1.5}, r"limit_train_batches"),
        ({"trainer.enable_checkpointing": False}, r"trainer\.enable_checkpointing is false"),
        ({"trainer.devices": 0}, r"trainer\.devices is 0; give a number of at least 1"),
        ({"trainer.num_nodes": 0}, r"trainer\.num_nodes is 0; give a number of at least 1"),
        ({"trainer.fast_dev_run": True}, r"trainer\.fast_dev_run is True"),
        ({"trainer.callbacks": [{"class_path": "planted_error.Fails"}]}, "planted here"),
    ],
)
def test_values_out_of_range_name_study_variant_and_setting(
    write_study, tmp_path, monkeypatch, changes, message
):
    (tmp_path / "planted_error.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Fails(pl.Callback):\n"
        "    def __init__(self):\n"
        "        raise TypeError('planted\\nhere')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write_study(variants={"bad": changes})
    with pytest.raises(UserError, match=message) as error:
        read_study(file, "small", resolve_and_build)
    assert str(error.value).startswith(f"{file}: variant 'bad': ")
    assert "\n" not in str(error.value)


def test_settings_are_those_that_nothing_was_built_for(write_study):
    file = write_study(variants={"plain": {}})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    built = read_study(file, "small", resolve_and_build).variants[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert built == read_study(file, "small", resolve).variants[0]


def test_the_machine_is_that_of_the_runs(write_study, monkeypatch):
    """A study for GPUs is submitted on a machine without, and inside of a Slurm job."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "shell")
    trainer = {"accelerator": "gpu", "devices": 2, "num_nodes": 2, "strategy": "ddp"}
    trainer |= {"precision": "16-mixed", "sync_batchnorm": True}
    file = write_study({"trainer": trainer}, variants={"plain": {}})
    assert len(read_study(file, "small", resolve_and_build).variants) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (STRIDE, "a stride of .* leaves gaps"),
        ({"model.inference.base_size": [-1, 96]}, "base_size"),
        ({"model.inference.scales": []}, "scales is empty"),
        ({"model.inference.size": 96}, "size"),
        ({"model.network.init_args.kv_border": "cut"}, "kv_border"),
        ({"data.eval_batch_size": 0}, "eval_batch_size"),
        ({"trainer.limit_val_batches": -1}, "limit_val_batches"),
    ],
)
def test_evaluations_are_checked_as_validate_reads_them(write_study, settings, message):
    file = write_study(variants={"plain": {}}, evaluations={"bad": settings})
    study = read_study(file, "small", resolve)
    with pytest.raises(UserError, match=message) as error:
        check_evaluations(study, resolve_and_build)
    assert str(error.value).startswith(f"{file}: evaluations: 'bad' of variant 'plain': ")
    assert "\n" not in str(error.value)


def test_an_evaluation_that_does_not_fit_one_of_the_networks_is_refused(write_study):
    other = {"model.network": {"class_path": "segformer_pl.models.deeplabv3plus"}}
    evaluations = {
        "scales": {"model.inference.scales": [1, 2]},
        "kept": {"model.network.init_args.kv_border": "keep"},
    }
    file = write_study(variants={"plain": {}, "other": other}, evaluations=evaluations)
    with pytest.raises(UserError, match=r"'kept' of variant 'other': .*kv_border"):
        check_evaluations(read_study(file, "small", resolve), resolve_and_build)


def test_seeds_fit_the_random_number_generators(write_study):
    with pytest.raises(UserError, match="seeds: 4294967296 is too large"):
        read_study(write_study(seeds=[0, 2**32]), "small", resolve)


def test_variants_on_other_data_are_refused(write_study):
    other = {"model.lr": 0.1, "data.path": "elsewhere"}
    file = write_study(variants={"plain": {}, "other": other})
    with pytest.raises(UserError, match=r"data\.path is None in variant 'plain' and elsewhere in"):
        read_study(file, "small", resolve)
