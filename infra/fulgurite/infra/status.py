"""`fulgurite status`: what runs on this machine's data folder, and how the configured stores answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiokafka.errors import KafkaError
from rich.markup import escape
from rich.table import Column, Table

from fulgurite.infra.cli_common import console, next_steps, say
from fulgurite.infra.lag import consumer_lag
from fulgurite.infra.memory import tree_rss_bytes
from fulgurite.infra.sql import clickhouse_errors, connect
from fulgurite.infra.state import RunState, read_state
from fulgurite.infra.topics import TopicState, topic_states
from fulgurite.schemas.errors import FulguriteError, StartError
from fulgurite.schemas.settings import ClickHouseSettings, KafkaSettings, Settings

_MIB = 1024 * 1024


def show_status(data: Path, settings: Settings) -> int:
    """Prints it; 1 if a store does not answer."""
    state = read_state(data)
    if state is None:
        say(f"No embedded stores run on {data}.")
    else:
        console.print(_processes(state))
        logs = ", ".join(str(child.log) for child in state.children)
        say(f"[dim]logs: {escape(logs)}[/]")
        for child in state.children:
            if child.error:
                say(f"[red]{child.name} does not start[/]: {escape(child.error)}")
    kafka_problem = _show_kafka(settings.kafka)
    clickhouse_problem = _show_clickhouse(settings.clickhouse)
    for problem in filter(None, (kafka_problem, clickhouse_problem)):
        say(f"[red]{escape(problem)}[/]")
    if kafka_problem or clickhouse_problem:
        next_steps(f"fulgurite up --data {data}" if state is None else f"look at the logs in {data}")
        return 1
    return 0


def _processes(state: RunState) -> Table:
    table = Table("process", "pid", "memory", "restarts", Column("address", no_wrap=True))
    addresses = {"kafka": state.kafka, "clickhouse": state.clickhouse}
    own = tree_rss_bytes(state.owner.pid)
    table.add_row("up, in all", str(state.owner.pid), f"{own // _MIB} MiB", "", "")
    for child in state.children:
        memory = f"{tree_rss_bytes(child.pid) // _MIB} MiB" if child.pid else "not running"
        table.add_row(
            child.name,
            str(child.pid or ""),
            memory,
            str(child.restarts),
            addresses.get(child.name, ""),
        )
    return table


def _show_kafka(settings: KafkaSettings) -> str | None:
    """Prints topics and lag; the problem if the broker does not answer."""

    async def ask() -> tuple[list[TopicState], dict[str, dict[str, int]]]:
        return await topic_states(settings), await consumer_lag(settings)

    try:
        states, lag = asyncio.run(ask())
    except (FulguriteError, KafkaError) as error:
        return str(error) or type(error).__name__
    say(f"[green]Kafka answers[/] at {settings.bootstrap_servers}")
    table = Table(Column("topic", no_wrap=True), "partitions", "records", "lag")
    for state in states:
        behind = ", ".join(f"{group} {topics[state.name]:,}" for group, topics in lag.items() if state.name in topics)
        table.add_row(state.name, str(state.partitions or "[red]missing[/]"), f"{state.records:,}", escape(behind))
    console.print(table)
    return None


def _show_clickhouse(settings: ClickHouseSettings) -> str | None:
    try:
        with clickhouse_errors(settings), connect(settings) as client:
            rows = client.query(
                "SELECT name, total_rows, total_bytes FROM system.tables "
                "WHERE database = currentDatabase() AND total_rows > 0 ORDER BY name"
            ).result_rows
    except StartError as error:
        return str(error)
    except FulguriteError as error:
        return f"ClickHouse at {settings.url}: {error} (fulgurite migrate)"
    say(f"[green]ClickHouse answers[/] at {settings.url}")
    if rows:
        table = Table("table", "rows", "size")
        for name, count, size in rows:
            table.add_row(str(name), f"{count:,}", f"{size / _MIB:.1f} MiB")
        console.print(table)
    return None
