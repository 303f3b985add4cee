"""No space, folders with odd names, a broker that goes away: errors in words, nothing left open."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from fulgurite.infra import kafka_probe
from fulgurite.infra.cli_common import register
from fulgurite.infra.clickhouse_config import config_xml
from fulgurite.infra.folder_lock import FolderLock
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.kafka_config import server_properties
from fulgurite.infra.state import ProcessRef, RunState, read_state, remove_state, write_state
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings


def _no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_that_cannot_be_written_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", _no_space)
        with pytest.raises(StartError, match=f"cannot lock the data folder {tmp_path}: No space left"):
            FolderLock(tmp_path, "test")
    FolderLock(tmp_path, "test").close()


def test_state_that_cannot_be_written_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = RunState(owner=ProcessRef.current(), kafka="old")
    write_state(tmp_path, old)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", _no_space)
        with pytest.raises(StartError, match=r"cannot write .*state\.json: No space left"):
            write_state(tmp_path, RunState(owner=ProcessRef.current()))
    assert read_state(tmp_path) == old
    remove_state(tmp_path)
    assert list((tmp_path / "run").iterdir()) == []


def test_threads_may_write_the_state_at_once(tmp_path: Path) -> None:
    state, together = RunState(owner=ProcessRef.current()), threading.Barrier(4)

    def write(_: int) -> None:
        together.wait(20)
        for _ in range(50):
            write_state(tmp_path, state)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert read_state(tmp_path) == state


def test_no_space_is_one_line_and_exit_3() -> None:
    app = typer.Typer()
    register(app, "fill", "fulgurite fill")(lambda: _no_space())
    result = CliRunner().invoke(app, [])
    assert result.exit_code == StartError.exit_code
    assert "fulgurite fill: No space left on device (data folder" in result.output
    assert len(result.output.splitlines()) == 1


def test_kafka_paths_are_escaped_and_a_comma_is_refused() -> None:
    lines = server_properties(1, 2, Path("/donn\u00e9es \\ \U0001f525/log")).splitlines()
    assert r"log.dirs=/donn\u00e9es \u005c \ud83d\udd25/log" in lines
    with pytest.raises(StartError, match="comma"):
        server_properties(1, 2, Path("/a,b/log"))


def test_clickhouse_paths_are_escaped() -> None:
    root = ElementTree.fromstring(config_xml(1, Path("/a<b>&c/engine.log"), 1))
    assert root.findtext("logger/log") == "/a<b>&c/engine.log"


@pytest.mark.slow
def test_kafka_starts_in_a_folder_beyond_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    with EmbeddedKafka(tmp_path / "donn\u00e9es \u4e2d:=") as kafka:
        assert kafka_probe.is_usable(kafka.settings())


def test_a_probe_of_a_broker_that_goes_away_leaves_no_client_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def created(_: KafkaSettings) -> None:
        pass

    monkeypatch.setattr(kafka_probe, "_create_topic", created)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            for _ in range(2):  # is_usable's own connection, then the producer's
                server.accept()[0].close()
            server.close()

        thread = threading.Thread(target=hang_up)
        port = server.getsockname()[1]
        thread.start()
        assert not kafka_probe.is_usable(KafkaSettings(bootstrap_servers=f"127.0.0.1:{port}"))
        thread.join(20)
    gc.collect()  # an unclosed client warns here, and warnings are errors
