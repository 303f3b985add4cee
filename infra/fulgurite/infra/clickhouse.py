"""ClickHouse as a child process: the real engine with its own HTTP interface, on loopback.

    data folder/lock          one owner at a time
                ports.json    the port of the last start, used again
                password      of the user `app`, made once, readable by its owner only; reader_password: of `reader`
                conf/         what the engine is told (written at every start)
                data/         its tables
                engine.log    what it says, beside console.log for what precedes its logging

Promises: after start() queries and inserts work; kill -9 of the engine or of this process loses no acknowledged insert;
the engine never outlives this process; nobody without the password reads anything; on a disk that is nearly full it is
not running (clickhouse_room.py). Differences from clickhouse-server
(no async inserts, no SQL users, no replication): docs and facts of chdb. The child is clickhouse_child.py.
"""

from __future__ import annotations

import base64
import http.client
import sys
import time
from pathlib import Path

from pydantic import SecretStr

from fulgurite.infra.clickhouse_config import READER, USER, config_xml, users_xml
from fulgurite.infra.clickhouse_room import check_definitions, check_room
from fulgurite.infra.folder_lock import FolderLock
from fulgurite.infra.ports import is_free, remembered_ports
from fulgurite.infra.processes import ChildProcess, start_process, tail
from fulgurite.infra.settings_file import stored_password, write_private
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import ClickHouseSettings

_MIB = 1024 * 1024


class EmbeddedClickHouse:
    """One engine on one folder. start() and stop() may be called in turn, any number of times."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        max_memory_mb: int = 2048,
        lock_wait_seconds: float = 10.0,
        readable_database: str = "fulgurite",
    ) -> None:
        """`port` fixes the HTTP port (StartError when it is taken); None remembers or finds a free one.

        `readable_database` is what the user `reader` may read.

        The engine of a killed owner keeps the folder's lock for the instant it takes to die: `lock_wait_seconds`.
        """
        self._lock_wait_seconds = lock_wait_seconds
        self.folder = folder.absolute()
        self.log = self.folder / "engine.log"
        self.user = USER
        self._readable_database = readable_database
        self._wanted_port = port
        self._max_memory_bytes = max_memory_mb * _MIB
        self._port = 0
        self._usable_port = 0
        self._password = ""
        self._reader_password = SecretStr("")
        self._process: ChildProcess | None = None
        self._lock: FolderLock | None = None

    @property
    def url(self) -> str:
        """Of the HTTP interface. Raises StartError before the first start."""
        if not self._port:
            raise StartError("the embedded ClickHouse has not been started")
        return f"http://127.0.0.1:{self._port}"

    @property
    def password(self) -> SecretStr:
        return SecretStr(self._password)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.running else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    def settings(self, database: str = "fulgurite") -> ClickHouseSettings:
        """How clients reach it."""
        return ClickHouseSettings(url=self.url, user=self.user, password=self.password, database=database)

    def reader_settings(self) -> ClickHouseSettings:
        """How dashboards reach it: the user may read one database and nothing else."""
        return ClickHouseSettings(
            url=self.url, user=READER, password=self._reader_password, database=self._readable_database
        )

    def start(self, timeout_seconds: float = 60.0) -> EmbeddedClickHouse:
        """Returns when queries work. Raises StartError: why, with the last lines of the engine's log."""
        if self.running:
            return self
        deadline = time.monotonic() + timeout_seconds
        self._release()
        self._lock = FolderLock(self.folder, "the embedded ClickHouse", wait_seconds=self._lock_wait_seconds)
        try:
            self._password = stored_password(self.folder / "password").get_secret_value()
            self._reader_password = stored_password(self.folder / "reader_password")
            check_room(self.folder)
            while not self._begin(deadline, timeout_seconds):
                pass  # each time with another port, until the deadline
        except OSError as error:
            self.kill()
            raise StartError(f"ClickHouse cannot use its data folder {self.folder}: {error}") from error
        except BaseException:
            self.kill()
            raise
        return self

    def _begin(self, deadline: float, timeout_seconds: float) -> bool:
        """False where somebody took the port between our look at it and the engine's."""
        assert self._lock is not None
        # After a crash its clients wait at the old port: that port or none.
        wanted = self._wanted_port or self._usable_port or None
        port = remembered_ports(self.folder / "ports.json", ("http",), wanted, "ClickHouse")["http"]
        self._configure(port)
        check_definitions(self.folder / "data")
        self._process = start_process(
            "ClickHouse",
            [sys.executable, "-m", "fulgurite.infra.clickhouse_child", str(self.folder / "data")],
            self.folder / "console.log",
            cwd=self.folder / "conf",
            keep_open=(self._lock.fileno,),  # the lock stays held until the engine, too, is gone
        )
        self._port = port
        try:
            self._wait_until_usable(deadline, timeout_seconds)
        except StartError:
            if self.running or is_free(port):
                raise
            return False
        self._usable_port = port
        return True

    def stop(self, timeout_seconds: float = 20.0) -> None:
        """A clean shutdown; SIGKILL if it takes longer."""
        if self._process is not None:
            self._process.stop(timeout_seconds)
        self._release()

    def kill(self) -> None:
        """kill -9: what a crash looks like."""
        if self._process is not None:
            self._process.kill()
        self._release()

    def wait(self, timeout_seconds: float) -> int | None:
        """The engine's return code once it has ended by itself, None if it still runs then."""
        return self._process.wait(timeout_seconds) if self._process is not None else None

    def command(self, sql: str, timeout_seconds: float = 30.0) -> str:
        """Runs one statement as `app`, without any client library; for clients see settings()."""
        token = base64.b64encode(f"{self.user}:{self._password}".encode()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_seconds)
        try:
            connection.request("POST", "/", sql.encode(), {"Authorization": f"Basic {token}"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        finally:
            connection.close()
        if response.status != 200:
            raise StartError(f"ClickHouse refused {sql!r}: {text.strip()}")
        return text

    def __enter__(self) -> EmbeddedClickHouse:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configure(self, port: int) -> None:
        self.folder.chmod(0o700)  # the engine's log has queries, and these may have data in them
        conf = self.folder / "conf"
        conf.mkdir(mode=0o700, exist_ok=True)
        (self.folder / "data").mkdir(mode=0o700, exist_ok=True)
        (conf / "config.xml").write_text(config_xml(port, self.log, self._max_memory_bytes), "utf-8")
        users = users_xml(
            self._password,
            self._reader_password.get_secret_value(),
            self._readable_database,
            self._max_memory_bytes * 3 // 4,
        )
        write_private(conf / "users.xml", users)
        write_private(conf / "own_access", f"http://127.0.0.1:{port}\n{USER}\n{self._password}\n")

    def _wait_until_usable(self, deadline: float, timeout_seconds: float) -> None:
        assert self._process is not None
        while not self._answers():
            if self._process.wait(0.05) is not None:
                code = self._process.returncode
                raise StartError(f"ClickHouse ended while it started (exit code {code}):\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise StartError(f"ClickHouse was not usable after {timeout_seconds:.0f} s:\n{self._last_words()}")

    def _answers(self) -> bool:
        """Whether our user gets an answer: not only that a port, perhaps a stranger's, is open."""
        try:
            return self.command("SELECT 'usable'", timeout_seconds=2.0).strip() == "usable"
        except (OSError, http.client.HTTPException, StartError):
            return False

    def _last_words(self) -> str:
        console, log = tail(self.folder / "console.log", 10), tail(self.log, 15)
        return f"{console}\n{log}\n(all of it: {self.log})".strip()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
