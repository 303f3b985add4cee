"""The process that is the embedded ClickHouse: python -m fulgurite.infra.clickhouse_child DATA_FOLDER.

    main thread      waits for SIGTERM, the end of stdin (the parent is gone) or of the engine; then asks it to end
    disk thread      ends the process at once when the disk is nearly full (clickhouse_room.py says why)
    engine thread    _chdb.query: starts clickhouse-local, opens its HTTP server, sleeps in a query until that is killed

The engine reads config.xml and users.xml from the working directory. `_chdb.query` with SYSTEM START LISTEN is a
private binding of chdb-core, the only way to ClickHouse's own HTTP server in a Python package; chdb-core is therefore
pinned exactly and tests/infra/test_clickhouse.py holds the contract. One such query per process.
"""

from __future__ import annotations

import base64
import ctypes
import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from fulgurite.infra.clickhouse_room import wait_until_full
from fulgurite.schemas.errors import StartError

BLOCKER = "SELECT sleep(3000000) SETTINGS function_sleep_max_microseconds_per_block = 0"
"""Keeps the engine open for 34 days at a time, at no cost; ended by KILL QUERY."""

_KILL_BLOCKER = "KILL QUERY WHERE query LIKE 'SELECT sleep(3000000)%' SYNC"
_STOP_SECONDS = 2.0
"""Queries under way may finish. The engine itself would wait 5 s for idle keep-alive connections and then exit hard."""

_RTLD_DEEPBIND = 0x8


def main(data: str) -> int:
    binding = _load_binding()
    over = threading.Event()
    failure: list[str] = []

    def engine() -> None:
        try:
            binding.query("SYSTEM START LISTEN HTTP; " + BLOCKER, "TabSeparated", path=data)
        except Exception as error:
            failure.append(str(error))
        over.set()

    def parent() -> None:
        while os.read(0, 4096):
            pass
        over.set()

    def disk() -> None:
        # At once, without the queries under way: each of them could be the one that does damage.
        print(f"ended: {wait_until_full(Path(data))}", file=sys.stderr, flush=True)
        os._exit(StartError.exit_code)

    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running = threading.Thread(target=engine, name="engine", daemon=True)
    running.start()
    threading.Thread(target=parent, name="parent", daemon=True).start()
    threading.Thread(target=disk, name="disk", daemon=True).start()
    over.wait()
    asked = running.is_alive()
    if asked:
        _ask_to_end()
        running.join(_STOP_SECONDS)
    if failure and not asked:
        print(failure[0], file=sys.stderr, flush=True)
    # At once: an ordinary exit would run into C++ threads still winding down. What was acknowledged is on disk.
    os._exit(0 if asked else 1)


def _load_binding() -> Any:
    """The extension module alone: importing the package would first start another engine in a temporary folder."""
    package = importlib.util.find_spec("chdb")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package chdb-core is not installed (pip install 'fulgurite[embedded]')")
    path = str(Path(package.submodule_search_locations[0]) / "_chdb.abi3.so")
    if sys.platform == "linux":  # as the package does: its own allocator must win over another library's
        ctypes.CDLL(path, mode=sys.getdlopenflags() | _RTLD_DEEPBIND)
    loader = importlib.machinery.ExtensionFileLoader("_chdb", path)
    spec = importlib.util.spec_from_file_location("_chdb", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _ask_to_end() -> None:
    """Over its own HTTP server, as the one user who may."""
    url, user, password = Path("own_access").read_text().split("\n")[:3]
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(url, data=_KILL_BLOCKER.encode(), headers={"Authorization": f"Basic {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(request, timeout=_STOP_SECONDS).close()
    except OSError as error:
        print(f"could not end the engine cleanly: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
