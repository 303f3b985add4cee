"""What Prometheus is told, and that ready means keeping up: the real stores, and ClickHouse away for a while."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from fulgurite.consumers.materialiser import serve
from fulgurite.consumers.materialiser.metrics import Lag, Metrics
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode
from fulgurite.schemas.settings import KafkaSettings, MaterialiserSettings, Settings
from fulgurite.schemas.spans import Span


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncGenerator[httpx.AsyncClient]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.materialiser.port}") as http:
            yield http
    finally:
        stop.set()
        await task


async def ready(http: httpx.AsyncClient, wanted: int, seconds: float = 60) -> dict[str, str]:
    for _ in range(int(seconds / 0.1)):
        with contextlib.suppress(httpx.TransportError):
            response = await http.get("/ready")
            if response.status_code == wanted:
                return dict(response.json()["reasons"])
        await asyncio.sleep(0.1)
    raise AssertionError(f"/ready never said {wanted}")


async def samples(http: httpx.AsyncClient) -> dict[tuple[str, str, str], float]:
    """(name, topic or reason, partition) -> value."""
    text = (await http.get("/metrics/")).text
    return {
        (
            sample.name,
            sample.labels.get("topic", sample.labels.get("reason", "")),
            sample.labels.get("partition", ""),
        ): (sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def span(number: int) -> bytes:
    return encode(Span(rollout_id="r", span_id=str(number), name="n", start_ns=1, end_ns=2))


@pytest.mark.slow
@pytest.mark.chaos
async def test_ready_means_keeping_up(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    own = MaterialiserSettings(batch_wait_ms=50, insert_seconds=2, port=free_port(), ready_lag_seconds=1)
    with EmbeddedClickHouse(tmp_path) as engine:
        settings = Settings(kafka=kafka_settings, clickhouse=engine.settings("metrics"), materialiser=own)
        name = kafka_settings.topic(topics.SPANS)
        async with (
            AIOKafkaProducer(bootstrap_servers=kafka_settings.bootstrap_servers, acks="all") as producer,
            running(settings) as http,
        ):
            await producer.send_and_wait(name, b"\n".join(map(span, range(5))), partition=0)
            await ready(http, 200)
            await asyncio.to_thread(engine.kill)
            await producer.send_and_wait(name, span(6), partition=0)
            reasons = await ready(http, 503)
            assert set(reasons) == {f"{name}-0"}
            await asyncio.to_thread(engine.start)
            assert await ready(http, 200) == {}
            await asyncio.sleep(1.2)  # lag is measured every second
            found = await samples(http)
    assert found["fulgurite_materialiser_records_total", name, "0"] == 2
    assert found["fulgurite_materialiser_bytes_total", name, "0"] > 6 * len(span(1))
    assert found["fulgurite_materialiser_retries_total", name, "0"] >= 1
    assert found["fulgurite_materialiser_lag_records", name, "0"] == 0
    assert found["fulgurite_materialiser_insert_seconds_count", name, ""] >= 1


async def test_lag_counts_what_is_not_even_fetched(settings: Settings, clickhouse_server: EmbeddedClickHouse) -> None:
    """A full buffer stops the fetching, and with it what fetches tell of the partition's end."""
    own = MaterialiserSettings(batch_wait_ms=50, port=free_port(), batch_records=50)
    settings = settings.model_copy(update={"materialiser": own})
    name, database = settings.kafka.topic(topics.SPANS), settings.clickhouse.database
    async with (
        AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers, acks="all") as producer,
        running(settings) as http,
    ):
        await ready(http, 200)
        clickhouse_server.command(f"RENAME TABLE {database}.spans TO {database}.elsewhere")
        for burst in range(5):
            sent = [await producer.send(name, span(100 * burst + number), partition=0) for number in range(100)]
            await asyncio.gather(*sent)
            await asyncio.sleep(0.3)
        await lag_is(http, name, 500)


async def lag_is(http: httpx.AsyncClient, name: str, wanted: int, seconds: float = 30) -> None:
    lag = -1.0
    for _ in range(int(seconds / 0.2)):
        lag = (await samples(http)).get(("fulgurite_materialiser_lag_records", name, "0"), -1)
        if lag == wanted:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"the lag is {lag}, not {wanted}")


def test_a_lost_partition_is_not_shown_any_more() -> None:
    metrics = Metrics()
    assert set(metrics.not_ready(1)) == {"group"}
    metrics.resuming("t", 0)
    metrics.joined()
    assert metrics.not_ready(1) == {"t-0": "resuming"}
    metrics.resumed("t", 0)
    metrics.lag("t", 0, Lag(5, 10.0))
    assert metrics.not_ready(1) == {"t-0": "5 records wait, the oldest for 10 s"}
    assert (
        metrics.registry.get_sample_value("fulgurite_materialiser_lag_records", {"topic": "t", "partition": "0"}) == 5
    )
    metrics.gone("t", 0)
    assert metrics.not_ready(1) == {}
    assert (
        metrics.registry.get_sample_value("fulgurite_materialiser_lag_records", {"topic": "t", "partition": "0"})
        is None
    )


def test_dead_letters_that_expired_are_none() -> None:
    metrics = Metrics()
    metrics.dead_letters({("bad_field", "materialiser"): 5, ("late", "assembler"): 1})
    metrics.dead_letters({("late", "assembler"): 2})
    found = {
        (sample.labels["reason"], sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "fulgurite_materialiser_dead_letters"
    }
    assert found == {("bad_field", 0), ("late", 2)}
