"""The store through which ranks find each other, with keys of its own for every start.

torchrun keeps one store for all its restarts (torch 2.13, rendezvous.py:188 believes that each has a new one), so that
ranks would read the addresses of dead ones. Nothing in their environment names the start alike on all nodes, so they
agree on a name: rank 0 answers each rank's word, which no earlier rank 0 can have seen.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

WORD, NAME, HEARD = "megaspeech/word", "megaspeech/name", "megaspeech/heard"


def store_of_this_start(*, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size) from torchrun's variables; all ranks call this.

    Raises:
        TimeoutError: a rank did not come.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # rank 0 keeps the store, which ends with it
        return store, rank, world_size
    name = _receive_name(store, rank=rank) if rank else _give_name(store, world_size=world_size, timeout=timeout)
    return dist.PrefixStore(name, store), rank, world_size


def _receive_name(store: dist.Store, *, rank: int) -> str:
    word = uuid.uuid4().hex
    store.set(f"{WORD}/{rank}", word)
    name = store.get(f"{NAME}/{word}").decode()  # waits
    store.set(f"{HEARD}/{name}/{rank}", "")
    return name


def _give_name(store: dist.Store, *, world_size: int, timeout: timedelta) -> str:
    name, missing, deadline = uuid.uuid4().hex, set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in missing:
            if store.check([f"{WORD}/{rank}"]):  # perhaps an earlier start's: then it will change
                store.set(f"{NAME}/{store.get(f'{WORD}/{rank}').decode()}", name)
        missing = {rank for rank in missing if not store.check([f"{HEARD}/{name}/{rank}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {timeout.total_seconds():.0f} s")
        time.sleep(0.01)
    return name
