"""Studies rebuilt from run folders: complete, unfinished, outdated and edited ones."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from segformer_pl.analysis.configuration import settings_digest, training_configuration
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.study_results import read_results
from segformer_pl.errors import UserError

COUNTS = np.array([[[5, 8, 6], [3, 6, 5]], [[2, 4, 3], [4, 5, 6]]])


@pytest.fixture
def study(tmp_path, write_run):
    folder = tmp_path / "demo"
    for variant in ("base", "wide"):
        for seed in (0, 1):
            write_run(folder, variant, seed, COUNTS, None if variant == "base" else {"width": 2})
    return folder


def refusal(folder, budget="small", digests=None):
    with pytest.raises(UserError) as error:
        read_results(folder, budget, digests)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_finished_study(study, write_run):
    (study / "report_small").mkdir()  # no run
    write_run(study, "base", 0, COUNTS, budget="full")
    results = read_results(study, "small")
    assert (results.name, results.question, results.budget) == ("demo", "Does it help?", "small")
    assert results.changes == {"base": {}, "wide": {"width": 2}}
    assert {variant: list(runs) for variant, runs in results.runs.items()} == {
        "base": [0, 1],
        "wide": [0, 1],
    }
    assert isinstance(results.runs["wide"][1], Run)
    assert (results.unfinished, results.outdated) == ([], [])


def test_unfinished_runs_are_described(study, write_run):
    write_run(study, "base", 2)
    write_run(study, "base", 3, COUNTS, step=5)
    failed = write_run(study, "wide", 2, changes={"width": 2})
    (failed / "failure.txt").write_text("error: no memory left\n")
    assert Run(failed).failure == "error: no memory left"
    write_run(study, "deep", 0, changes={"depth": 2})
    (only(study, "deep.*") / "config.yaml").unlink()  # killed before the training
    results = read_results(study, "small")
    assert results.unfinished == [
        "base, seed 2, has not been evaluated at all, of 10 steps",
        "base, seed 3, has been evaluated at step 5 of 10",
        "deep, seed 0, has not been evaluated at all, of 10 steps",
        "wide, seed 2, failed and has not been evaluated at all, of 10 steps: error: no memory "
        "left",
    ]
    assert list(results.runs["base"]) == [0, 1]
    assert results.runs["deep"] == {}


def test_run_without_its_named_evaluation_is_not_finished(tmp_path, write_run):
    run = write_run(tmp_path, "base", 0, COUNTS, named=["at_96", "at_48"])
    assert list(Run(run).named_evaluations) == ["at_48", "at_96"]
    assert list(read_results(tmp_path, "small").runs["base"]) == [0]
    shutil.rmtree(run / "evaluations" / "at_96")
    results = read_results(tmp_path, "small")
    assert results.runs["base"] == {}
    assert results.unfinished == ["base, seed 0, has not been evaluated as at_96"]


def test_reference_comes_first_and_then_the_order_of_the_study(tmp_path, write_run):
    for variant in ("zoom", "base", "area"):
        write_run(tmp_path, variant, 0, COUNTS, variants=["zoom", "base", "area"])
    results = read_results(tmp_path, "small")
    assert list(results.runs) == list(results.changes) == ["base", "zoom", "area"]
    given = {name: Run(only(tmp_path, f"{name}.*")).ablation["digest"] for name in ("base", "zoom")}
    results = read_results(tmp_path, "small", given)
    assert list(results.runs) == ["base", "zoom"]
    (sentence,) = results.outdated
    assert "of a variant that the study no longer has" in sentence


def test_runs_of_earlier_settings_do_not_count(study, write_run):
    old = [only(study, f"wide.seed{seed}.*") for seed in (0, 1)]
    for run in old:
        os.utime(run / "ablation.json", (1e9, 1e9))
    new = write_run(study, "wide", 0, COUNTS, {"width": 3})
    results = read_results(study, "small")
    assert {seed: run.folder for seed, run in results.runs["wide"].items()} == {0: new}
    assert results.changes["wide"] == {"width": 3}
    assert len(results.outdated) == 2
    assert all(f"'{run.name}' has other settings" in str(results.outdated) for run in old)

    digests = {
        name: Run(only(study, f"{name}.seed1.*")).ablation["digest"] for name in results.runs
    }
    results = read_results(study, "small", digests)
    assert [run.folder for run in results.runs["wide"].values()] == old
    assert "all 5 runs" in refusal(study, digests={"base": "00000000"})


def test_no_runs(study, tmp_path):
    assert "no run of a study, and none of budget 'small'" in refusal(tmp_path / "nowhere")
    assert "only runs of budget small, and none of budget 'full'" in refusal(study, "full")


@pytest.mark.parametrize("content", ["{", "[]", '{"study": "demo"}'])
def test_damaged_ablation_file(study, content):
    (only(study, "wide.seed1.*") / "ablation.json").write_text(content)
    assert "does not hold the place of a run in a study" in refusal(study)


def test_settings_edited_by_hand(study):
    file = only(study, "wide.seed1.*") / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["lr"] = 0.2
    file.write_text(yaml.safe_dump(config))
    message = refusal(study)
    assert f"the settings in '{file}'" in message
    assert "edited after the run was started" in message


def test_weights_of_a_transplant_count_as_those_that_the_study_states(tmp_path, write_run):
    counts = np.full((3, 2, 3), 4)
    run = write_run(tmp_path, "base", 0, counts, transplant="mit_b0.pth")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["weights"] = "mit_b0.pth"
    digest = settings_digest(training_configuration({0: config}, None))
    config["model"]["weights"] = "made_for_this_run.safetensors"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "were edited" in refusal(tmp_path)
    edit(run / "ablation.json", digest=digest)
    run.rename(tmp_path / f"base.seed0.small.{digest}")
    assert list(read_results(tmp_path, "small").runs["base"]) == [0]


def test_folder_renamed_by_hand(study):
    run = only(study, "wide.seed1.*")
    for name in (run.with_suffix(".00000000").name, run.name.replace("seed1", "seed5")):
        renamed = run.rename(study / name)
        assert "does not end with '.seed1.small." in refusal(study)
        renamed.rename(run)


def test_seed_edited_by_hand(study):
    run = only(study, "wide.seed1.*")
    edit(run / "ablation.json", seed=7)
    assert "does not end with '.seed7.small." in refusal(study)
    run.rename(study / run.name.replace("seed1", "seed7"))
    assert "the seed 1 and ablation.json the seed 7" in refusal(study)


def test_copied_folder(study):
    run = only(study, "wide.seed1.*")
    copy = shutil.copytree(run, study / f"{run.name} (copy)")
    assert "does not end with" in refusal(study)
    copy.rename(study / f"copy of {run.name}")
    assert "are both seed 1 of variant 'wide'" in refusal(study)


def test_different_training_data(study, write_run):
    write_run(study, "wide", 2, COUNTS, {"width": 2}, fingerprint="a-c")
    message = refusal(study)
    assert "was trained on 4 images of shapes, fingerprint b" in message
    assert "fingerprint c" in message


def test_unknown_training_data(study):
    file = only(study, "wide.seed1.*") / "training_data.json"
    for text in ("{}", "no JSON"):
        file.write_text(text)
        message = refusal(study)
        assert str(file.parent) in message
        assert "missing or damaged" in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"class_names": ["class 1", "class 0"]}, "2 classes and"),
        ({"ids": ["image 0", "image 7"]}, "hold 1 image in common"),
        ({"counts": COUNTS + np.array([0, 1, 0])}, "the labels of 2 of 2 images"),
    ],
)
def test_different_evaluated_data(study, changes, part, write_run, make_evaluation):
    counts = changes.pop("counts", COUNTS)
    write_run(study, "wide", 2, changes={"width": 2}, written=make_evaluation(counts, **changes))
    assert part in refusal(study)


def test_different_numbers_of_steps(study, write_run):
    write_run(study, "long", 0, COUNTS, {"depth": 1}, max_steps=20, step=20)
    assert "for 10 steps and" in refusal(study)


def test_number_of_steps_may_be_the_axis(study, write_run):
    write_run(study, "long", 0, COUNTS, {"trainer.max_steps": 20}, max_steps=20, step=20)
    assert list(read_results(study, "small").runs["long"]) == [0]


@pytest.mark.slow
def test_digest_of_a_run_equals_that_of_its_planned_settings(tmp_path, monkeypatch):
    """Lightning writes config.yaml, and the study computes its digests before any run."""
    from segformer_pl.cli import main
    from segformer_pl.cli.training import resolve

    monkeypatch.chdir(tmp_path)
    demo = Path(__file__).parents[2] / "experiments" / "demo.yaml"
    tiny = {
        "trainer": {
            "max_steps": 2,
            "val_check_interval": 2,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
        },
        "model": {"warmup_steps": 1},
        "data": {"num_workers": 0, "batch_size": 2, "eval_batch_size": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    files = [str(demo), "tiny.yaml"]
    planned = training_configuration({0: resolve(files)}, None)
    main(
        [
            "fit",
            *(f"--config={file}" for file in files),
            "--seed_everything=5",
            "--trainer.logger.init_args.version=run",
        ]
    )
    run = Run("runs/demo/run")
    trained = run.configuration(2)
    assert trained.settings == planned.settings
    assert settings_digest(trained) == settings_digest(planned)
    assert (trained.seed, planned.seed) == (5, 0)

    # A resumption with the same settings leaves the digest as it is; one with others does not.
    resumed = yaml.safe_load(run.config_text) | {"ckpt_path": "runs/demo/run/checkpoints/last.ckpt"}
    file = run.folder / "config_resumed_at_step_0000001.yaml"
    file.write_text(yaml.safe_dump(resumed))
    assert settings_digest(Run(run.folder).configuration(2)) == settings_digest(planned)
    resumed["model"]["lr"] = 0.5
    file.write_text(yaml.safe_dump(resumed))
    assert settings_digest(Run(run.folder).configuration(2)) != settings_digest(planned)
