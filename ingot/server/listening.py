"""Sockets that listen: which port, and their end."""

from __future__ import annotations

import contextlib
import os
import socket

from ingot.errors import ConfigError

_PORTS = 65536


def usable(port: int) -> int:
    """The port; ConfigError for one that there is not, which the system would take modulo the number of ports."""
    if not 0 <= port < _PORTS:
        raise ConfigError(f"there is no port {port}; ports are 1 to {_PORTS - 1}, 0 asks for one that is free")
    return port


def end_listening(handle: int) -> None:
    """For everybody: a child that is being made has the socket too until it runs its program, and while it has, clients
    would be let in whom nobody answers."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(handle)) as listening:
        listening.shutdown(socket.SHUT_RDWR)
