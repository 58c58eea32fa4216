"""A Slurm of two nodes on this machine, of one GPU each that is none, for as long as a test runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in DAEMONS if shutil.which(name) is None]
SECONDS = 300
NODES = (HOST := socket.gethostname().partition(".")[0], f"{HOST}x")
"""Ranks meet on the first, so that name must be known. Nodes w01 to w64 can be asked for, and are never there."""

NVIDIA_SMI = """#!/bin/bash
grep -qx "$SLURMD_NODENAME" {folder}/sick && echo "no driver" && exit 9
case "$*" in *remapped*) echo "00:07, 0, 0" ;; *nvlink*) echo "Link 0: 26.562 GB/s" ;; *) echo "0, 4, 0" ;; esac
"""
SETTINGS = """
ClusterName=test
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=1,sched_interval=1
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:1
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:1
NodeName=w[01-64] CPUs=112 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=here Nodes={nodes[0]},{nodes[1]} Default=YES
PartitionName=elsewhere Nodes=w[01-64]
"""


class NoSlurmError(RuntimeError):
    """The daemons do not start on this machine; the message is what they wrote."""


class SmallSlurm:
    """What a user has of it, from the repository's root.

    Attributes:
        folder: has `JOB.out` and `logs/JOB`; nodes named in its file `sick` have a broken nvidia-smi.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}:{os.environ['PATH']}"}
        self.variables |= {"PYTHON": sys.executable, "LOGS": f"{folder}/logs", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, **variables: str) -> str:
        """stdout and stderr of a command that succeeds."""
        environment = {**self.variables, **variables}
        finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout + finished.stderr

    def submit(self, *arguments: str) -> str:
        """The number of the job that sbatch makes of these."""
        return self.run("sbatch", "--parsable", "--output", f"{self.folder}/%A.out", *arguments).strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` has for a name."""
        fields = dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)
        return fields[name]

    def until(self, condition: Callable[[], bool], *, seconds: float = SECONDS) -> None:
        """Wait for it."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "".join(path.read_text() for path in self.folder.glob("*.out"))
            time.sleep(0.05)

    def end(self, job: str) -> str:
        """The state that a job ends in."""
        self.until(lambda: self.field(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
        return self.field(job, "JobState")


@contextlib.contextmanager
def small_slurm(folder: Path) -> Iterator[SmallSlurm]:
    """Its daemons live in the folder, on ports that were free, and end with the block. Needs to be root.

    Raises:
        NoSlurmError: they do not start.
    """
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, ports=ports, nodes=NODES))
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File=/dev/null\n")
    (folder / "sick").touch()
    for name, body in {"nvidia-smi": NVIDIA_SMI.format(folder=folder), "df": "#!/bin/sh\necho 9000000\n"}.items():
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    slurm = SmallSlurm(folder)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
    munge = [f"--{option}={folder}/{file}" for option, file in {**files, "seed-file": "munge.seed"}.items()]
    with _daemons(slurm) as start:
        try:
            start("munged", "--foreground", "--force", *munge)
            slurm.until((folder / "munge.socket").exists, seconds=60)
            start("slurmctld", "-D", "-c")
            ping = {"args": ["scontrol", "ping"], "env": slurm.variables, "stdout": subprocess.DEVNULL}
            slurm.until(lambda: subprocess.run(**ping).returncode == 0, seconds=60)
            for node in NODES:
                (folder / node).mkdir()
                start("slurmd", "-D", "-N", node)
            idle = ("sinfo", "-h", "-p", "here", "-t", "idle", "-o", "%D")
            slurm.until(lambda: slurm.run(*idle).strip() == "2", seconds=60)
        except AssertionError as error:
            raise NoSlurmError(str(error)) from error
        yield slurm


@contextlib.contextmanager
def _daemons(slurm: SmallSlurm) -> Iterator[Callable[..., None]]:
    """What starts one; the last one started ends first."""
    processes: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with (slurm.folder / f"{command[0]}{len(processes)}.out").open("w") as log:
            processes.append(subprocess.Popen(command, env=slurm.variables, stdout=log, stderr=log))

    try:
        yield start
    finally:
        subprocess.run(["scancel", "--user", "root"], env=slurm.variables, capture_output=True)
        with contextlib.suppress(AssertionError):
            slurm.until(lambda: not slurm.run("squeue", "-h"))
        for process in reversed(processes):
            process.terminate()
            process.wait(SECONDS)
