"""Loopback ports that stay the same over restarts."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Sequence
from pathlib import Path

from fulgurite.schemas.errors import StartError

# Below Linux' range for outgoing connections (32768 and up), so that while a server is down no client's connection
# takes its port by chance.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
_TRIES = 200
# Of the system: programs that seed `random` alike would find the same ports at the same time.
_random = random.SystemRandom()


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port(avoid: Sequence[int] = ()) -> int:
    """A port nobody listens on. Raises StartError when none was found."""
    for _ in range(_TRIES):
        port = _random.randint(_FIRST_PORT, _LAST_PORT)
        if port not in avoid and is_free(port):
            return port
    raise StartError(f"no free port between {_FIRST_PORT} and {_LAST_PORT} on 127.0.0.1 after {_TRIES} tries")


def remembered_ports(file: Path, names: Sequence[str], wanted: int | None, what: str) -> dict[str, int]:
    """A port for each name: those remembered in `file` if free, else new ones, remembered in turn.

    `wanted` fixes the first one: StartError when it is taken.
    """
    if wanted is not None and not is_free(wanted):
        raise StartError(f"{what}: port {wanted} on 127.0.0.1 is taken; stop who listens there or choose another port")
    ports: dict[str, int] = {}
    before = _read(file)
    for name in names:
        port = before.get(name)
        if port is None or port in ports.values() or not is_free(port):
            port = free_port(avoid=tuple(ports.values()))
        ports[name] = port
        if name == names[0] and wanted is not None:
            ports[name] = wanted
    if ports != before:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(ports))
        temporary.replace(file)
    return ports


def _read(file: Path) -> dict[str, int]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): port for name, port in found.items() if isinstance(port, int) and 0 < port < 65_536}
