"""A study that goes on with other data, edited evaluations, or in a folder that is read-only."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from segformer_pl.analysis.run import Run
from segformer_pl.cli import main
from segformer_pl.data import shapes

pytestmark = pytest.mark.slow

TRAINER = {
    "max_steps": 1,
    "val_check_interval": 1,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
    "enable_model_summary": False,
}


def write_study(folder, data, **entries):
    """Write a study of one variant of a small network; -> the study file."""
    base = {
        "trainer": TRAINER,
        "model": {"network": {"class_path": "arena_networks.Small"}, "warmup_steps": 1},
        "data": {"path": str(data), "batch_size": 2, "eval_batch_size": 4, "num_workers": 0},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "question": "Does it matter?",
        "base": "base.yaml",
        "variants": {"plain": {}},
        "seeds": [0],
        "budgets": {"small": {}},
        **entries,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def finished(folder, place, start_command):
    """A study with a finished run and an evaluation, and its folder."""
    file, output = place / "tiny.yaml", place / "out"
    if not output.is_dir():
        evaluations = {"at_96": {"model.inference.base_size": [96, 96]}}
        write_study(place, folder, evaluations=evaluations)
        process = start_command(["ablate", file, f"--output={output}"], figures=False)
        assert process.wait(400) == 0, process.output
    return file, output


def files_of(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_other_data_are_refused_before_anything_is_trained(
    finished, folder, tmp_path, fail, capsys
):
    study, output = finished
    arguments = ["ablate", str(study), f"--output={output}"]
    other, moved = tmp_path / "other", tmp_path / "moved"
    shapes.generate(other, {"train": 6, "validation": 4})
    shutil.copytree(folder, moved)
    before = files_of(output)
    (run,) = (output / "tiny").glob("plain.seed0.*")
    # One more seed, so that there is something to train.
    write_study(study.parent, folder, seeds=[0, 1])
    try:
        for options in ([], ["--dry-run"], ["--report"]):
            error = fail(capsys, [*arguments, f"--data.path={other}", *options])
            assert f"data.path '{other}' has 6 images of shapes" in error
            assert f"but the run '{run}' of this study was trained on 8 images of shapes" in error
            assert f"its data.path is '{folder}'" in error
        error = fail(capsys, [*arguments, f"--data.path={tmp_path / 'none'}"])
        assert f"there is no folder '{tmp_path / 'none'}'" in error
        assert f"(the data of the study are compared with those of its run '{run}'" in error
        main([*arguments, f"--data.path={moved}", "--dry-run"])  # the same data elsewhere
        assert "1 done, 0 failed, 1 left" in " ".join(capsys.readouterr().out.split())
    finally:
        write_study(study.parent, folder)
    assert files_of(output) == before


def test_data_that_changed_in_place_are_other_data(finished, folder, tmp_path, fail, capsys):
    _, output = finished
    output = shutil.copytree(output, tmp_path / "out")
    (run,) = (output / "tiny").glob("plain.seed0.*")
    data = shutil.copytree(folder, tmp_path / "data")
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(folder), str(data))
    )
    file = write_study(tmp_path, data)
    main(["ablate", str(file), f"--output={output}", "--dry-run"])
    shutil.rmtree(data)
    shapes.generate(data, {"train": 6, "validation": 4})
    error = fail(capsys, ["ablate", str(file), f"--output={output}", "--dry-run"])
    assert f"data.path '{data}' has 6 images" in error
    shutil.rmtree(data)  # as seen from a machine that does not have them
    main(["ablate", str(file), f"--output={output}", "--dry-run"])


def test_data_that_do_not_exist_are_refused_once(folder, tmp_path, fail, capsys):
    file = write_study(tmp_path, tmp_path / "none")
    output = tmp_path / "out"
    assert "none'" in fail(capsys, ["ablate", str(file), f"--output={output}"])
    assert not output.exists()


def test_edited_evaluations_are_noticed(finished, folder, tmp_path, fail, capsys):
    _, output = finished
    (run,) = (output / "tiny").glob("plain.seed0.*")
    edited = {"at_96": {"model.inference.base_size": [128, 96]}}
    file = write_study(tmp_path, folder, evaluations=edited)
    for options in ([], ["--report"]):
        error = fail(capsys, ["ablate", str(file), f"--output={output}", *options])
        assert f"'{run / 'evaluations' / 'at_96'}' was made with the settings" in error
        assert "[96, 96]" in error
        assert "[128, 96]" in error
        assert f"rm -r {output}/tiny/*/evaluations/at_96" in error
    both = {"at_96": {"model.inference.base_size": [96, 96]}, "wide": edited["at_96"]}
    file = write_study(tmp_path, folder, evaluations=both)
    main(["ablate", str(file), f"--output={output}", "--dry-run"])
    assert "0 done, 0 failed, 1 left" in " ".join(capsys.readouterr().out.split())


def test_the_values_of_the_seeds_are_tidy(finished):
    _, output = finished
    report = output / "tiny" / "report_small"
    seeds = pd.read_csv(report / "seeds.csv")
    (run,) = (output / "tiny").glob("plain.seed0.*")
    (row,) = seeds.query("protocol == 'at_96' and measure == 'miou'").to_dict("records")
    named = Run(run).named_evaluations["at_96"].last_evaluation()
    assert (row["variant"], row["seed"]) == ("plain", 0)
    assert row["value"] == pytest.approx(named.miou)


def test_invalid_settings_are_refused_in_both_commands(folder, tmp_path, fail, capsys):
    file = write_study(tmp_path, folder, variants={"plain": {}, "bad": {"model.lr": -1}})
    for command in ("ablate", "arena"):
        error = fail(capsys, [command, str(file), f"--output={tmp_path / 'out'}"])
        assert f"{file}: variant 'bad': model.lr is -1" in error
    evaluations = {"bad": {"model.inference": {"window": [32, 32], "stride": [64, 64]}}}
    file = write_study(tmp_path, folder, evaluations=evaluations)
    for command in ("ablate", "arena"):
        error = fail(capsys, [command, str(file), f"--output={tmp_path / 'out'}"])
        assert f"{file}: evaluations: 'bad' of variant 'plain': " in error
    assert not (tmp_path / "out").exists()


def test_a_sweep_overwrites_nothing(folder, tmp_path, fail, capsys):
    file = write_study(tmp_path, folder)
    sweep = tmp_path / "sweep.yaml"
    arguments = ["ablate", str(file), f"--wandb-sweep={sweep}"]
    main(arguments)
    before = files_of(tmp_path)
    assert f"'{sweep}' exists already; remove it or give" in fail(capsys, arguments)
    sweep.unlink()
    config = tmp_path / "sweep_configs" / "plain.small.yaml"
    assert f"'{config}' exists already; remove it or give" in fail(capsys, arguments)
    del before[sweep]
    assert files_of(tmp_path) == before
