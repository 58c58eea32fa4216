"""Work done by a thread ahead of whoever takes its results."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import TypeVar

from megaspeech.preparation.timeline import Timeline

Item = TypeVar("Item")
_PATIENCE = 0.2  # seconds between looks at whether anybody still wants the results


def ahead(items: Iterable[Item], *, timeline: Timeline, depth: int = 1) -> Iterator[Item]:
    """What `items` yields, in order, made by a thread that is up to `depth` finished items ahead.

    Whatever `items` raises is raised here, in its place. Leaving the iteration early ends the thread. The time spent
    waiting is recorded as the lane "wait" of the timeline.
    """
    ready: Queue = Queue(maxsize=depth)
    is_over = threading.Event()

    def put(kind: str, value: object) -> None:
        while not is_over.is_set():
            try:
                return ready.put((kind, value), timeout=_PATIENCE)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if is_over.is_set():
                    return
            put("end", None)
        except BaseException as error:  # whoever takes the results shall see it
            put("error", error)

    worker = threading.Thread(target=work, name="ahead", daemon=True)
    worker.start()
    try:
        while True:
            with timeline.span("wait", depth=ready.qsize()):
                kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            del value  # a window of waveforms is large
    finally:
        is_over.set()
        with suppress(Empty):
            ready.get_nowait()  # makes room for a thread that waits for it
        worker.join()
