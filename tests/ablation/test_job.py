"""The job of one run, apart from the trainings, which are in tests/cli/test_ablate.py."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.job import RunJob, _set_aside, last_sentence

pytestmark = pytest.mark.slow

TRACEBACK = """
Traceback (most recent call last):
  File "a.py", line 1, in <module>
ValueError: the first

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in f
    raise RuntimeError(message)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.
Process 3 has 1 GiB
Epoch 0: 10 %
"""


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("warning: x\nerror: data.path: there is no folder; give one\n", "data.path: there is no"),
        (TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
        (f"error: of an earlier process\n{TRACEBACK}", "torch.OutOfMemoryError: CUDA"),
        (f"{TRACEBACK}\nerror: a sentence\n", "a sentence"),
        ("Traceback (most recent call last):\n  File\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("Epoch 0: 10 %\n", None),
    ],
)
def test_the_last_sentence_of_an_output(output, sentence):
    found = last_sentence(output)
    assert found is None if sentence is None else found.startswith(sentence)


def test_a_job_waits_without_importing_torch():
    """Several jobs and their trainings share a machine, and a job only waits."""
    program = "import sys, segformer_pl.ablation.job; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_a_run_without_checkpoint_left_is_moved_and_not_deleted(tmp_path):
    for name in (".lock", "ablation.json", "metrics.csv", "config.yaml"):
        (tmp_path / name).write_text(name)
    _set_aside(tmp_path)
    aside = tmp_path / "superseded_after_step_0000000"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "ablation.json", aside.name}
    assert (aside / "metrics.csv").read_text() == "metrics.csv"
    (tmp_path / "metrics.csv").touch()
    _set_aside(tmp_path)
    assert (tmp_path / f"{aside.name}_2" / "metrics.csv").is_file()


# Runs a job whose record contradicts its folder, as after a rename.
REFUSED = """
import sys
from pathlib import Path
from segformer_pl.ablation.job import RunJob
record = dict(study="s", variant="a", seed=0, budget="b", digest="c")
folder = Path(sys.argv[1])
job = RunJob(folder, {}, {}, 4, record, int(sys.argv[2]) or None)
print(job())
"""


def test_a_failure_is_recorded_and_repeated_only_on_demand(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ablation.json").write_text('{"study": "another"}')

    def run(retried):
        program = [sys.executable, "-c", REFUSED, str(folder), str(retried)]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()

    failure = folder / "failure.txt"
    assert run(0) == State.FAILED
    assert "study is 'another'" in failure.read_text()
    failure.write_text("as it was\n")
    assert run(0) == State.FAILED
    assert failure.read_text() == "as it was\n"  # not started again
    seen = failure.stat().st_mtime_ns
    assert run(seen - 1) == State.FAILED
    assert failure.read_text() == "as it was\n"  # another invocation's failure, not the known one
    assert run(seen) == State.FAILED
    assert "study is 'another'" in failure.read_text()


def test_a_job_can_be_pickled_after_it_has_run():
    job = RunJob(Path("run"), {}, {}, 4, {}, variables={"A": "1"})
    job._process, job._num_stops = object(), 1
    copy = pickle.loads(pickle.dumps(job))
    assert (copy, copy._process, copy._num_stops) == (job, None, 0)
