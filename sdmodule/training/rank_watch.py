"""Noticing that another process of a run is gone, whatever this one is waiting for."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading

PATIENCE = 25.0
"""Seconds from a loss until a process that still waits for others ends by itself."""

SAVING = 30.0
"""Seconds more for a process that is ending already: it may be saving a checkpoint."""

BYE = b"."
"""What a process sends that leaves in order."""

_open: list[socket.socket] = []
"""Connections of this process."""


def _close_in_worker() -> None:
    """Close them in a forked process: data loading workers outlive a killed process by seconds."""
    for connection in _open:
        connection.close()


os.register_at_fork(after_in_child=_close_in_worker)


class RankWatch:
    """A connection from each process of a run to that of rank 0, which breaks if either of them is gone.

    Collective operations need not notice a process that was killed: NCCL's wait for it. So once a connection breaks
    all processes are told, by their own connections breaking, and those that do not end by themselves are ended.

    Args:
        rank: of this process.
        server: the socket on which rank 0 listens; None for the others.
        address: host and port of that socket.
        others: number of other processes.
        patience: seconds; see `PATIENCE`.
        saving: seconds; see `SAVING`.
    """

    def __init__(
        self,
        rank: int,
        server: socket.socket | None,
        address: tuple[str, int],
        others: int,
        patience: float = PATIENCE,
        saving: float = SAVING,
    ) -> None:
        self._rank, self._patience, self._saving = rank, patience, saving
        self._ending, self._left = threading.Event(), threading.Event()
        if server is None:
            self._connections = [socket.create_connection(address, timeout=60)]
        else:
            server.settimeout(60)
            self._connections = [server.accept()[0] for _ in range(others)]
            server.close()
        for connection in self._connections:
            _keep_alive(connection)
        _open.extend(self._connections)
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """The run is over: others may go on without this process, and it without them."""
        self._left.set()
        self._ending.set()
        for connection in self._connections:
            try:
                connection.sendall(BYE)
            except OSError:  # it has left too
                pass

    def ending(self) -> None:
        """This process is ending because of an error; others cannot go on without it."""
        self._ending.set()

    def _watch(self) -> None:
        """Wait until another process leaves in order, or is gone."""
        waiting = list(self._connections)
        while waiting:
            for connection in select.select(waiting, [], [])[0]:
                try:
                    said = connection.recv(1)
                except OSError:  # no answer from its machine
                    said = b""
                if said != BYE:
                    self._end()
                    return
                waiting.remove(connection)

    def _end(self) -> None:
        """End this process, unless it does so by itself in time."""
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if not self._left.is_set() and self._ending.wait(self._patience):
            self._left.wait(self._saving)
        if self._left.is_set():
            return
        words = f"another process of this run is gone; rank {self._rank}, which waits for it, ends now"
        print(words, file=sys.stderr, flush=True)
        os._exit(1)


def listen() -> socket.socket:
    """A socket for the other processes, on any free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(connection: socket.socket) -> None:
    """Let the connection break within half a minute if the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
