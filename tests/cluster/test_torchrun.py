"""torchrun restarts a training whose process was killed; all ranks go on exactly."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from segformer_pl.analysis.run import Run
from tests.cluster.tiny_training import NUM_STEPS, read_records, write_config

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "experiments" / "cluster" / "torchrun.sh"
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def read_script(tmp_path, *arguments, **variables):
    """Return the arguments and the variables with which torchrun.sh starts Python."""
    show = tmp_path / "show.py"
    show.write_text(SHOW)
    variables["PYTHON"] = f"python3 {show}"
    command = ["bash", SCRIPT, *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, check=True)
    return json.loads(done.stdout)


def test_after_sigkill_of_one_rank_all_resume_from_the_last_checkpoint(
    data, uninterrupted, tmp_path, start_command
):
    config = write_config(tmp_path / "killed", data, hold=5)
    hold = config.parent / "hold"
    hold.touch()
    script = [f"--config={config}", "--trainer.strategy=ddp"]
    arguments, variables = read_script(tmp_path, "first", *script, GPUS="2", MAX_RESTARTS="1")
    assert arguments[:2] == ["-m", "torch.distributed.run"]
    sharing = {name: value for name, value in variables.items() if "RDZV" in name}
    process = start_command(arguments[2:], program=arguments[1], figures=False, **sharing)
    records = [config.parent / f"rank{rank}.jsonl" for rank in (0, 1)]
    process.wait_for(lambda: all(r.exists() and r.read_text().count("\n") == 5 for r in records))
    ranks = subprocess.run(
        ["pgrep", "--parent", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[0]), signal.SIGKILL)  # rank 0, which writes the files
    hold.unlink()
    assert process.wait() == 0, process.output
    run = Run(config.parent / "runs" / "first")
    assert [resumption.step for resumption in run.resumptions] == [4]
    assert [file.step for file in run.evaluations] == [6, 12]
    for whole, killed in zip(uninterrupted, read_records(config.parent, 2)):
        by_step = {line["step"]: line for line in killed}
        assert [by_step[step] for step in range(1, NUM_STEPS + 1)] == whole
        assert killed[4] == killed[5]  # step 5, which came after the checkpoint
        assert len(killed) == NUM_STEPS + 1
