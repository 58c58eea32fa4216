"""Python's garbage collector, run at the same steps on all ranks.

Left to itself it stops one rank or another for tens of milliseconds whenever that one has made enough objects, and in a
step with collectives every rank waits for the slowest (megatron-core's `--manual-gc` is for the same).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_at_steps(interval: int) -> Iterator[Callable[[int], None]]:
    """Within, nothing is collected but by the function it gives, which is told of each step that is done.

    Args:
        interval: steps between collections; 0 leaves the collector as it is.
    """
    if not interval:
        yield lambda step: None
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield lambda step: gc.collect() if step % interval == 0 else None
    finally:
        if was_enabled:
            gc.enable()
