"""One rank says why a run failed, and torchrun's own last block says the same."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta

import torch.distributed as dist

from megaspeech.parallel.launch import tell_torchrun

LOST_PEER = re.compile(r"gloo|nccl|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)
"""What gloo, NCCL and the store say when another rank is gone."""
FIRST, SUMMARY = "megaspeech/failure", "megaspeech/failure/summary"
SECONDS_TO_SPEAK = 10


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` only says that another rank has ended."""
    return isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None


def speak(message: str, *, summary: str, is_consequence: bool = False) -> None:
    """Say why this rank fails, if it is the first to do so; the others hand torchrun the summary of the first.

    Before there is a process group they cannot agree on one: the first of a node says all, the others the summary.

    Args:
        message: all of it.
        summary: a line.
        is_consequence: another rank's failure may be the cause, and it gets the time to speak first.
    """
    if dist.is_initialized():
        speaks, summary = _first_summary(summary, is_consequence=is_consequence)
    else:
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        if not speaks:
            print(f"megaspeech.train: {summary}", file=sys.stderr, flush=True)
    if speaks:
        print(f"megaspeech.train: {message}", file=sys.stderr, flush=True)
    tell_torchrun(message if speaks else summary, is_consequence=not speaks)


def _first_summary(summary: str, *, is_consequence: bool) -> tuple[bool, str]:
    """(whether this rank is the first, the summary of the first)."""
    store = dist.distributed_c10d._get_default_store()
    try:
        if is_consequence:
            _wait(store)
        if store.add(FIRST, 1) == 1:
            store.set(SUMMARY, summary)
            return True, summary
        return False, store.get(SUMMARY).decode() if _wait(store) else summary
    except RuntimeError:  # the store is gone with the rank that kept it: what ended that one has been said
        return False, summary


def _wait(store: dist.Store) -> bool:
    """Whether a rank has left its summary within `SECONDS_TO_SPEAK`."""
    try:
        store.wait([SUMMARY], timedelta(seconds=SECONDS_TO_SPEAK))
    except dist.DistStoreError:
        return False
    return True
