"""A data loader whose workers survive the signals of terminals and job schedulers."""

import os
import signal
import threading
from typing import Any

from torch.utils.data import DataLoader

from segformer_pl.data.streaming import Sample

GROUP_SIGNALS = ("SIGINT", "SIGUSR1", "SIGUSR2")  # from terminals and job schedulers


class SignalSafeLoader(DataLoader[Sample]):
    """A DataLoader whose workers start with signals blocked, until they ignore them."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        signals = {signal.SIGTERM, *(getattr(signal, name) for name in GROUP_SIGNALS)}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """Ignore signals in a worker, except a SIGTERM that its parent sends.

    Ctrl-C and the signals of job schedulers reach the whole process group. If a worker ended, the
    training could not finish its current step.
    """
    for name in GROUP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # without it, any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
