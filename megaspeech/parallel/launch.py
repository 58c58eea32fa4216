"""What the launcher tells a rank, and what a rank that ends tells the launcher."""

from __future__ import annotations

import json
import os
import time

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


def tell_torchrun(message: str, *, is_consequence: bool = False) -> None:
    """Have torchrun's last block show `message` as this rank's (torch/distributed/elastic/multiprocessing/errors).

    It takes the earliest for the cause, to the second: the message of a rank that only ended because another one has is
    dated later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()) + is_consequence)}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
