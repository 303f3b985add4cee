"""Somebody who takes a port between a store's look at it and the moment when the store listens there."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator
from pathlib import Path

from fulgurite.infra.processes import wait_until


@contextlib.contextmanager
def taken_once_there(file: Path, port: int) -> Generator[None]:
    """Until the end of the block, from the moment when the file is there: the store has chosen its ports then."""
    taken: list[socket.socket] = []

    def take() -> None:
        assert wait_until(file.exists, 60, every_seconds=0.001)
        taken.append(socket.create_server(("127.0.0.1", port)))

    taking = threading.Thread(target=take)
    taking.start()
    try:
        yield
        taking.join()
        assert taken
    finally:
        taking.join()
        for server in taken:
            server.close()
