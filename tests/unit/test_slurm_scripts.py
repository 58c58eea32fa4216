"""The scripts of examples/slurm against a Slurm and an nvidia-smi that are shell scripts themselves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN, CHECK = ROOT / "examples/slurm/train.sh", ROOT / "examples/slurm/check_node.sh"
HEALTHY = {"gpus": "0, 4, 0\n1, 4, 0", "rows": "00:07, 0, 0\n00:08, No, No", "nvlink": "Link 0: 26.562 GB/s"}


def _commands(folder: Path, bodies: dict[str, str]) -> str:
    """A PATH where these commands come first."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def _submit(folder: Path, *, status: int = 0, health: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run train.sh where ranks exit with `status` and the check of nodes prints `health`; `calls` is what it ran."""
    calls = folder / "calls"
    srun = f"""
        echo "srun $MASTER_ADDR $*" >> {calls}
        while [ "$1" != --output ]; do shift; done
        out=${{2/\\%t/3}}
        case "$*" in
          *check_node*) printf '%s' "{health}" > "$out"; exit {int(bool(health))} ;;
          *) echo "rank 3: KeyError" > "$out"; exit {status} ;;
        esac"""
    scontrol = f'echo "scontrol $*" >> {calls}; if [ $1 = show ]; then echo node1; echo node2; fi'
    path = _commands(folder, {"srun": srun, "scontrol": scontrol})
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    slurm |= {"SLURM_CPUS_ON_NODE": "96", "LOGS": str(folder / "logs")}
    command = ["bash", str(TRAIN), "config.toml", "run.seed=2"]
    return subprocess.run(
        command, env={**os.environ, **slurm, **variables, "PATH": path}, capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (75, True), (137, False), (138, True)])
def test_a_job_requeues_itself_when_asked_to(tmp_path: Path, status: int, requeued: bool) -> None:
    finished = _submit(tmp_path, status=status)
    calls = (tmp_path / "calls").read_text()
    assert finished.returncode == status
    assert ("scontrol requeue 17" in calls) is requeued
    check, train = (line for line in calls.splitlines() if line.startswith("srun"))
    assert check.endswith("check_node.sh 4") and "--ntasks-per-node 1 " in check
    assert train.startswith("srun node1 ") and "--ntasks-per-node 4 --cpus-per-task 24 " in train
    assert train.endswith(".venv/bin/python -m megaspeech.train config.toml run.seed=2")
    assert ("rank 3: KeyError" in finished.stderr) is (status in (1, 137))


def test_a_bad_node_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    health = "node2: 3 GPUs, 4 are asked for\ntimeout: of something else\nnode2: /tmp is full\n"
    finished = _submit(tmp_path, health=health)
    assert finished.returncode == 1 and finished.stderr.endswith("--exclude node2\n") and health in finished.stderr
    assert "megaspeech.train" not in (tmp_path / "calls").read_text()


def test_python_may_be_one_of_a_container(tmp_path: Path) -> None:
    _submit(tmp_path, PYTHON="apptainer exec --nv megaspeech.sif python")
    assert " apptainer exec --nv megaspeech.sif python -m megaspeech.train " in (tmp_path / "calls").read_text()


def test_what_is_asked_of_slurm() -> None:
    asked = TRAIN.read_text()
    assert all(f"#SBATCH --{option}\n" in asked for option in ("signal=USR1@180", "requeue", "exclusive", "mem 0"))


@pytest.mark.parametrize(
    "answers, fault",
    [
        ({}, ""),
        ({"gpus": "0, 4, 0"}, "1 GPUs, 2 are asked for"),
        ({"gpus": "0, 4, 0\n1, 30000, 0"}, "GPU 1: 30000 MiB are in use"),
        ({"gpus": "0, 4, [N/A]\n1, 4, 2"}, "GPU 1: 2 uncorrected memory errors"),
        ({"rows": "00:07, 1, 0"}, "GPU 00:07: memory rows wait to be remapped"),
        ({"rows": "00:07, 0, Yes"}, "GPU 00:07: memory rows could not be remapped"),
        ({"nvlink": "Link 0: <inactive>"}, "1 NVLinks are inactive"),
        ({"nvlink": "", "status": "9"}, "nvidia-smi fails"),
        ({"ports": "2"}, "1 active InfiniBand ports, IB_PORTS asks for 2"),
    ],
)
def test_what_is_wrong_with_a_node_is_found(tmp_path: Path, answers: dict[str, str], fault: str) -> None:
    said = {**HEALTHY, "status": "0", "ports": "1", **answers}
    body = f"""
        case "$*" in
          *remapped*) echo '{said["rows"]}' ;;
          *nvlink*) echo '{said["nvlink"]}' ;;
          *) echo '{said["gpus"]}' ;;
        esac
        exit {said["status"]}"""
    for port, state in ((1, "4: ACTIVE"), (2, "1: DOWN")):
        (tmp_path / f"ib/mlx5_0/ports/{port}").mkdir(parents=True)
        (tmp_path / f"ib/mlx5_0/ports/{port}/state").write_text(f"{state}\n")
    variables = {"PATH": _commands(tmp_path, {"nvidia-smi": body, "df": "echo Avail; echo 9000000"})}
    variables |= {"IB_CLASS": str(tmp_path / "ib"), "IB_PORTS": said["ports"], "SLURMD_NODENAME": "n7"}
    shown = subprocess.run(["bash", str(CHECK), "2"], env={**os.environ, **variables}, capture_output=True, text=True)
    assert shown.returncode == int(bool(fault))
    lines = shown.stdout.splitlines()
    assert len(lines) == int(bool(fault)) and all(line.startswith("n7: ") and fault in line for line in lines)
    assert not shown.stderr
