"""Every script of the GPU queue runs from beginning to end with --smoke."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "gpu"
BENCHMARKS = FOLDER.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.sh"))
WRITTEN = {
    "1_speed": "speed.csv",
    "2_camvid_b0": "query_merging/test_time.md",
    "3_camvid_b2": "segformer_b2/seed0/report.html",
    "4_reduction_and_overlap": "reduction_and_overlap.yaml",
    "5_arena": "camvid.yaml",
    "6_erf": "segformer_b0/erf.json",
    "7_shapes": "drop_path.yaml",
}


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_scripts_are_numbered_without_gaps():
    assert [int(script.name.split("_")[0]) for script in SCRIPTS] == [*range(1, len(SCRIPTS) + 1)]
    assert set(WRITTEN) == {script.stem for script in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs_with_smoke(script, tmp_path, start_command):
    warm_bash = Path(__file__).with_name("warm_bash.py")
    command = start_command([script, tmp_path, "--smoke"], program=warm_bash)
    assert command.wait(300) == 0, command.output
    assert (tmp_path / WRITTEN[script.stem]).stat().st_size > 0


def test_a_script_without_its_data_says_what_to_give(tmp_path):
    result = run(FOLDER / "2_camvid_b0.sh", tmp_path, CAMVID="")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "error: give the folder of CamVid's Parquet files as CAMVID=FOLDER"
    )


def test_a_failing_command_fails_its_script(tmp_path):
    """A script that ended well after a failure would pass its smoke test whatever it runs."""
    result = run(FOLDER / "6_erf.sh", tmp_path, "--smoke", PYTHON="false")
    assert result.returncode == 1


def test_a_script_without_time_left_goes_on_in_the_next_call(tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(
        f". {FOLDER}/common.sh\nend=$((SECONDS + 1))\nlimited sleep 30\necho unreached\n"
    )
    result = run(script, tmp_path, "--smoke")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "stopped at the end of the time; the same call goes on\n"


@pytest.mark.slow
def test_networks_with_other_outputs_are_not_timed(tmp_path, monkeypatch, capsys):
    """A benchmark that timed any network would flatter whichever is wrong."""
    spec = importlib.util.spec_from_file_location("speed", BENCHMARKS / "speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    arguments = "--variants b0 --tasks inference --dtypes float32 --size 64 64 --num_classes 5"
    arguments = [*f"{arguments} --rounds 1 --without_smp --threads 1 --output".split()]
    arguments.append(str(tmp_path / "speed.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(speed, "load_weights", lambda network, weights: None)
        with pytest.raises(SystemExit) as ended:
            speed.main(arguments)
    assert ended.value.code == 1
    assert "not timed: b0, inference, segformer_pl, float32, eager: the outputs differ by" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "speed.csv").exists()
    speed.main(arguments)
    rows = (tmp_path / "speed.csv").read_text().splitlines()
    assert len(rows) == 3  # header, ours, transformers
    speed.main(arguments)  # nothing is left to measure
    assert (tmp_path / "speed.csv").read_text().splitlines() == rows
