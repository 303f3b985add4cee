"""Apache Kafka as a child process: the real broker, one KRaft node, on loopback.

    data folder/lock          one owner at a time
                ports.json    the ports of the last start, used again
                log/          the broker's data (formatted once, appears complete)
                broker.log    what it says, beside console.log for what precedes its logging

Promises: after start() a group can be joined and a transaction committed, not only that a port answers; kill -9 of
the broker or of this process loses nothing acknowledged (the kernel has it) and the next start on the same folder
works; the broker never outlives this process. Survives a power failure without loss only with `fsync`: it is one node.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from fulgurite.infra.folder_lock import FolderLock
from fulgurite.infra.java import java_program, kafka_jars
from fulgurite.infra.kafka_config import log4j2_config, server_properties
from fulgurite.infra.kafka_probe import is_usable
from fulgurite.infra.kafka_security import BrokerSecurity
from fulgurite.infra.ports import is_free, remembered_ports
from fulgurite.infra.processes import ChildProcess, start_process, tail
from fulgurite.infra.settings_file import write_private
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings

_MAIN = "kafka.Kafka"
_STORAGE_TOOL = "kafka.tools.StorageTool"


class EmbeddedKafka:
    """One broker on one folder. start() and stop() may be called in turn, any number of times."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        heap_mb: int = 512,
        lock_wait_seconds: float = 10.0,
        security: BrokerSecurity | None = None,
        fsync: bool = False,
    ) -> None:
        """`port` fixes the listener's port (StartError when it is taken); None remembers or finds a free one.

        Without `security` whoever is on this machine may connect: for tests; `fulgurite up` gives one. With `fsync` a
        record is on disk before it is acknowledged.

        The broker of a killed owner keeps the folder's lock for the instant it takes to die: `lock_wait_seconds`.
        """
        self._lock_wait_seconds = lock_wait_seconds
        self._security = security
        self._fsync = fsync
        self.folder = folder.absolute()
        self.log = self.folder / "broker.log"
        self._wanted_port = port
        self._heap_mb = heap_mb
        self._port = 0
        self._usable_port = 0
        self._process: ChildProcess | None = None
        self._lock: FolderLock | None = None

    @property
    def bootstrap_servers(self) -> str:
        """host:port. Raises StartError before the first start."""
        if not self._port:
            raise StartError("the embedded Kafka has not been started")
        return f"127.0.0.1:{self._port}"

    def settings(self, settings: KafkaSettings | None = None) -> KafkaSettings:
        """How clients reach it; topics and the like as in `settings`."""
        security = self._security.client_settings() if self._security is not None else {}
        known = {"bootstrap_servers": self.bootstrap_servers, **security}
        return (settings or KafkaSettings()).model_copy(update=known)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.running else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    def start(self, timeout_seconds: float = 90.0) -> EmbeddedKafka:
        """Returns when clients can really work. Raises StartError: why, with the last lines of the broker's log."""
        if self.running:
            return self
        deadline = time.monotonic() + timeout_seconds
        java, jars = java_program(), kafka_jars()
        self._release()
        self._lock = FolderLock(self.folder, "the embedded Kafka", wait_seconds=self._lock_wait_seconds)
        try:
            while not self._begin(java, jars, deadline, timeout_seconds):
                pass  # each time with other ports, until the deadline
        except OSError as error:
            self.kill()
            raise StartError(f"Kafka cannot use its data folder {self.folder}: {error}") from error
        except BaseException:
            self.kill()
            raise
        return self

    def _begin(self, java: Path, jars: Path, deadline: float, timeout_seconds: float) -> bool:
        """False where somebody took one of the ports between our look at it and the broker's."""
        assert self._lock is not None
        # After a crash its clients wait at the old port: that port or none.
        wanted = self._wanted_port or self._usable_port or None
        ports = remembered_ports(self.folder / "ports.json", ("broker", "controller"), wanted, "Kafka")
        self._configure(ports)
        self._format(java, jars)
        # The broker inherits the lock: it stays held until the broker, too, is gone.
        self._process = self._java(java, jars, [_MAIN, "server.properties"], keep_open=(self._lock.fileno,))
        self._port = ports["broker"]
        try:
            self._wait_until_usable(deadline, timeout_seconds)
        except StartError:
            if self.running or all(is_free(port) for port in ports.values()):
                raise
            return False
        self._usable_port = self._port
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
        """The broker's return code once it has ended by itself, None if it still runs then."""
        return self._process.wait(timeout_seconds) if self._process is not None else None

    def __enter__(self) -> EmbeddedKafka:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configure(self, ports: dict[str, int]) -> None:
        (self.folder / "tmp").mkdir(exist_ok=True)
        for left_over in (self.folder / "tmp").iterdir():  # native libraries that a killed broker had unpacked
            left_over.unlink(missing_ok=True)
        (self.folder / "log4j2.properties").write_text(log4j2_config(self.log))
        properties = server_properties(
            ports["broker"], ports["controller"], self.folder / "log", self._security, self._fsync
        )
        write_private(self.folder / "server.properties", properties)  # it may hold a password
        if self._security is not None:
            self.folder.chmod(0o700)  # records lie here as they came: the password would be no use
            self._security.write_client_files(self.folder)

    def _format(self, java: Path, jars: Path) -> None:
        """Formats the data folder once. Into a folder beside it, renamed when complete: a crash leaves none or all."""
        if (self.folder / "log").exists():
            return
        fresh = self.folder / "log.new"
        shutil.rmtree(fresh, ignore_errors=True)
        (self.folder / "format.properties").write_text(server_properties(1, 2, fresh))
        users = self._security.format_arguments() if self._security is not None else []
        command = [_STORAGE_TOOL, "format", "-t", _random_uuid(), "-c", "format.properties", *users]
        process = self._java(java, jars, command)
        if process.wait(60.0) != 0:
            process.kill()
            raise StartError(f"Kafka could not format {fresh}:\n{self._last_words()}")
        process.kill()
        fresh.rename(self.folder / "log")

    def _java(self, java: Path, jars: Path, arguments: list[str], keep_open: tuple[int, ...] = ()) -> ChildProcess:
        command: list[str | Path] = [
            java,
            f"-Xmx{self._heap_mb}m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",  # no files in /tmp that a crash would leave there
            "-XX:+ExitOnOutOfMemoryError",
            f"-Djava.io.tmpdir={self.folder / 'tmp'}",
            "-Dlog4j2.configurationFile=log4j2.properties",
            "-cp",
            f"{jars}/*",
            *arguments,
        ]
        # In another locale Java cannot open a folder whose name has letters beyond ASCII.
        env = os.environ | {"LC_ALL": "C.UTF-8"}
        console = self.folder / "console.log"
        return start_process("Kafka", command, console, env=env, cwd=self.folder, keep_open=keep_open)

    def _wait_until_usable(self, deadline: float, timeout_seconds: float) -> None:
        assert self._process is not None
        while not is_usable(self.settings()):
            if self._process.wait(0.1) is not None:
                code = self._process.returncode
                raise StartError(f"Kafka ended while it started (exit code {code}):\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise StartError(f"Kafka was not usable after {timeout_seconds:.0f} s:\n{self._last_words()}")

    def _last_words(self) -> str:
        console, log = tail(self.folder / "console.log", 10), tail(self.log, 15)
        return f"{console}\n{log}\n(all of it: {self.log})".strip()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _random_uuid() -> str:
    """Kafka's own form: 16 random bytes as URL-safe base64 without padding, not beginning with a dash."""
    import base64

    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text
