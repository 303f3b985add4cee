"""The command `fulgurite replay`: its stores, its progress on a terminal or in a log, its closing words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from aiokafka.errors import KafkaError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fulgurite.consumers.materialiser.blocks import Partition
from fulgurite.consumers.materialiser.errors import Fenced, Unavailable
from fulgurite.consumers.materialiser.store import TABLES
from fulgurite.infra.cli_common import console, errors
from fulgurite.infra.dlq.letters import topic_named
from fulgurite.infra.replay import marks
from fulgurite.infra.replay.begin import (
    TAKEN,
    Asked,
    Refused,
    Span,
    adopted,
    begin,
    of_the_same_log,
    ranges,
    refusal,
    taken,
)
from fulgurite.infra.replay.marks import Mark
from fulgurite.infra.replay.run import Counts, Replayer, Watch
from fulgurite.infra.replay.store import Range, ReplayStore
from fulgurite.infra.sql import clickhouse_errors, connect
from fulgurite.infra.topics import partitions_of
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import Topic

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

LOG_SECONDS = 5.0
"""Between two lines where there is no terminal."""


@dataclass(frozen=True, slots=True)
class Options:
    """As they were given on the command line."""

    topic: str
    from_offset: int | None = None
    from_time: datetime | None = None
    to_offset: int | None = None
    to_time: datetime | None = None
    partition: int | None = None
    rebuild: bool = False

    def words(self) -> str:
        """As they would be typed, in one order."""
        named = {
            "--from-offset": self.from_offset,
            "--from-time": self.from_time.isoformat() if self.from_time else None,
            "--to-offset": self.to_offset,
            "--to-time": self.to_time.isoformat() if self.to_time else None,
            "--partition": self.partition,
        }
        given = [f"{name} {value}" for name, value in named.items() if value is not None]
        return " ".join([self.topic, *given, *(["--rebuild"] if self.rebuild else [])])


def replay(settings: Settings, options: Options, *, as_json: bool, watch: Watch | None = None) -> int:
    """Gives the exit code. Raises Refused, StartError, SettingsError."""
    topic = _topic(settings, options)
    with _stores(settings) as client:
        counts = asyncio.run(_replay(settings, client, topic, options, watch))
    if as_json:
        console.out(json.dumps(asdict(counts)), highlight=False)
    else:
        _say_end(topic, counts)
    return 0


def abandon(settings: Settings, options: Options) -> int:
    """Ends unfinished replays of the topic; where one made rows anew, without leaving any twice, or half of them."""
    topic = _topic(settings, options)
    name = settings.kafka.topic(topic)

    with _stores(settings) as client:
        found = asyncio.run(_abandon(settings, client, topic, marks.unfinished(client, name)))
    said = f"Ended {len({mark.replay_id for mark in found})} unfinished replay" if found else "No unfinished replay"
    console.print(f"{said} of {name}.", highlight=False)
    return 0


async def _abandon(settings: Settings, client: Client, topic: Topic, found: Sequence[Mark]) -> Sequence[Mark]:
    """0.4 and 0.5. Gives those that were ended."""
    if not found:
        return []
    async with _store(settings) as store:
        # 0.4: where it runs or sleeps, its next insert is refused, and so is the next piece that would be whole.
        found = await taken(client, store, topic, found)
        if not found:
            return []
        name = found[0].topic
        # 0.5
        try:
            await store.log_claimed(topic, found, marks.ENDING)
        except Fenced as error:
            raise Refused(f"another `fulgurite replay` of {name} has claimed since: nothing is ended") from error
        for mark in marks.still_unfinished(client, name, found):
            partition = Partition(topic, name, mark.partition)
            if mark.rebuild:
                await store.delete_old(Range(partition, mark.next, mark.whole), mark.begun_ms)
                # What reached one table of two has no rows in the other that could take the place of the old ones.
                await store.delete_new(Range(partition, mark.whole, mark.hi), mark.begun_ms, mark.ending_ms)
    marks.write(client, found, marks.ABANDONED)
    return found


def say_stopped(options: Options) -> None:
    errors.print(f"Stopped. The same command goes on from there: fulgurite replay {options.words()}", soft_wrap=True)


async def _replay(settings: Settings, client: Client, topic: Topic, options: Options, watch: Watch | None) -> Counts:
    count = await partitions_of(settings.kafka, topic)
    if options.partition is not None and options.partition >= count:
        raise SettingsError(f"--partition {options.partition}: {options.topic} has partitions 0 to {count - 1}")
    asked = Asked(
        topic=topic,
        partitions=range(count) if options.partition is None else [options.partition],
        rebuild=options.rebuild,
        words=options.words(),
        from_offset=options.from_offset,
        from_time=options.from_time,
        to_offset=options.to_offset,
        to_time=options.to_time,
    )
    name = settings.kafka.topic(topic)
    total = Counts()
    with _progress() as shown:
        watch = watch or Watch(advance=shown.advance, complain=_complain)
        async with _store(settings) as store:
            # 0.1
            await of_the_same_log(settings.kafka, store, asked)
            # 0.2, 0.3
            found = adopted(client, name, asked)
            if found:
                _complain(f"going on with the replay that {found[0].who} began at {found[0].begun}")
            else:
                spans = await ranges(settings.kafka, store, asked)
                _say_clipped(options, spans, total)
                found = begin(client, name, asked, spans, watch.checkpoint)
            if found:
                # 0.4
                found = await taken(client, store, topic, found)
                if not found:
                    raise Refused(TAKEN)
                if any(mark.ending_ms for mark in found):
                    raise Refused(refusal(found))
                shown.begin(name, sum(mark.hi - mark.next for mark in found))
                async with Replayer(settings.kafka, client, store, watch) as replayer:
                    for mark in found:
                        total.add(await replayer.run(mark, Partition(topic, name, mark.partition)))
    return total


@contextlib.asynccontextmanager
async def _store(settings: Settings) -> AsyncGenerator[ReplayStore]:
    store = ReplayStore(settings.clickhouse, settings.materialiser.insert_seconds, settings.redaction)
    try:
        await store.connect()
        yield store
    except Unavailable as error:
        raise StartError(f"ClickHouse at {settings.clickhouse.url} (clickhouse.url): {error}") from error
    except KafkaError as error:
        raise StartError(f"Kafka at {settings.kafka.bootstrap_servers} (kafka.bootstrap_servers): {error!r}") from error
    finally:
        await store.close()


@contextlib.contextmanager
def _stores(settings: Settings) -> Generator[Client]:
    with clickhouse_errors(settings.clickhouse), connect(settings.clickhouse) as client:
        yield client


def _topic(settings: Settings, options: Options) -> Topic:
    topic = topic_named(settings.kafka, options.topic)
    if topic is None or topic not in TABLES:
        raise SettingsError(
            f"no topic {options.topic} becomes a table; known ones: {', '.join(t.name for t in TABLES)}"
        )
    return topic


class _Shown:
    """How far it is: a bar on a terminal, else a line now and then."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._name = ""
        self._total = self._done = 0
        self._task: TaskID | None = None
        self._started = self._said = time.monotonic()

    def begin(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._started = self._said = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total)

    def advance(self, offsets: int) -> None:
        self._done += offsets
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, offsets)
        elif time.monotonic() - self._said > LOG_SECONDS:
            self._said = time.monotonic()
            rate = self._done / (self._said - self._started)
            left = (self._total - self._done) / rate
            _complain(f"{self._name}: {self._done:,} of {self._total:,} offsets, {rate:,.0f}/s, {left:.0f} s left")


@contextlib.contextmanager
def _progress() -> Generator[_Shown]:
    if not errors.is_terminal:
        yield _Shown(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as bar:
        yield _Shown(bar)


class _Rate(ProgressColumn):
    """Offsets a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


def _complain(text: str) -> None:
    errors.print(text, highlight=False, soft_wrap=True, markup=False)


def _say_clipped(options: Options, spans: Sequence[Span], total: Counts) -> None:
    for span in spans:
        if span.expired:
            total.expired += span.expired
            errors.print(
                f"[yellow]{options.topic} partition {span.partition}: {span.expired:,} offsets before {span.lo} have "
                "expired from Kafka: their rows stay as they are, and what is missing of them stays missing[/]",
                soft_wrap=True,
            )
        if span.ahead:
            _complain(
                f"{options.topic} partition {span.partition}: {span.ahead:,} offsets from {span.hi} on are left to the "
                "materialiser, which has not logged them yet"
            )


def _say_end(topic: Topic, counts: Counts) -> None:
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("offsets", counts.offsets),
        ("records read", counts.records),
        ("already there", counts.there),
        ("inserted", counts.inserted),
        ("expired", counts.expired),
        (f"now rows of {TABLES[topic]}", counts.rows),
        ("now dead letters", counts.dead),
    ):
        table.add_row(label, f"{value:,}")
    console.print(table if counts.offsets else "Nothing to do: no such offsets that Kafka has and the tables may lack.")
