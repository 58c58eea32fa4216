"""Samples that could not be read while training: written down, said once, and, when they are many, the end of the run.

Every rank sees the damaged samples of its own batches only. The first one in the whole job that meets one says so.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

from megaspeech.data.batch import Batch

LARGEST_SHARE = 0.01
ALWAYS_BORNE = 10
"""Disks and networks flip a bit in some 1e14, so that a sound archive gives a run a handful of damaged samples. More
than this and than the share is a whole file gone wrong: going on would train on another mixture than was asked for."""


class RejectedSamples:
    """The record of a run's damaged samples, `path` (JSONL: step, sample, reason), shared by all of its ranks."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_samples = self.num_rejected = 0

    def take(self, step: int, batches: Sequence[Batch]) -> None:
        """Account for the batches of step `step`, counted from 0.

        Raises:
            ValueError: more of the samples that this rank has read are damaged than can be borne.
        """
        rejected = [name_and_reason for batch in batches for name_and_reason in batch.rejected]
        self.num_samples += sum(len(batch.codes_BST) for batch in batches)
        self.num_rejected += len(rejected)
        if not rejected:
            return
        self._record(step, rejected)
        if self.num_rejected > max(ALWAYS_BORNE, LARGEST_SHARE * self.num_samples):
            raise ValueError(
                f"{self.num_rejected} of the {self.num_samples:,} samples read on this rank are damaged, more than "
                f"{LARGEST_SHARE:.0%}; the last: {rejected[-1][1]}; all are in {self.path}; copy the shards again from "
                f"where they are whole, prepare them again, or take them out of data.mixture"
            )

    def _record(self, step: int, rejected: Sequence[tuple[str, str]]) -> None:
        """Append and print what no rank, and no start before this one, has."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                file.seek(0)
                known = file.read()
                for name, reason in dict(rejected).items():
                    if json.dumps(reason) not in known:
                        file.write(json.dumps({"step": step, "sample": name, "reason": reason}) + "\n")
                        print(f"step {step:>6}  left out {name}: {reason}", flush=True)
        except OSError as error:  # a full disk is no reason to stop either
            print(f"step {step:>6}  left out {rejected}; {self.path} could not be written: {error}", flush=True)
