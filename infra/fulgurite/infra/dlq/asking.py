"""What the commands of `fulgurite dlq` ask for in the same words: which dead letters, since when, mended how; and how a
store that is away is told.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from aiokafka.errors import KafkaError

from fulgurite.infra.cli_common import errors
from fulgurite.infra.dlq import letters
from fulgurite.infra.dlq.letters import Filter, Letter, Place
from fulgurite.infra.dlq.mending import Mending, by_expression, by_fields
from fulgurite.infra.sql import SqlError, clickhouse_errors, connect
from fulgurite.schemas.errors import FulguriteError, SettingsError, StartError
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import TOPICS

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def tell(text: str) -> None:
    """Beside the answer, which a script may read."""
    errors.print(text, highlight=False, soft_wrap=True)


def mending(expression: str, fields: list[str], edit_file: Path | None, ids: list[str]) -> Mending:
    if bool(expression) + bool(fields) + (edit_file is not None) != 1:
        raise SettingsError("say how to mend: one of --with EXPRESSION, --set-field FIELD=VALUE, --edit-file FILE")
    if expression:
        return by_expression(expression)
    if fields:
        return by_fields(fields)
    assert edit_file is not None
    if len(ids) != 1:
        raise SettingsError("--edit-file mends exactly one: give its ID")
    try:
        content = edit_file.read_bytes().removesuffix(b"\n")
    except OSError as error:
        raise SettingsError(f"--edit-file {edit_file}: {error.strerror}") from None
    return lambda _: content


def selected(
    settings: Settings, client: Client, ids: list[str], chosen: Filter, limit: int
) -> tuple[list[Letter], bool]:
    """What the command is about, in the order of the log, and whether an ID was not found."""
    if not ids:
        if not chosen.topic and not chosen.reason:
            raise SettingsError("say which: IDs (fulgurite dlq list shows them), or --topic, or --reason")
        found = letters.matching(client, chosen, limit)
        if not found:
            tell("No such dead letters that were not sent yet.")
        elif len(found) == limit:
            tell(f"[yellow]The first {limit} in the order of the log; --limit takes up to {letters.MAX_LETTERS}.[/]")
        return found, False
    if chosen.topic or chosen.reason or chosen.stage or chosen.since:
        raise SettingsError("either IDs or --topic, --stage, --reason and --since, not both")
    places = list(dict.fromkeys(letters.parse_place(settings.kafka, text) for text in ids))
    found = letters.at(client, places)
    missing = [place for place in places if place not in {letter.place for letter in found}]
    if missing:
        not_found(settings, client, missing)
    return found, bool(missing)


def not_found(settings: Settings, client: Client, places: list[Place]) -> None:
    for place in places[:10]:
        name = letters.short_id(settings.kafka, place)
        tell(f"[red]{name} is no dead letter[/] (or not read by the materialiser yet).")
        others = letters.lines_at(client, place)
        if others:
            lines = " ".join(letters.short_id(settings.kafka, other) for other in others)
            tell(f"  Other lines of the same record are: {lines}")
    tell("[dim]Next:[/]\n  fulgurite dlq list")


def filter(
    settings: Settings, topic: str, stage: str, reason: str, since: str, *, waiting: bool, mended: bool = False
) -> Filter:
    name = ""
    if topic:
        known = letters.topic_named(settings.kafka, topic)
        if known is None:
            raise SettingsError(f"there is no topic {topic}; known ones: {', '.join(one.name for one in TOPICS)}")
        name = settings.kafka.topic(known)
    return Filter(name, stage, reason, since_when(since) if since else None, waiting, mended)


def since_when(text: str) -> datetime:
    ago = _AGO.fullmatch(text)
    if ago:
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"--since {text}: must be like 30m, 2h, 7d or 2026-11-21T08:00") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def again(command: str, ids: list[str] | None, topic: str, stage: str, reason: str, since: str) -> str:
    options = {"--topic": topic, "--stage": stage, "--reason": reason, "--since": since}
    words = [*(ids or []), *(f"{name} {value}" for name, value in options.items() if value)]
    return " ".join(["fulgurite dlq", command, *words, *([] if ids else ["--mended"])])


@contextlib.contextmanager
def connected(settings: Settings) -> Generator[Client]:
    try:
        with clickhouse_errors(settings.clickhouse), connect(settings.clickhouse) as client:
            yield client
    except SqlError as error:
        if "UNKNOWN_TABLE" in str(error) or "UNKNOWN_DATABASE" in str(error):
            raise FulguriteError(f"database {settings.clickhouse.database} lacks tables: fulgurite migrate") from error
        raise


@contextlib.contextmanager
def kafka_errors(settings: Settings) -> Generator[None]:
    try:
        yield
    except KafkaError as error:
        raise StartError(f"Kafka at {settings.kafka.bootstrap_servers} (kafka.bootstrap_servers): {error!r}") from error
