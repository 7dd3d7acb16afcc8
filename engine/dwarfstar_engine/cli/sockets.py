"""Listening sockets, with errors that name the option at fault."""

from __future__ import annotations

import errno
import socket

from dwarfstar_engine.errors import SettingsError
from dwarfstar_engine.node.facts import is_any, shown_host


def bind(host: str, port: int, prefix: str) -> socket.socket:
    """A listening socket. Raises SettingsError naming the option, ``--{prefix}host`` or ``--{prefix}port``."""
    option = f"--{prefix}host"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and is_any(host) and socket.has_dualstack_ipv6()  # as the address says
        return socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=both)
    except OSError as error:
        code, problem = "bad_host", (error.strerror or str(error)).split(" (", 1)[0]
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            option, code = f"--{prefix}port", "port_taken"
            problem = "another program has it" if error.errno == errno.EADDRINUSE else "permission denied"
        raise SettingsError(
            f"cannot listen on {shown_host(host)}:{port} ({problem}): choose another with {option}", code=code
        ) from None


def port_of(address: str) -> int:
    """The port of "host:port"."""
    return int(address.rpartition(":")[2])
