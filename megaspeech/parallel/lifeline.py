"""A process that ends with the one that started it.

torchrun starts every rank in a session of its own, so killing torchrun alone would leave ranks behind that go on
writing into the run's directory, beside those of the next start. So would a checkpoint's writers that a killed rank has
forked, and they keep its connections open, on which the other ranks then wait.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal this process gets when its parent dies."""


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; elsewhere than on Linux nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def end_forks_with_this_process() -> None:
    """Have every process that is forked from this one, or from a fork of it, end with its parent."""
    os.register_at_fork(after_in_child=end_with_parent)
