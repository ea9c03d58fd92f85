"""A Slurm cluster on this machine, with a configuration, ports and state of its own.

Nothing of it is shared with another Slurm on the machine: the commands of Slurm find it by the
environment variable ``SLURM_CONF`` alone. To try something by hand, keep it running until Ctrl-C::

    python tests/cluster/one_machine.py

It starts ``munged``, ``slurmctld`` and ``slurmd`` of Debian's packages ``slurm-wlm`` and ``munge``,
which need root.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
START_TIMEOUT = 30.0  # seconds until the node is idle
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=10
PropagateResourceLimits=NONE
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE
"""


def reason_against() -> str | None:
    """Return why Slurm cannot be started here; None if nothing is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"Slurm is not installed: there is no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    return None


class Slurm:
    """A running cluster of one node with four CPUs, whatever the machine has.

    Args:
        folder: Empty folder for configuration, state and logs.

    Raises:
        RuntimeError: The daemons have not started; the message holds the ends of their logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        with socket.socket() as first, socket.socket() as second:
            for free in (first, second):
                free.bind(("127.0.0.1", 0))
            ports = [free.getsockname()[1] for free in (first, second)]
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(text)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        # --force: as root, and in a folder that others can write to, such as one below /tmp
        self._run(
            "munged", "--foreground", "--force", f"--log-file={self.folder}/munge.log", *options
        )
        self._wait_for(lambda: (self.folder / "munge.socket").exists())
        self._run("slurmctld", "-D", "-c", "-f", self.variables["SLURM_CONF"])
        self._run("slurmd", "-D", "-N", "localhost", "-f", self.variables["SLURM_CONF"])
        self._wait_for(lambda: self.call("sinfo", "--noheader", "--format=%t").strip() == "idle")

    def _run(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
            )

    def _wait_for(self, condition) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not condition():
            ended = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"Slurm has not started, ended: {ended}\n{self.logs()}")
            time.sleep(0.1)

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which the commands of Slurm find this cluster."""
        outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return outer | self.variables | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}

    def call(self, *command: str, **variables: str) -> str:
        """Run a command of Slurm; -> its output, also if it fails."""
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment | variables,
            timeout=60,
        )
        return done.stdout

    def logs(self) -> str:
        """Return the ends of all logs."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in files)

    def stop(self) -> None:
        """End all daemons, and all processes of jobs."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        # Those of jobs have inherited the variable, from slurmd or from sbatch.
        own = f"SLURM_CONF={self.variables['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if own in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
        self._daemons = []


if __name__ == "__main__":
    if reason := reason_against():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="slurm_") as temporary:
        cluster = Slurm(Path(temporary))
        sys.stdout.write(f"export SLURM_CONF={cluster.variables['SLURM_CONF']}\n")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            with suppress(KeyboardInterrupt):
                signal.pause()
        finally:
            cluster.stop()
