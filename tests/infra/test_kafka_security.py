"""Our clients against a real broker with TLS, SCRAM, PLAIN and OAUTHBEARER switched on; and refused by it, clearly."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import clickhouse_connect
import pytest
from pydantic import SecretStr

from fulgurite.consumers.coordinator.term import Term
from fulgurite.consumers.follower.loading import Shared
from fulgurite.consumers.follower.service import Follower, read_versions
from fulgurite.consumers.materialiser.service import serve as materialise
from fulgurite.consumers.security import broker_options
from fulgurite.infra.java import java_program, kafka_jars
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.kafka_security import USER, BrokerSecurity, BrokerTls
from fulgurite.infra.settings_file import stored_password
from fulgurite.infra.topics import create_topics, topic_states
from fulgurite.producers.credentials import ConnectionProblems, connection_problem, ensure_accepted
from fulgurite.producers.idempotent import connect
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import (
    ClickHouseSettings,
    KafkaSettings,
    MaterialiserSettings,
    ProducerSettings,
    Settings,
    to_environment,
)
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import RESOURCES
from tests.infra.tls_files import Authority

PASSWORD = "correct-horse"
SECRET = "client-secret"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secured(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """A broker that speaks TLS only and takes every mechanism."""
    tls = BrokerTls(authority.certificate_for("broker").keystore(), authority.certificate)
    security = BrokerSecurity(SecretStr(PASSWORD), scram=("SCRAM-SHA-256", "SCRAM-SHA-512"), oauth={}, tls=tls)
    with EmbeddedKafka(tmp_path_factory.mktemp("secured"), security=security) as server:
        yield server


def by(server: EmbeddedKafka, authority: Authority, mechanism: str, **fields: Any) -> KafkaSettings:
    """As a user would set it."""
    login = {"sasl_username": USER, "sasl_password": PASSWORD} if mechanism != "OAUTHBEARER" else {}
    return KafkaSettings.model_validate(
        {
            "bootstrap_servers": server.bootstrap_servers,
            "topic_prefix": f"{mechanism.lower()}.",
            "partitions": 1,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": mechanism,
            "ssl_cafile": authority.certificate,
        }
        | login
        | fields
    )


def a_span(number: int) -> Span:
    return Span(rollout_id="r", span_id=f"s{number}", name="n", start_ns=1, end_ns=2)


async def publish(kafka: KafkaSettings, count: int = 3) -> None:
    await create_topics(kafka)
    async with asyncio.timeout(30), Publisher(kafka) as publisher:
        for number in range(count):
            await (await publisher.publish_span(a_span(number)))


async def spans_on(kafka: KafkaSettings) -> int:
    states = await topic_states(kafka)
    return next(state.records for state in states if state.topic.name == "spans")


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_records_travel_over_tls(secured: EmbeddedKafka, authority: Authority, mechanism: str) -> None:
    kafka = by(secured, authority, mechanism)
    await publish(kafka)
    assert await spans_on(kafka) == 3
    assert await connection_problem(kafka) is None


@pytest.mark.slow
async def test_every_service_of_ours_works_over_tls_and_scram(
    secured: EmbeddedKafka, authority: Authority, clickhouse_settings: ClickHouseSettings
) -> None:
    kafka = by(secured, authority, "SCRAM-SHA-512", topic_prefix="services.")
    settings = Settings(kafka=kafka, clickhouse=clickhouse_settings, materialiser=MaterialiserSettings(batch_wait_ms=1))
    await publish(kafka)

    term = Term(kafka)
    await term.claim()
    await term.renew([], {0: 0})
    assert term.is_confirmed
    async with asyncio.timeout(30):
        while await term.handled([0]) != {0: 0}:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await term.close()

    stop = asyncio.Event()
    service = asyncio.create_task(materialise(settings, stop))
    try:
        async with asyncio.timeout(60):
            while await asyncio.to_thread(_count, clickhouse_settings, "spans") < 3:
                await asyncio.sleep(0.2)
                assert not service.done(), service.exception()
    finally:
        stop.set()
        await service


@pytest.mark.slow
async def test_the_follower_reads_over_tls_and_scram(secured: EmbeddedKafka, authority: Authority) -> None:
    kafka = by(secured, authority, "SCRAM-SHA-256", topic_prefix="follower.")
    await create_topics(kafka)
    async with Publisher(kafka) as publisher:
        settings = Settings(kafka=kafka)
        follower = Follower(settings, publisher, Shared(settings.follower))
        version = ResourceVersion(resource="policy", version=7, uri="file:///nowhere", sha256="0" * 64)
        await (await publisher.publish(RESOURCES, "policy", version))
        reading = asyncio.create_task(read_versions(kafka, follower, asyncio.Event()))
        try:
            async with asyncio.timeout(30):
                while follower.versions.newest is None:
                    assert not reading.done(), reading
                    await asyncio.sleep(0.1)
        finally:
            reading.cancel()


@pytest.mark.slow
async def test_tokens_of_an_endpoint_and_of_a_file(
    secured: EmbeddedKafka, authority: Authority, tmp_path: Path
) -> None:
    with TokenEndpoint() as endpoint:
        kafka = by(
            secured,
            authority,
            "OAUTHBEARER",
            oauth_url=endpoint.url,
            oauth_client_id="us",
            oauth_client_secret=SECRET,
            oauth_scope="kafka",
        )
        await publish(kafka)
        assert await spans_on(kafka) == 3
        assert endpoint.asked == 1, "one token for all clients"
        await asyncio.sleep(TokenEndpoint.LIFE_SECONDS)
        assert await connection_problem(kafka) is None
        assert endpoint.asked == 2, "and another before it ends"

        security = broker_options(kafka)
        assert security["sasl_oauth_token_provider"] is not None

        wrong = kafka.model_copy(update={"oauth_client_secret": SecretStr("wrong")})
        problem = await connection_problem(wrong)
        assert problem is not None
        assert problem.refused
        assert "401: invalid_client" in problem.text
        assert "check kafka.oauth_client_id" in problem.text
    away = await connection_problem(kafka.model_copy(update={"oauth_client_id": "another"}))
    assert away is not None
    assert not away.refused
    assert "token endpoint" in away.text

    token = tmp_path / "token"
    token.write_text(unsecured_token() + "\n")
    of_file = by(secured, authority, "OAUTHBEARER", oauth_token_file=token)
    assert await connection_problem(of_file) is None
    token.write_text("nonsense")
    refused = await connection_problem(of_file)
    assert refused is not None
    assert "does not take our token" in refused.text


@pytest.mark.slow
async def test_who_is_refused_is_told_why(secured: EmbeddedKafka, authority: Authority, tmp_path: Path) -> None:
    async def why(**fields: Any) -> str:
        problem = await connection_problem(by(secured, authority, "SCRAM-SHA-512").model_copy(update=fields))
        assert problem is not None
        assert problem.refused
        return problem.text

    assert "check kafka.sasl_username and kafka.sasl_password" in await why(sasl_password=SecretStr("wrong"))
    assert "check kafka.sasl_username" in await why(sasl_username="stranger", sasl_mechanism="PLAIN")
    other = Authority(tmp_path, "another authority")
    assert "not trusted" in (text := await why(ssl_cafile=other.certificate))
    assert "set kafka.ssl_cafile" in text
    port = secured.bootstrap_servers.rpartition(":")[2]
    assert "another host's" in await why(bootstrap_servers=f"localhost:{port}")
    unchecked = {"bootstrap_servers": f"localhost:{port}", "ssl_check_hostname": False}
    assert await connection_problem(by(secured, authority, "PLAIN", **unchecked)) is None
    in_the_clear = KafkaSettings(bootstrap_servers=secured.bootstrap_servers)
    problem = await connection_problem(in_the_clear)
    assert problem is not None
    assert "another kafka.security_protocol" in problem.text

    with pytest.raises(SettingsError, match="refused us: user 'fulgurite' by SCRAM-SHA-512"):
        await ensure_accepted(by(secured, authority, "SCRAM-SHA-512", sasl_password="wrong"))
    with pytest.raises(SettingsError, match=r"kafka\.sasl_password"):
        async with Publisher(by(secured, authority, "PLAIN", sasl_password="wrong")):
            pass
    with pytest.raises(SettingsError, match=r"kafka\.sasl_password"):
        await create_topics(by(secured, authority, "PLAIN", sasl_password="wrong"))


@pytest.mark.slow
def test_a_service_with_a_wrong_password_ends_with_2_and_says_so(
    secured: EmbeddedKafka, authority: Authority, tmp_path: Path
) -> None:
    kafka = by(secured, authority, "PLAIN").model_dump(exclude={"sasl_password"}) | {"sasl_password": "wrong"}
    done = subprocess.run(
        [sys.executable, "-m", "fulgurite.infra", "materialiser"],
        env=os.environ | to_environment({"kafka": kafka}) | {"FULGURITE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "check kafka.sasl_username and kafka.sasl_password" in done.stderr
    assert "wrong" not in done.stderr


@pytest.mark.slow
async def test_credentials_that_become_wrong_are_waited_for_visibly(
    secured: EmbeddedKafka, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    kafka = by(secured, authority, "PLAIN", sasl_password="wrong")
    client = logging.getLogger("aiokafka")
    only_refusals = ConnectionProblems()
    client.addFilter(only_refusals)
    try:
        connecting = asyncio.create_task(connect(kafka, ProducerSettings()))
        await asyncio.sleep(2.0)
        assert not connecting.done(), "not the first time: it may pass"
        connecting.cancel()
        await asyncio.wait({connecting})
    finally:
        client.removeFilter(only_refusals)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if line.startswith("Kafka refused our connection (")]) == 1
    assert any("refused us: user 'fulgurite' by PLAIN" in line for line in lines)


@pytest.mark.slow
async def test_clients_with_certificates(authority: Authority, tmp_path: Path) -> None:
    mutual = authority.certificate_for("mutual")
    ours, locked = authority.certificate_for("ours"), authority.certificate_for("locked", password="of the key")
    strange = Authority(tmp_path / "strange").certificate_for("strange")
    tls = BrokerTls(mutual.keystore(), authority.certificate, ours.certificate, ours.key)
    with EmbeddedKafka(tmp_path / "kafka", security=BrokerSecurity(SecretStr(PASSWORD), tls=tls)) as server:
        own = by(
            server,
            authority,
            "PLAIN",
            ssl_certfile=locked.certificate,
            ssl_keyfile=locked.key,
            ssl_key_password="of the key",
        )
        await publish(own)
        assert await spans_on(own) == 3
        for fields in ({}, {"ssl_certfile": strange.certificate, "ssl_keyfile": strange.key}):
            problem = await connection_problem(by(server, authority, "PLAIN", **fields))
            assert problem is not None
            assert "certificate" in problem.text


@pytest.mark.slow
async def test_an_open_data_folder_becomes_protected_and_keeps_its_records(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path) as server:
        await publish(server.settings(KafkaSettings(partitions=1)))
    security = BrokerSecurity(stored_password(tmp_path / "password"))
    with EmbeddedKafka(tmp_path, security=security) as server:
        kafka = server.settings(KafkaSettings(partitions=1))
        assert await spans_on(kafka) == 3
        assert (kafka.security_protocol, kafka.sasl_username) == ("SASL_PLAINTEXT", USER)
        secrets = ("password", "server.properties", "client.properties", "kcat.conf")
        assert [_mode(tmp_path), *(_mode(tmp_path / name) for name in secrets)] == [0o700, *[0o600] * 4]
        open_door = await connection_problem(KafkaSettings(bootstrap_servers=server.bootstrap_servers))
        assert open_door is not None
        # The controller's listener is none either: Kafka's own tool, without the password, gets nothing.
        controller = json.loads((tmp_path / "ports.json").read_text())["controller"]
        assert await connection_problem(KafkaSettings(bootstrap_servers=f"127.0.0.1:{controller}")) is not None
        # And an ordinary Java client works with the file that was written for it.
        assert "fulgurite.spans" in java_topics(server, tmp_path / "client.properties")


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def java_topics(server: EmbeddedKafka, config: Path) -> str:
    command = [java_program(), "-cp", f"{kafka_jars()}/*", "kafka.admin.ConfigCommand", "--describe"]
    asked = [*command, "--entity-type", "topics", "--bootstrap-server", server.bootstrap_servers]
    asked += ["--command-config", config]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def _count(clickhouse: ClickHouseSettings, table: str) -> int:
    with clickhouse_connect.get_client(**connection_options(clickhouse), database=clickhouse.database) as client:
        if not client.command(f"EXISTS TABLE {table}"):
            return 0
        return int(str(client.command(f"SELECT count() FROM {table}")))


def unsecured_token() -> str:
    """A token without a signature, which the broker's built-in validator for development takes."""
    now = int(time.time())
    parts = ({"alg": "none"}, {"sub": USER, "iat": now, "exp": now + 3_600})
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return ".".join(encoded) + "."


class TokenEndpoint:
    """The client credentials grant of OAuth, for one client."""

    LIFE_SECONDS = 4

    def __init__(self) -> None:
        self.asked = 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                assert form == {"grant_type": ["client_credentials"], "scope": ["kafka"]}
                known = base64.b64encode(f"us:{SECRET}".encode()).decode()
                if self.headers["Authorization"] != f"Basic {known}":
                    self.answer(401, {"error": "invalid_client"})
                    return
                endpoint.asked += 1
                self.answer(200, {"access_token": unsecured_token(), "expires_in": TokenEndpoint.LIFE_SECONDS})

            def answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"

    def __enter__(self) -> TokenEndpoint:
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
