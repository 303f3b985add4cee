"""What the tests of `fulgurite dlq` and `fulgurite replay` share: the command line, a materialiser, SQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clickhouse_connect
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from typer.testing import CliRunner

from fulgurite.consumers.materialiser import serve
from fulgurite.infra.cli import app
from fulgurite.infra.settings_file import write_settings_file
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import ENV_HOME, MaterialiserSettings, Settings
from fulgurite.schemas.topics import Topic

ROOT = Path(__file__).resolve().parents[2]
QUICK = MaterialiserSettings(batch_wait_ms=50, insert_seconds=4, session_seconds=6)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def items(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class World:
    """One namespace of both stores, asked and told as an operator does."""

    def __init__(self, settings: Settings, data: Path) -> None:
        self.settings = settings
        self.data = data
        write_settings_file(data, settings.kafka, settings.clickhouse)

    @property
    def environment(self) -> dict[str, str]:
        """For processes of their own, which also import from tests/."""
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, ENV_HOME: str(self.data), "COLUMNS": "200", "PYTHONPATH": paths}

    async def cli(self, *arguments: str) -> Done:
        return await asyncio.to_thread(self.cli_now, *arguments)

    async def cli_apart(self, *arguments: str) -> tuple[int, str]:
        """In a process of its own, for what runs at the same time."""
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fulgurite.infra", *arguments),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await child.communicate()
        assert child.returncode is not None
        return child.returncode, out.decode()

    def cli_now(self, *arguments: str) -> Done:
        runner = CliRunner(env={ENV_HOME: str(self.data), "COLUMNS": "200"})
        result = runner.invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        with clickhouse_connect.get_client(
            **connection_options(self.settings.clickhouse), database=self.settings.clickhouse.database
        ) as client:
            return [tuple(row) for row in client.query(sql).result_rows]

    async def until(self, sql: str, wanted: Callable[[list[tuple[Any, ...]]], bool], seconds: float = 60) -> Any:
        rows: list[tuple[Any, ...]] = []
        for _ in range(int(seconds / 0.1)):
            with contextlib.suppress(Exception):
                rows = await asyncio.to_thread(self.ask, sql)
                if wanted(rows):
                    return rows
            await asyncio.sleep(0.1)
        raise AssertionError(f"{sql}: still {rows}")

    def name(self, topic: Topic) -> str:
        return self.settings.kafka.topic(topic)

    async def produce(
        self, topic: Topic, values: Sequence[bytes | None], key: bytes | None = b"r", partition: int = 0, **more: Any
    ) -> int:
        """The offset of the last one."""
        client = AIOKafkaProducer(bootstrap_servers=self.settings.kafka.bootstrap_servers, acks="all")
        await client.start()
        try:
            sent = [
                await client.send(self.name(topic), value, key=key, partition=partition, **more) for value in values
            ]
            return [(await future).offset for future in sent][-1]
        finally:
            await client.stop()

    async def produce_in_transaction(self, topic: Topic, value: bytes, key: bytes) -> None:
        client = AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka.bootstrap_servers, transactional_id=f"{self.name(topic)}-test"
        )
        await client.start()
        try:
            async with client.transaction():
                await client.send_and_wait(self.name(topic), value, key=key, partition=0)
        finally:
            await client.stop()

    async def records(self, topic: Topic) -> list[ConsumerRecord[bytes, bytes]]:
        """All of a topic, as it is now, but what nobody can decode."""
        reader: AIOKafkaConsumer = AIOKafkaConsumer(bootstrap_servers=self.settings.kafka.bootstrap_servers)
        await reader.start()
        try:
            parts = [TopicPartition(self.name(topic), number) for number in range(2)]
            reader.assign(parts)
            await reader.seek_to_beginning()
            end = await reader.end_offsets(parts)
            found: list[ConsumerRecord[bytes, bytes]] = []
            while any([await reader.position(part) < end[part] for part in parts]):
                for records in (await fetch(self.settings.kafka, reader, timeout_ms=200)).values():
                    found += [record for record in records if not isinstance(record, Undecodable)]
            return found
        finally:
            await reader.stop()

    @contextlib.asynccontextmanager
    async def materialiser(self) -> AsyncGenerator[None]:
        stop = asyncio.Event()
        settings = self.settings.model_copy(update={"materialiser": QUICK})
        task = asyncio.create_task(serve(settings, stop))
        try:
            yield
        finally:
            stop.set()
            await task


def span(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"rollout_id": "r", "span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2, **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()
