"""The embedded engine, and the contract of the private binding it rests on (to be run when chdb-core changes)."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import socket
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import clickhouse_connect
import pytest

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.clickhouse_config import MERGE_NICE
from fulgurite.infra.ports import free_port
from fulgurite.schemas.errors import StartError
from tests.infra.taken_ports import taken_once_there

CAP_SYS_NICE = 23
TABLE = (
    "CREATE TABLE t.rows (x UInt64) ENGINE = MergeTree ORDER BY x SETTINGS non_replicated_deduplication_window = 100"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedClickHouse]:
    with EmbeddedClickHouse(tmp_path / "clickhouse") as server:
        yield server


def _insert(server: EmbeddedClickHouse, begin: int, token: str) -> None:
    server.command(
        f"INSERT INTO t.rows SELECT number + {begin} FROM numbers(100) SETTINGS insert_deduplication_token = '{token}'"
    )


def _may_set_nice() -> bool:
    status = Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]
    return bool(int(status, 16) >> CAP_SYS_NICE & 1)


def _nice(pid: int | None, thread: str) -> set[int]:
    """What the threads of this name run at; a thread may end while it is asked."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().strip() == thread:
                found.add(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return found


def test_the_pinned_engine_is_installed() -> None:
    assert importlib.metadata.version("chdb-core") == "26.9.0"


@pytest.mark.chaos
def test_what_was_acknowledged_survives_kill_and_restart_on_the_same_port(server: EmbeddedClickHouse) -> None:
    server.command("CREATE DATABASE t ENGINE = Atomic")
    server.command(TABLE)
    _insert(server, 0, "first")
    url = server.url
    server.kill()
    assert not server.running
    server.start()
    assert server.url == url
    assert server.command("SELECT count() FROM t.rows").strip() == "100"
    _insert(server, 0, "first")  # the retry of somebody who never saw the answer
    assert server.command("SELECT count() FROM t.rows").strip() == "100"
    _insert(server, 100, "second")
    server.stop()
    server.start()
    assert server.command("SELECT count(), sum(x) FROM t.rows").split() == ["200", str(sum(range(200)))]


@pytest.mark.chaos
def test_acknowledged_inserts_survive_kill_in_the_middle_of_inserting(server: EmbeddedClickHouse) -> None:
    server.command("CREATE DATABASE t ENGINE = Atomic")
    server.command(TABLE)
    acknowledged: list[int] = []

    def insert_until_it_fails() -> None:
        for number in range(10_000):
            try:
                _insert(server, 100 * number, f"n{number}")
            except (OSError, StartError):
                return
            acknowledged.append(number)

    writer = threading.Thread(target=insert_until_it_fails)
    writer.start()
    while len(acknowledged) < 20:
        writer.join(0.01)
    server.kill()
    writer.join()
    server.start()
    last = len(acknowledged)
    _insert(server, 100 * last, f"n{last}")  # the one under way is tried again with its token: never twice
    assert server.command("SELECT count(), uniqExact(x) FROM t.rows").split() == [str(100 * (last + 1))] * 2


def test_only_the_user_with_the_password_reads(server: EmbeddedClickHouse) -> None:
    server.command("CREATE DATABASE t ENGINE = Atomic")
    server.command(TABLE)
    for sql in ("SELECT * FROM t.rows", "SELECT * FROM file('/etc/passwd', 'LineAsString')", "CREATE DATABASE mine"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server.url, data=sql.encode()), timeout=10)
        with refused.value as answer:
            text = answer.read()
            assert b"ACCESS_DENIED" in text or b"QUOTA_EXCEEDED" in text
    for name in ("password", "conf/users.xml", "conf/own_access"):
        assert stat.S_IMODE((server.folder / name).stat().st_mode) == 0o600


def test_nobody_without_the_password_shuts_the_server(server: EmbeddedClickHouse) -> None:
    for restarted in (False, True):
        if restarted:
            server.stop()
            server.start()
        for sql in ("SYSTEM STOP LISTEN HTTP", "SYSTEM START LISTEN TCP", "SYSTEM STOP LISTEN QUERIES ALL"):
            for who in ("", "?user=default", "?user=default&quota_key=another"):
                request = urllib.request.Request(f"{server.url}/{who}", data=sql.encode())
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request, timeout=10)
                with refused.value as answer:
                    assert b"QUOTA_EXCEEDED" in answer.read()
        assert server.command("SELECT 1").strip() == "1"


def test_nobody_without_the_password_keeps_the_server_busy(server: EmbeddedClickHouse) -> None:
    """Not by functions of constants, which need no right, nor by settings of their own, nor by their number."""
    for sql, words in (
        ("SELECT length(arrayMap(x -> x, range(200000000)))", b"MEMORY_LIMIT_EXCEEDED"),
        ("SELECT 1 SETTINGS max_memory_usage = 0", b"SETTING_CONSTRAINT_VIOLATION"),
        ("SELECT 1 SETTINGS max_threads = 16", b"SETTING_CONSTRAINT_VIOLATION"),
        ("SELECT 1 SETTINGS max_concurrent_queries_for_user = 0", b"SETTING_CONSTRAINT_VIOLATION"),
        ("SELECT 1 SETTINGS profile = 'default'", b"SETTING_CONSTRAINT_VIOLATION"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server.url, data=sql.encode()), timeout=10)
        with refused.value as answer:
            assert words in answer.read()
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(urllib.request.Request(server.url, data=b"SELECT sleep(3)"), timeout=10)

    strangers = [threading.Thread(target=hold) for _ in range(110)]
    for stranger in strangers:
        stranger.start()
    try:
        for _ in range(20):
            assert server.command("SELECT 1").strip() == "1"
            time.sleep(0.05)
    finally:
        over.set()
        for stranger in strangers:
            stranger.join()


def test_the_client_library_works_unchanged_and_memory_is_bounded(server: EmbeddedClickHouse) -> None:
    with clickhouse_connect.get_client(
        dsn=server.url, username=server.user, password=server.password.get_secret_value()
    ) as client:
        client.command("CREATE DATABASE t ENGINE = Atomic")
        client.command(TABLE)
        client.insert("t.rows", [[1], [2]], column_names=["x"])
        assert client.query("SELECT sum(x) FROM t.rows").result_rows == [(3,)]
        limit = client.query("SELECT value FROM system.server_settings WHERE name = 'max_server_memory_usage'")
        assert limit.result_rows == [(str(2048 * 1024 * 1024),)]


@pytest.mark.skipif(not _may_set_nice(), reason="without CAP_SYS_NICE the engine leaves its threads as they are")
def test_merges_yield_to_inserts_and_questions(server: EmbeddedClickHouse) -> None:
    server.command("CREATE TABLE default.texts (x String) ENGINE = MergeTree ORDER BY x")
    for _ in range(2):
        server.command("INSERT INTO default.texts SELECT hex(cityHash64(number)) FROM numbers(2000000)")
    merge = threading.Thread(target=server.command, args=("OPTIMIZE TABLE default.texts FINAL",))
    merge.start()
    seen: set[int] = set()
    while merge.is_alive():
        seen |= _nice(server.pid, "MergeMutate")
        time.sleep(0.01)
    merge.join()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert own + MERGE_NICE in seen
    assert _nice(server.pid, "HTTPHandler") <= {own}


def test_the_log_is_readable_and_short(server: EmbeddedClickHouse) -> None:
    text = server.log.read_text()
    assert "Listening for http" in text
    assert "<Trace>" not in text


def test_a_second_owner_is_refused(server: EmbeddedClickHouse) -> None:
    with pytest.raises(StartError, match=r"in use by the embedded ClickHouse \(pid"):
        EmbeddedClickHouse(server.folder, lock_wait_seconds=0.1).start()


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=rf"ClickHouse: port {port} on 127\.0\.0\.1 is taken"):
            EmbeddedClickHouse(tmp_path, port=port).start()


def test_a_port_that_is_taken_while_it_starts_is_replaced(tmp_path: Path) -> None:
    clickhouse, taken = EmbeddedClickHouse(tmp_path), free_port()
    (tmp_path / "ports.json").write_text(json.dumps({"http": taken}))
    with taken_once_there(tmp_path / "conf" / "own_access", taken), clickhouse:
        assert clickhouse.command("SELECT 1").strip() == "1"
        assert clickhouse.url != f"http://127.0.0.1:{taken}"


def test_an_engine_that_ends_at_its_start_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "data" / "metadata").mkdir(parents=True)
    (tmp_path / "data" / "metadata" / "broken.sql").write_text("this is no table definition")
    with pytest.raises(StartError, match=r"(?s)ClickHouse ended while it started.*broken"):
        EmbeddedClickHouse(tmp_path).start()


def test_before_the_start_there_is_no_address(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="has not been started"):
        _ = EmbeddedClickHouse(tmp_path).url
