"""Ending a process after a signal even if it waits for a device that is gone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

PATIENCE = 25.0
"""Seconds after a signal until a process that waits for others ends by itself; clusters kill after 30."""


class SignalGuard:
    """Ends the process some seconds after SIGINT or SIGTERM, unless it is released before.

    Python's own handlers do not run while the main thread waits in a collective operation; this is a thread that hears
    of signals through a pipe.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, daemon=True).start()

    def release(self) -> None:
        """From here on the process ends in its own time."""
        if not self._released.is_set():
            self._released.set()
            signal.set_wakeup_fd(self._before)
            self._told.close()

    def _wait(self) -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            heard = self._heard.recv(1)
            if not heard:  # released
                return
            number = heard[0]
        if not self._released.wait(PATIENCE):
            words = f"not ended {PATIENCE:g} seconds after the signal, as if a device were gone; ending now"
            print(words, file=sys.stderr, flush=True)
            os._exit(128 + number)
