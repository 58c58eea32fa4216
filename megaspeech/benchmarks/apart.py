"""A call in a process of its own: what it took of the device comes back with its end, and its crash is its own."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from megaspeech.kernels.benchmarks.rows import FAILED, OUT_OF_MEMORY, SKIPPED


def call_apart(function: Callable[..., Any], *arguments: Any, hear: Callable[[str], None]) -> tuple[Any, str]:
    """(what `function(*arguments, say=...)` returned, "") or (None, why it could not, in one line).

    Args:
        function: importable by name; takes `say`, whose lines come to `hear`.
        arguments: go to another process, as the result comes from it.
        hear: is called in this process.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        while True:
            kind, *values = receiver.recv()
            if kind == "done":
                return tuple(values)
            hear(*values)
    except EOFError:
        process.join()
        return None, f"{FAILED}: its process ended with status {process.exitcode}"
    finally:
        receiver.close()
        process.join()


def _serve(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    logging.disable(logging.WARNING)  # megatron-core tells of every data set; what is worth hearing goes to `say`
    try:
        result, status = function(*arguments, say=lambda line: sender.send(("said", line))), ""
    except Exception as error:  # of whatever kind: one case's fault must not cost the others' figures
        result, status = None, _status(error)
    sender.send(("done", result, status))


def _status(error: Exception) -> str:
    """A ValueError is for the user, and says all that there is to say."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, ValueError):
        return f"{SKIPPED}: {' '.join(lines)}"
    return f"{FAILED}: {type(error).__name__}: {lines[0]}"
