"""Sockets that listen, at their end."""

from __future__ import annotations

import contextlib
import os
import socket


def end_listening(handle: int) -> None:
    """For everybody: a child that is being made has the socket too until it runs its program, and while it has, clients
    would be let in whom nobody answers."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(handle)) as listening:
        listening.shutdown(socket.SHUT_RDWR)
