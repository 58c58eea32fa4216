"""How the ranks were started, and the exit status that asks for another start."""

from __future__ import annotations

import os

REQUEUE = os.EX_TEMPFAIL
"""Exit status 75: the run is not done and can go on from its newest checkpoint; start the same command again."""

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def take_variables_from_slurm() -> None:
    """Set torchrun's variables from srun's, where srun itself started one task a rank.

    A batch script has SLURM_PROCID too, though it is no rank; MASTER_ADDR, which a launch script sets, tells them
    apart.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or "MASTER_ADDR" not in os.environ:
        return
    for name, slurm_name in SLURM_NAMES.items():
        os.environ[name] = os.environ[slurm_name]
