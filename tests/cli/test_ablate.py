"""``ablate`` with real trainings: kills, failures, signals and several invocations."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from segformer_pl.ablation.folder import State, find_state
from segformer_pl.ablation.study import read_study
from segformer_pl.analysis.run import Run
from segformer_pl.cli import main
from segformer_pl.cli.training import resolve
from tests.tiny_network import TINY_SEGFORMER

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "ablation"


def write_study(folder, data, bad=False, **entries):
    """Write a study of two variants on a small data set; -> the study file."""
    planted = {"class_path": "planted.Planted", "init_args": {"folder": str(folder)}}
    failing = {"class_path": "planted.Planted", "init_args": {"folder": str(folder), "fails": True}}
    base = {
        "trainer": {
            "max_steps": 4,
            "val_check_interval": 4,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "callbacks": [planted],
        },
        "model": {"network": TINY_SEGFORMER, "warmup_steps": 1},
        "data": {"path": str(data), "batch_size": 2, "eval_batch_size": 2, "num_workers": 0},
        "last_checkpoint": {"every_n_train_steps": 1},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    change = {"trainer.callbacks": [failing]} if bad else {}
    study = {
        "question": "Does it matter?",
        "base": "base.yaml",
        "variants": {"good": {}, "other": {"model.lr": 0.01, **change}},
        "seeds": [0, 1],
        "budgets": {"small": {}},
        **entries,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


@pytest.fixture
def start(start_command, tmp_path):
    """Function (options) that starts ``ablate`` as the leader of a group of processes."""

    def call(*options, **how):
        arguments = ["ablate", "tiny.yaml", "--output=out", *options]
        return start_command(arguments, folder=tmp_path, imports=SUPPORT, figures=False, **how)

    return call


def finish(process, status=0):
    assert process.wait(400) == status, process.output
    return process.output


def run_folder(folder, name):
    """Return the run folder ``<variant>.seed<seed>``, which need not exist yet."""
    return next(iter((folder / "out" / "tiny").glob(f"{name}.small.*")), folder / "nowhere")


def commands(folder, name):
    """Return the command lines that have been started for a run."""
    log = folder / "out" / "tiny" / ".jobs" / f"{run_folder(folder, name).name}.log"
    return re.findall(r"^\$ python -m segformer_pl (.*)$", log.read_text(), re.MULTILINE)


def is_done(folder, name):
    return find_state(run_folder(folder, name), 4, []) == State.DONE


def num_held(folder, where):
    """Return how many trainings wait in a step or in a validation."""
    return len(list(folder.glob(f"held.{where}.*")))


def has_processes(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_study_is_killed_fails_and_is_completed_by_two_invocations(folder, tmp_path, start):
    write_study(tmp_path, folder, bad=True)
    (tmp_path / "fail").touch()
    (tmp_path / "hold.step.1").touch()

    # SIGKILL of everything, while seed 0 is complete and seed 1 of "good" is in step 2.
    process = start("--max-parallel=2")
    process.wait_for(lambda: is_done(tmp_path, "good.seed0") and num_held(tmp_path, "step"), 400)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = run_folder(tmp_path, "good.seed0")
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    (tmp_path / "hold.step.1").unlink()

    # The same command: the complete run is left alone, the interrupted one resumes, the failed one
    # is listed and not started again, and its failure stops no other run.
    text = finish(start("--max-parallel=2"), status=1)
    after = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    assert after == before
    assert [len(commands(tmp_path, f"good.seed{seed}")) for seed in (0, 1)] == [1, 2]
    assert "--ckpt_path" in commands(tmp_path, "good.seed1")[1]
    good = Run(run_folder(tmp_path, "good.seed1"))
    assert good.resumptions[0].step >= 1
    assert good.metrics["train/loss"].step.tolist() == [1, 2, 3, 4]
    assert len(commands(tmp_path, "other.seed0")) == 1
    for seed in (0, 1):
        assert re.search(rf"other, seed {seed} failed: RuntimeError: planted \(log: '\S+'\)", text)
    assert "2 of 4 runs done, 2 failed" in text
    assert "failed runs are started again with --retry_failed" in text
    assert (tmp_path / "out" / "tiny" / "report_small" / "report.html").is_file()
    record = good.ablation
    assert (record["variant"], record["seed"], record["digest"]) == (
        "good",
        1,
        good.folder.name.rpartition(".")[2],
    )
    assert record["environment"]["num_threads"] == max(1, len(os.sched_getaffinity(0)) // 2)

    # Two invocations at once share the failed runs and start none of them twice.
    (tmp_path / "fail").unlink()
    counts = {seed: len(commands(tmp_path, f"other.seed{seed}")) for seed in (0, 1)}
    both = [start("--retry-failed", "--max-parallel=1") for _ in range(2)]
    for process in both:
        assert "4 of 4 runs done" in finish(process)
    for seed, number in counts.items():
        started = commands(tmp_path, f"other.seed{seed}")
        assert len(started) == number + 1
        assert not (run_folder(tmp_path, f"other.seed{seed}") / "failure.txt").exists()
        assert is_done(tmp_path, f"other.seed{seed}")
    table = (tmp_path / "out" / "tiny" / "report_small" / "table.md").read_text()
    assert "other" in table


def test_ctrl_c_leaves_no_process_and_a_study_that_goes_on(folder, tmp_path, start):
    evaluations = {"at_96": {"model.inference": {"base_size": [96, 96]}}}
    write_study(tmp_path, folder, evaluations=evaluations, seeds=[0], variants={"good": {}})
    (tmp_path / "hold.step.0").touch()

    # Ctrl-C in a terminal reaches all processes of the group. Each of these is started with a new
    # interpreter, as outside of the tests.
    process = start(forks=False)
    process.wait_for(lambda: num_held(tmp_path, "step"), 400)
    os.killpg(process.pid, signal.SIGINT)
    process.wait_for(lambda: "Ctrl-C: 1 running; each ends" in process.output, 400)
    (tmp_path / "hold.step.0").unlink()
    text = finish(process, status=130)
    assert "Ctrl-C: stopped; go on with\npython -m segformer_pl ablate tiny.yaml" in text
    assert not has_processes(process.pid)
    assert find_state(run_folder(tmp_path, "good.seed0"), 4, ["at_96"]) == State.INTERRUPTED

    # SIGTERM of the command alone is passed on, here in the validation after the last step.
    (tmp_path / "hold.validation.0").touch()
    process = start()
    process.wait_for(lambda: num_held(tmp_path, "validation"), 400)
    os.kill(process.pid, signal.SIGTERM)
    process.wait_for(lambda: "SIGTERM: 1 running; each ends" in process.output, 400)
    (tmp_path / "hold.validation.0").unlink()
    finish(process, status=143)
    assert not has_processes(process.pid)

    # The missed validation and the additional evaluation are made up for.
    assert "1 of 1 runs done" in finish(start())
    run = Run(run_folder(tmp_path, "good.seed0"))
    assert [file.step for file in run.evaluations] == [4]
    assert [file.step for file in run.named_evaluations["at_96"].evaluations] == [4]
    assert run.named_evaluations["at_96"].config["model"]["inference"] is not None
    kinds = [command.split()[0] for command in commands(tmp_path, "good.seed0")]
    assert kinds == ["fit", "fit", "fit", "validate", "validate"]


def has_slurm():
    try:
        done = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(done.stdout.strip())


@pytest.mark.skipif(not has_slurm(), reason="needs a running Slurm")
def test_a_run_that_slurm_preempts_is_requeued_and_resumes(folder, tmp_path, start):
    write_study(tmp_path, folder, seeds=[0], variants={"good": {}})
    (tmp_path / "hold.step.0").touch()
    process = start("--launcher=slurm", "--slurm={timeout_min: 60, cpus_per_task: 1}")
    process.wait_for(lambda: num_held(tmp_path, "step"), 400)
    queue = ["squeue", "--noheader", "--name=tiny", "--format=%i"]
    job = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.strip()
    # What Slurm sends before it ends a job whose time is over.
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    time.sleep(1)
    (tmp_path / "hold.step.0").unlink()
    finish(process)
    started = commands(tmp_path, "good.seed0")
    assert len(started) == 2
    assert "--ckpt_path" in started[1]
    assert Run(run_folder(tmp_path, "good.seed0")).resumptions[0].step == 3


def test_the_plan_names_costs_and_what_cannot_be_resolved(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    study = str(write_study(tmp_path, folder, spread={"seeds": 0.02, "images": 0.004}))
    arguments = ["ablate", study, f"--output={tmp_path / 'out'}", "--dry-run"]
    main(arguments)
    text = capsys.readouterr().out
    assert "Does it matter?" in text
    assert "0.01" in text  # millions of parameters
    assert "2 variants x 2 seeds (0, 1) = 4 runs" in text
    assert "0 done, 0 failed, 4 left (16 steps)" in " ".join(text.split())
    assert "this study CANNOT resolve a difference of 1 point;" in text
    assert not (tmp_path / "out").exists()


def test_wrong_options_and_folders_are_refused(folder, tmp_path, fail, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    study = str(write_study(tmp_path, folder))
    output = f"--output={tmp_path / 'out'}"
    assert "--dry_run and --report exclude" in fail(
        capsys, ["ablate", study, output, "--dry_run", "--report"]
    )
    error = fail(capsys, ["ablate", study, output, "--slurm={partition: gpu}"])
    assert "options for --launcher slurm, which is not given" in error
    assert "max_parallel" in fail(capsys, ["ablate", study, output, "--max_parallel=0"])
    assert "there is no budget 'full'" in fail(capsys, ["ablate", study, output, "--budget=full"])
    main(["ablate", study, output, f"--wandb-sweep={tmp_path / 'sweep.yaml'}"])
    assert "wandb sweep" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    (config,) = (tmp_path / "sweep_configs").glob("good.*")
    sweep = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert sweep["parameters"]["config"]["values"][0] == str(config)
    error = fail(capsys, ["ablate", study, output, f"--wandb-sweep={study}"])
    assert f"'{study}' exists already; remove it or give another path" in error
    assert Path(study).read_text().startswith("question:")
    with pytest.raises(SystemExit, match="1"):
        main(["ablate", study, output, "--report"])
    assert "no report: " in capsys.readouterr().out
    # A folder that holds another run than its name says
    digest = read_study(Path(study), "small", resolve).variants[0].digest
    run = tmp_path / "out" / "tiny" / f"good.seed0.small.{digest}"
    run.mkdir(parents=True)
    (run / "ablation.json").write_text('{"study": "tiny", "variant": "renamed"}')
    assert "variant is 'renamed', but the folder's name" in fail(capsys, ["ablate", study, output])
