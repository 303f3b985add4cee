"""The fixtures give what the other tests rely on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import clickhouse_connect

from fulgurite.schemas.settings import Settings


def test_every_test_has_empty_tables_and_its_own_topics(settings: Settings) -> None:
    store = settings.clickhouse
    client = clickhouse_connect.get_client(
        dsn=store.url, username=store.user, password=store.password.get_secret_value(), database=store.database
    )
    try:
        counts = client.query(
            "SELECT name, total_rows FROM system.tables WHERE database = currentDatabase()"
        ).result_rows
        assert {name for name, rows in counts if rows} == {"schema_migrations"}
        assert client.query("SELECT currentDatabase()").result_rows == [(store.database,)]
    finally:
        client.close()
    assert settings.kafka.topic_prefix.startswith("test")


RUN = """
import os, signal, subprocess, sys
from tests import orphans
orphans.watch(sys.argv[1])
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_started_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    run = subprocess.run([sys.executable, "-c", RUN, folder], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    pid = int(run.stdout)
    until = time.monotonic() + 10
    while time.monotonic() < until and (_runs(pid) or folder.exists()):
        time.sleep(0.05)
    assert not _runs(pid)
    assert not folder.exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
