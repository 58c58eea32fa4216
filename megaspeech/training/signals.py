"""Signals that ask a run to stop: SIGTERM, and SIGUSR1, which Slurm sends before a job's time limit.

Before the first step nothing would be lost: the process exits at once. While training they are noted and the loop asks
for them. A thread reads them from Python's wake-up descriptor, because a handler has to wait for the main thread to
return from C, which a rank that waits for a lost one never does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading

from megaspeech.parallel.launch import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """The stop signals of this process, from `listen` on."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._status_at_once: int | None = REQUEUE

    def listen(self) -> None:
        """Take the signals over; main thread only. Processes forked from this one leave them to it."""
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno())
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)
        os.register_at_fork(after_in_child=_leave_to_parent)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def hold(self) -> None:
        """From now on signals are noted in `received`, and no more."""
        self._status_at_once = None

    def exit_at_once(self, status: int) -> None:
        """From now on a signal ends the process with `status`; one that has come before does so here."""
        self._status_at_once = status
        if self.received is not None:
            os._exit(status)

    def ignore(self) -> None:
        """From now on signals do nothing, until the process is gone; main thread only.

        Python sets its handlers back to the default while it ends, where a signal would still kill: a run that is done
        would seem to have failed. What is ignored stays ignored.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _read(self, reader: socket.socket) -> None:
        while True:
            for number in reader.recv(1):
                if number in SIGNALS:
                    self.received = signal.Signals(number)
                    if self._status_at_once is not None:
                        os._exit(self._status_at_once)


def _leave_to_parent() -> None:
    """Slurm signals all processes of a rank. A checkpoint's writer goes on, and the descriptor is its parent's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
