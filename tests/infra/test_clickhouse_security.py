"""ClickHouse over TLS with an authority of our own, and the user who may only read.

The embedded engine cannot speak TLS itself (its LISTEN knows HTTP and TCP only), so a proxy that ends TLS stands before
the real engine, as a load balancer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError
from pydantic import SecretStr

from fulgurite.consumers.materialiser.blocks import OWN_TABLE, Partition, Slice
from fulgurite.consumers.materialiser.errors import Rejected
from fulgurite.consumers.materialiser.store import Store
from fulgurite.consumers.redaction import apply_redaction
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.clickhouse_config import users_xml
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.redaction import RedactionSettings, ValueRule
from fulgurite.schemas.settings import ClickHouseSettings, load_settings
from fulgurite.schemas.topics import SPANS
from tests.infra.tls_files import Authority, Certificate


@contextlib.contextmanager
def tls_before(port: int, server: Certificate, clients: Path | None = None) -> Generator[int]:
    """A TLS port before `port`; with `clients` it asks for a certificate which that authority signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    if clients is not None:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    ended = threading.Event()

    def accept() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):  # a client that does not trust us hangs up
                client = listener.accept()[0]
                client.settimeout(10)
                threads.append(threading.Thread(target=serve, args=(client,)))
                threads[-1].start()

    def serve(client: socket.socket) -> None:
        try:
            secure = context.wrap_socket(client, server_side=True)
        except OSError:
            client.close()
            return
        with secure, socket.create_connection(("127.0.0.1", port)) as plain:
            back = threading.Thread(target=pump, args=(plain, secure))
            back.start()
            pump(secure, plain)
            back.join()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def over_tls(settings: ClickHouseSettings, port: int, **files: Path | bool) -> ClickHouseSettings:
    return ClickHouseSettings.model_validate(
        settings.model_dump() | {"url": f"https://127.0.0.1:{port}", "password": settings.password} | files
    )


def test_migrations_and_queries_over_tls(clickhouse_settings: ClickHouseSettings, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    stranger = Authority(tmp_path / "another", "another authority")
    port = int(clickhouse_settings.url.rpartition(":")[2])
    with tls_before(port, authority.certificate_for("server")) as secure:
        trusted = over_tls(clickhouse_settings, secure, ssl_cafile=authority.certificate)
        assert apply_migrations(trusted)
        with clickhouse_connect.get_client(**connection_options(trusted), database=trusted.database) as client:
            assert client.command("SELECT count() FROM spans") == 0
        for wrong in ({"ssl_cafile": stranger.certificate}, {}):
            with pytest.raises(ClickHouseError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
                clickhouse_connect.get_client(**connection_options(over_tls(clickhouse_settings, secure, **wrong)))
        unverified = over_tls(clickhouse_settings, secure, ssl_verify=False)
        with pytest.warns(Warning, match="certificate verification"):
            clickhouse_connect.get_client(**connection_options(unverified)).close()


def test_a_server_that_asks_for_our_certificate(clickhouse_settings: ClickHouseSettings, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    ours = authority.certificate_for("client")
    port = int(clickhouse_settings.url.rpartition(":")[2])
    with tls_before(port, authority.certificate_for("server"), clients=authority.certificate) as secure:
        known = over_tls(
            clickhouse_settings,
            secure,
            ssl_cafile=authority.certificate,
            ssl_certfile=ours.certificate,
            ssl_keyfile=ours.key,
        )
        clickhouse_connect.get_client(**connection_options(known)).close()
        unknown = over_tls(clickhouse_settings, secure, ssl_cafile=authority.certificate)
        with pytest.raises(ClickHouseError):
            clickhouse_connect.get_client(**connection_options(unknown))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"SSL_CAFILE": "/no/such.pem"}, r"CLICKHOUSE__SSL_CAFILE = .*must be a readable file \(No such file"),
        ({"SSL_CAFILE": __file__}, "has no effect: clickhouse.url is not https"),
        ({"URL": "https://h:8443", "SSL_CERTFILE": __file__}, "belong together: set both or none"),
    ],
)
def test_contradictions_are_told(tmp_path: Path, values: dict[str, str], words: str) -> None:
    named = {f"FULGURITE_CLICKHOUSE__{name}": value for name, value in values.items()}
    with pytest.raises(SettingsError, match=words):
        load_settings({"FULGURITE_HOME": str(tmp_path), **named})


def test_the_reader_reads_one_database_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("secret\n")
    with EmbeddedClickHouse(tmp_path / "clickhouse", readable_database="shown") as engine:
        assert (engine.folder / "reader_password").stat().st_mode & 0o777 == 0o600
        for database in ("shown", "hidden"):
            apply_migrations(engine.settings(database))
        reader = engine.reader_settings()
        with clickhouse_connect.get_client(**connection_options(reader), database="shown") as client:
            assert client.command("SELECT count() FROM spans SETTINGS max_threads = 1") == 0
            assert client.command("SELECT count() FROM llm_calls") == 0
            assert "spans" in str(client.command("SHOW TABLES"))
            for forbidden in (
                "SELECT * FROM hidden.spans",
                "INSERT INTO spans (span_id) VALUES ('x')",
                "CREATE TABLE shown.mine (x Int8) ENGINE = Memory",
                "DROP TABLE spans",
                f"SELECT * FROM file('{tmp_path / 'secret.csv'}', 'CSV', 'x String')",
                f"SELECT * FROM default.`{tmp_path / 'secret.csv'}`",
                "SELECT * FROM url('http://127.0.0.1:1/', 'CSV', 'x String')",
                "SYSTEM STOP LISTEN HTTP",
            ):
                with pytest.raises(DatabaseError, match=r"ACCESS_DENIED|READONLY|Not enough privileges"):
                    client.command(forbidden)


def test_the_grants_that_we_ask_for_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrations, inserts, redaction and views, as a user who has exactly the grants of infra/clickhouse/users.sql."""
    text = (Path(__file__).parents[2] / "infra" / "clickhouse" / "users.sql").read_text()
    grants = re.findall(r"^(GRANT [^;]*) TO fulgurite;", text, re.MULTILINE)
    assert grants

    def with_writer(*arguments: Any) -> str:
        queries = "".join(f"<query>{grant}</query>" for grant in grants)
        who = "<password>w</password><networks><ip>127.0.0.1</ip></networks>"
        writer = f"<writer>{who}<profile>careless</profile><grants>{queries}</grants></writer>"
        careless = "<materialized_views_ignore_errors>1</materialized_views_ignore_errors>"
        xml = users_xml(*arguments).replace("</users>", f"{writer}</users>")
        return xml.replace("</profiles>", f"<careless>{careless}</careless></profiles>")

    monkeypatch.setattr("fulgurite.infra.clickhouse.users_xml", with_writer)
    with EmbeddedClickHouse(tmp_path / "clickhouse") as engine:
        writer = ClickHouseSettings(url=engine.url, user="writer", password=SecretStr("w"))
        assert apply_migrations(writer)
        with clickhouse_connect.get_client(**connection_options(writer), database="fulgurite") as client:
            assert apply_redaction(client, RedactionSettings(values=[ValueRule(name="email")]))
            raw = '{"span_id": "s", "name": "a@b.org", "start_ns": 1, "end_ns": 2}'
            names = ["raw", "key", "_topic", "_partition", "_offset", "_into"]
            client.insert("in_spans", [[raw, "", "spans", 0, 0, 3]], column_names=names)
            assert client.command("SELECT name FROM spans") == "[redacted:email]"
            assert client.command("SELECT count() FROM llm_calls") == 0
            asyncio.run(materialise(writer, raw.encode()))
            assert client.command("SELECT count() FROM spans") == 2
            client.command("ALTER TABLE spans ADD CONSTRAINT late CHECK name != 'late'")
            with pytest.raises(Rejected):  # whatever the profile says of views that fail
                asyncio.run(materialise(writer, raw.replace("a@b.org", "late").encode()))
            with pytest.raises(DatabaseError, match=r"ACCESS_DENIED|Not enough privileges"):
                client.command("SELECT * FROM url('http://127.0.0.1:1/', 'CSV', 'x String')")
            with pytest.raises(DatabaseError, match=r"ACCESS_DENIED|Not enough privileges"):
                client.command("CREATE DATABASE another")


async def materialise(settings: ClickHouseSettings, value: bytes) -> None:
    """One span, as the materialiser fences, inserts and asks."""
    record: Any = SimpleNamespace(offset=7, value=value, key=b"r", timestamp=0, headers=())
    spans = Partition(SPANS, "spans", 0)
    store = Store(settings, 30, "test")
    await store.connect()
    try:
        slices = [Slice(spans, [record], fence=await store.fence([spans]))]
        assert not await store.running([spans])
        await store.insert(slices, store.guard(slices))
        assert await store.present({spans: 0}) == {spans: {0: OWN_TABLE, 7: OWN_TABLE}}
    finally:
        await store.close()
