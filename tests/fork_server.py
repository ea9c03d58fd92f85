"""A server that forks a process for each command line of the tests.

It reads one request per line, as JSON. The imports, which take several times as long as a small
training, happen only once: a process of this server that starts ``python -m MODULE`` itself, as a
study does for each run and Lightning for each further rank, forks too, see :class:`ForkingPopen`.
"""

import atexit
import gc
import inspect
import json
import multiprocessing.util
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from contextlib import suppress

# timm and scipy are imported by the networks that use them, the others once a command is parsed.
import scipy.optimize  # noqa: F401
import timm  # noqa: F401
import torch
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only
from tiny_network import TINY_OPTION
from tqdm import tqdm

from segformer_pl import callbacks
from segformer_pl.ablation import costs
from segformer_pl.cli import ablate, arena, doctor, main, training  # noqa: F401
from segformer_pl.commands import (  # noqa: F401
    compare,
    convert,
    erf,
    predict,
    profile,
    recipe,
    robustness,
    scaling,
    test_time,
)

costs.MIN_SECONDS = 0.05  # the plan and the report of each study measure latencies
START = inspect.signature(subprocess.Popen._execute_child)


class ForkingPopen(subprocess.Popen):
    """``subprocess.Popen`` that forks instead of starting a new interpreter for ``python -m``."""

    def _execute_child(self, *arguments):
        given = START.bind(self, *arguments).arguments
        command = [str(part) for part in given["args"]]
        flags = command[1 : command.index("-m")] if "-m" in command[1:3] else None
        if given["shell"] or command[0] != sys.executable or flags not in ([], ["-u"]):
            super()._execute_child(*arguments)
            return
        self.pid = os.fork()
        if self.pid == 0:
            try:
                begin(given)
                run(*command[command.index("-m") + 1 :])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(255)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))


def begin(given):
    """Bring a forked process into the state in which a new interpreter would be.

    Args:
        given: Arguments of ``Popen._execute_child``.
    """
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, end in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if given[end] != -1:
            os.dup2(given[end], number)
    if given["cwd"] is not None:
        os.chdir(given["cwd"])
    if given["start_new_session"]:
        os.setsid()
    if given["preexec_fn"] is not None:
        given["preexec_fn"]()
    if given["close_fds"]:  # such as locks
        kept = {0, 1, 2, *given["pass_fds"]}
        for descriptor in set(map(int, os.listdir("/dev/fd"))) - kept:
            with suppress(OSError):
                os.close(descriptor)
    if given["env"] is not None:
        os.environ.clear()
        os.environ.update(given["env"])
    # What the parent deletes at its own end
    weakref.finalize._registry.clear()
    multiprocessing.util._finalizer_registry.clear()
    # What was read from the environment at import
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    rank_zero_only.rank = _get_rank() or 0


def run(name, *arguments):
    """Run a module, or a script if the name ends in ``.py``, and end the process."""
    status = 0
    sys.argv = [name, *arguments]
    try:
        if name.endswith(".py"):
            sys.path.insert(0, os.path.dirname(name))
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        status = exit_.code
        if status is not None and not isinstance(status, int):
            sys.stderr.write(f"{status}\n")
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


def answer(value):
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def warm_up():
    """Train for a step, so that what happens once in a process happens before the forks."""
    environment, streams = dict(os.environ), [os.dup(number) for number in (1, 2)]
    tqdm.monitor_interval, interval = 0, tqdm.monitor_interval  # its thread would not be forked
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        settings = {
            "model.network": TINY_OPTION,
            "data.dataset": "shapes",
            "data.num_workers": 0,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 1,
            "trainer.val_check_interval": 1,
            "trainer.limit_val_batches": 1,
            "trainer.enable_progress_bar": "false",
            "trainer.logger.save_dir": folder,
        }
        main(["fit", *(f"--{key}={value}" for key, value in settings.items())])
        for number, stream in zip((1, 2), streams):
            os.dup2(stream, number)
            os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    tqdm.monitor_interval = interval
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of all objects


def serve():
    warm_up()
    # A shell that runs the tests in the background lets them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            ended, status = os.waitpid(job["wait"], os.WNOHANG)
            answer(os.waitstatus_to_exitcode(status) if ended else None)
            continue
        process = os.fork()
        if process:
            answer(process)
            continue
        os.setsid()
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        sys.path[1:1] = job["environment"]["PYTHONPATH"].split(os.pathsep)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(target, stream)
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        if not job["figures"]:
            callbacks.report.write_report = lambda run: "none"
            callbacks.evaluation.publish = lambda *_: None
        if job["forks"]:
            subprocess.Popen = ForkingPopen
        run(*job["command"])


if __name__ == "__main__":
    serve()
