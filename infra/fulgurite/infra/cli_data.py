"""Commands that look at the data: topics, tail, sql, migrate, schemas, trace."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from fulgurite.infra.cli_common import (
    DataOption,
    SetOption,
    console,
    lazy_module,
    next_steps,
    read_settings,
    register,
    say,
)
from fulgurite.schemas.errors import SettingsError

topics_app = typer.Typer(name="topics", no_args_is_help=True)
schemas_app = typer.Typer(name="schemas", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Registers all of them."""
    register(app, "tail", "fulgurite tail spans -n 5", rich_help_panel="Data")(tail)
    register(app, "sql", 'fulgurite sql "SELECT * FROM reward_by_version"', rich_help_panel="Data")(sql)
    register(app, "migrate", "fulgurite migrate", rich_help_panel="Data")(migrate)
    register(app, "trace", "fulgurite trace ROLLOUT_ID", rich_help_panel="Data")(trace)
    register(topics_app, "list", "fulgurite topics list")(topics_list)
    register(topics_app, "create", "fulgurite topics create")(topics_create)
    register(schemas_app, "export", "fulgurite schemas export ./json-schemas")(schemas_export)
    register(schemas_app, "asyncapi", "fulgurite schemas asyncapi docs/asyncapi.json")(schemas_asyncapi)
    app.add_typer(topics_app, name="topics", help="List or create the topics.", rich_help_panel="Data")
    app.add_typer(
        schemas_app, name="schemas", help="The contract for machines: JSON Schemas, AsyncAPI.", rich_help_panel="Data"
    )


def topics_list(data: DataOption = None, sets: SetOption = None) -> None:
    """List the topics: partitions, records, what they hold."""
    from fulgurite.infra.topics import topic_states

    settings = read_settings(data, sets)
    table = Table(Column("topic", no_wrap=True), "key", "partitions", "records", "holds")
    missing = 0
    for state in asyncio.run(topic_states(settings.kafka)):
        missing += not state.partitions
        partitions = str(state.partitions) if state.partitions else "[red]missing[/]"
        table.add_row(state.name, state.topic.key, partitions, f"{state.records:,}", state.topic.holds)
    console.print(table)
    next_steps("fulgurite topics create" if missing else "fulgurite tail rollouts -n 5")


def topics_create(data: DataOption = None, sets: SetOption = None) -> None:
    """Create what is missing of the topics; changes nothing that exists."""
    from fulgurite.infra.topics import create_topics

    settings = read_settings(data, sets)
    created = asyncio.run(create_topics(settings.kafka))
    at = settings.kafka.bootstrap_servers
    say(f"Created {', '.join(created)} at {at}." if created else f"All topics exist at {at}.")
    next_steps("fulgurite topics list")


def tail(
    topic: Annotated[str, typer.Argument(help="spans, rewards, rollouts, trajectories, …")],
    count: Annotated[int, typer.Option("-n", "--count", help="How many of the newest records.", min=0)] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones until Ctrl-C.")] = False,
    rollout: Annotated[str, typer.Option(help="Only records of this rollout.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Whole records as JSON lines, for other programs.")] = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> None:
    """Print the newest records of a topic."""
    from fulgurite.infra.tail import tail_topic

    settings = read_settings(data, sets)
    try:
        asyncio.run(tail_topic(settings.kafka, topic, count=count, follow=follow, rollout=rollout, full=full))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def sql(
    statement: Annotated[str, typer.Argument(help="Any statement ClickHouse knows.")],
    output: Annotated[str, typer.Option("--format", help="table, or json: one object a line.")] = "table",
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Ask ClickHouse, in our database."""
    from fulgurite.infra.sql import run_sql

    if output not in ("table", "json"):
        raise SettingsError(f"--format {output}: must be table or json")
    return run_sql(read_settings(data, sets).clickhouse, statement, as_json=output == "json")


def migrate(data: DataOption = None, sets: SetOption = None) -> None:
    """Create or update the tables in ClickHouse."""
    from fulgurite.consumers.redaction import apply_redaction
    from fulgurite.infra.sql import clickhouse_errors, connect, require_answer
    from fulgurite.schemas.migrations import apply_migrations

    settings = read_settings(data, sets)
    clickhouse = settings.clickhouse
    with clickhouse_errors(clickhouse):
        require_answer(clickhouse)
        applied = apply_migrations(clickhouse)
        with connect(clickhouse) as client:
            redacted = apply_redaction(client, settings.redaction)
    where = f"database {clickhouse.database} at {clickhouse.url}"
    say(f"Applied {', '.join(applied)} to {where}." if applied else f"Nothing to apply to {where}.")
    if redacted:
        say(f"The rules of redaction changed {', '.join(redacted)}: they hold for what is stored from now on.")
    next_steps('fulgurite sql "SHOW TABLES"')


def schemas_export(
    folder: Annotated[Path, typer.Argument(help="Where to write them; made if need be.")],
) -> None:
    """Write the JSON Schema of every event, one file each."""
    written: list[Path] = lazy_module("fulgurite.schemas.exports").export_json_schemas(folder)
    say(f"Wrote {len(written)} JSON Schemas to {folder}.")


def schemas_asyncapi(
    file: Annotated[Path, typer.Argument(help="Where to write it; its folder is made if need be.")],
) -> None:
    """Write the contract as an AsyncAPI 3.0 document: topics, keys, headers, values."""
    lazy_module("fulgurite.schemas.asyncapi").export_asyncapi(file)
    say(f"Wrote the AsyncAPI document to {file}.")


def trace(
    rollout_id: Annotated[str, typer.Argument(help="As in the column rollout_id.")],
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Show one rollout as a tree of spans with times, tokens, versions and rewards."""
    from fulgurite.infra.sql import clickhouse_errors, connect
    from fulgurite.infra.trace import rollout_tree

    settings = read_settings(data, sets).clickhouse
    with clickhouse_errors(settings), connect(settings) as client:
        tree = rollout_tree(client, rollout_id)
    if tree is None:
        say(f"[red]ClickHouse knows no rollout {rollout_id}.[/] (Is the materialiser running?)")
        next_steps('fulgurite sql "SELECT rollout_id, status FROM rollouts ORDER BY queued_ns DESC LIMIT 10"')
        return 1
    console.print(tree)
    next_steps(f"fulgurite tail spans --rollout {rollout_id}")
    return 0
