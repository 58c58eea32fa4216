"""One rank says why a run failed, and torchrun's own last block says the same."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from datetime import timedelta

import torch.distributed as dist

LOST_PEER = re.compile(r"gloo|nccl|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)
"""What gloo, NCCL and the store say when another rank is gone."""
FIRST, MESSAGE = "megaspeech/failure", "megaspeech/failure/message"
SECONDS_FOR_MESSAGE = 10


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` only says that another rank has ended."""
    return isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None


def speak(message: str, *, is_consequence: bool = False) -> None:
    """Say `message` on the first rank that calls this; the others hand torchrun what that one says.

    Args:
        message: why this rank fails.
        is_consequence: another rank's failure may be the cause, and it gets the time to speak first.
    """
    if dist.is_initialized():
        speaks, said = _first_message(message, is_consequence=is_consequence)
    else:
        speaks, said = os.environ.get("RANK", "0") == "0", message
    if speaks:
        print(f"megaspeech.train: {said}", file=sys.stderr, flush=True)
    tell_torchrun(said)


def tell_torchrun(message: str) -> None:
    """Have torchrun's summary show `message` as this rank's (torch/distributed/elastic/multiprocessing/errors)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def _first_message(message: str, *, is_consequence: bool) -> tuple[bool, str]:
    """(whether this rank is to speak, what the rank that speaks says)."""
    store = dist.distributed_c10d._get_default_store()
    try:
        if is_consequence:
            _wait(store)
        if store.add(FIRST, 1) == 1:
            store.set(MESSAGE, message)
            return True, message
        return False, store.get(MESSAGE).decode() if _wait(store) else message
    except RuntimeError:  # the store is gone with the rank that kept it: what ended that one has been said
        return False, message


def _wait(store: dist.Store) -> bool:
    """Whether a rank has left its message within `SECONDS_FOR_MESSAGE`."""
    try:
        store.wait([MESSAGE], timedelta(seconds=SECONDS_FOR_MESSAGE))
    except dist.DistStoreError:
        return False
    return True
