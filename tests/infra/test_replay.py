"""`fulgurite replay`: rows made once more from Kafka, none lost and none doubled, wherever it is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from fulgurite.consumers.materialiser.blocks import GIVEN_UP, Slice
from fulgurite.consumers.materialiser.errors import TooLarge, TooSlow
from fulgurite.infra.replay import command, run
from fulgurite.infra.replay.run import Watch
from fulgurite.infra.replay.store import ReplayStore
from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import Settings, load_settings
from tests.consumers.otlp_encoding import record
from tests.consumers.otlp_encoding import span as otlp_span
from tests.consumers.poison import plain_builder, send_poison
from tests.infra.dlq_world import World, span

RECONCILED = "SELECT sum(rows), sum(dead), sum(duplicates), sum(gaps) FROM reconciliation"


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> World:
    return World(settings, tmp_path)


async def fill(world: World) -> None:
    """60 records of 2 lines in 2 partitions: 100 rows, 20 dead letters; logged."""
    for partition in (0, 1):
        values = [
            b"\n".join(
                span(span_id=f"{partition}-{number}-{line}", kind="sideways" if number % 3 == line else "client")
                for line in range(2)
            )
            for number in range(15 * partition, 15 * partition + 30)
        ]
        await world.produce(topics.SPANS, values, partition=partition)
    await world.until("SELECT count() FROM spans", lambda rows: rows == [(80,)])
    await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(40,)])
    await world.until(
        "SELECT sum(h) FROM (SELECT max(hi) + 1 AS h FROM ingest_log GROUP BY _partition)", lambda r: r == [(60,)]
    )


async def test_what_nobody_can_decode_is_a_dead_letter_again(world: World) -> None:
    async with world.materialiser():
        await world.produce(topics.SPANS, [span(span_id="before")])
        with plain_builder():
            async with AIOKafkaProducer(bootstrap_servers=world.settings.kafka.bootstrap_servers) as producer:
                await send_poison(producer, world.name(topics.SPANS), 0, span(span_id="poison"), b"r")
        await world.produce(topics.SPANS, [span(span_id="after")])
        await world.until("SELECT max(hi) FROM ingest_log WHERE _partition = 0", lambda rows: rows == [(2,)])
        letters = "SELECT _offset, reason, stage, key, message LIKE '%is not UTF-8%' FROM dead_letters"
        world.ask("TRUNCATE TABLE spans")
        for remains in (1, 0, 1):
            if not remains:
                world.ask("TRUNCATE TABLE dead_letters")
            done = await world.cli("replay", "spans", "--from-offset", "0", "--json")
            assert done.code == 0, done.err
            assert world.ask("SELECT span_id FROM spans ORDER BY _offset") == [("before",), ("after",)]
            assert world.ask(letters) == [(1, "undecodable", "materialiser", "r", 1)]


async def test_what_is_no_otlp_is_a_dead_letter_again(world: World) -> None:
    async with world.materialiser():
        await world.produce(topics.OTLP_SPANS, [record(otlp_span()), b"[zipkin]", record(otlp_span()), b"Hello"])
        await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(3,)])
        for table in ("spans", "dead_letters"):
            world.ask(f"TRUNCATE TABLE {table}")
            done = await world.cli("replay", "otlp_spans", "--from-offset", "0", "--json")
            assert done.code == 0, done.err
            assert world.ask("SELECT _offset FROM spans ORDER BY ALL") == [(0,), (2,)]
            assert world.ask("SELECT _offset, reason FROM dead_letters ORDER BY ALL") == [
                (1, "rejected"),
                (3, "rejected"),
            ]


async def test_what_is_missing_is_filled_in(world: World) -> None:
    async with world.materialiser():
        await fill(world)
        nothing = await world.cli("replay", "spans", "--from-offset", "0", "--json")
        assert (nothing.items[0]["there"], nothing.items[0]["inserted"]) == (60, 0)
        assert world.ask(RECONCILED) == [(80, 40, 0, 0)]
        # Whole records are gone, and of others the rows of one table.
        world.ask("DELETE FROM spans WHERE _offset >= 10 AND _offset < 20")
        world.ask("DELETE FROM dead_letters WHERE _partition = 1")
        filled = await world.cli("replay", "spans", "--from-offset", "5", "--to-offset", "25", "--json")
        assert filled.items[0]["offsets"] == 40
        assert world.ask("SELECT count() FROM spans") == [(80,)]
        assert world.ask("SELECT count() FROM dead_letters WHERE _partition = 1") == [(13,)]
        assert (await world.cli("replay", "spans", "--from-time", "2020-01-01")).code == 0
        # The service has not stood still meanwhile.
        await world.produce(topics.SPANS, [span(span_id="later")])
        await world.until("SELECT count() FROM spans", lambda rows: rows == [(81,)])
    assert world.ask(RECONCILED) == [(81, 40, 0, 0)]
    assert world.ask("SELECT uniqExact(span_id) FROM spans") == [(81,)]


async def test_rebuild_makes_every_row_anew(world: World) -> None:
    async with world.materialiser():
        await fill(world)
        before = world.ask("SELECT now64(3)")[0][0]
        world.ask("ALTER TABLE spans UPDATE name = 'old' WHERE 1 SETTINGS mutations_sync = 2")
        done = await world.cli("replay", "spans", "--from-offset", "0", "--rebuild")
        assert done.code == 0, done.err
        assert world.ask("SELECT DISTINCT name FROM spans") == [("n",)]
    assert world.ask(RECONCILED) == [(80, 40, 0, 0)]
    assert world.ask(f"SELECT countIf(_ingested < '{before:%Y-%m-%d %H:%M:%S}') FROM spans") == [(0,)]
    assert world.ask("SELECT countIf(state = 'begun'), countIf(state = 'done') FROM replay_log") == [(2, 2)]


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("step", "rebuild"),
    [
        *((step, True) for step in ("begun", "asked", "inserted", "whole", "deleted", "logged")),
        *((step, False) for step in ("asked", "inserted")),
    ],
)
async def test_killed_after_a_step(world: World, step: str, rebuild: bool) -> None:
    """The same command goes on, and in the end every line is there once; another command waits for it."""
    async with world.materialiser():
        await fill(world)
        world.ask("DELETE FROM spans WHERE _offset % 2 = 0")
        world.ask("DELETE FROM dead_letters WHERE _offset % 4 = 0")
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, step, str(int(rebuild))),
            env=world.environment,
        )
        assert await asyncio.wait_for(child.wait(), 90) == -signal.SIGKILL
        other = await world.cli("replay", "spans", "--from-offset", "7")
        assert (other.code, "fulgurite replay spans --from-offset 0" in other.err) == (1, True), other.err
        words = ["replay", "spans", "--from-offset", "0", *(["--rebuild"] if rebuild else [])]
        done = await world.cli(*words)
        assert (done.code, "going on with the replay" in done.err) == (0, True), done.err
    assert world.ask(RECONCILED) == [(80, 40, 0, 0)]
    assert world.ask("SELECT uniqExact(span_id) FROM spans") == [(80,)]


@pytest.mark.chaos
@pytest.mark.parametrize(("rebuild", "abandoned"), [(True, False), (False, True)])
async def test_one_frozen_and_one_that_goes_on(world: World, rebuild: bool, abandoned: bool) -> None:
    """Frozen between asking and inserting; others finish or end its work; when it wakes, the database refuses it."""
    words = ["replay", "spans", "--from-offset", "0", *(["--rebuild"] if rebuild else [])]
    async with world.materialiser():
        await fill(world)
        world.ask("TRUNCATE TABLE spans")
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "stop:asked", str(int(rebuild))),
            env=world.environment,
            stderr=asyncio.subprocess.PIPE,
        )
        await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        if abandoned:
            assert (await world.cli("replay", "spans", "--abandon")).code == 0
        # What is left to do for the sleeper when it wakes: all of it once more, were it not refused.
        assert (await world.cli(*words)).code == 0
        child.send_signal(signal.SIGCONT)
        _, said = await asyncio.wait_for(child.communicate(), 60)
        assert (child.returncode, b"another `fulgurite replay`" in said) == (1, True), said
    assert world.ask(RECONCILED) == [(80, 40, 0, 0)]


@pytest.mark.parametrize("problem", [TooLarge, TooSlow])
async def test_what_needs_too_much_is_made_smaller(
    world: World, monkeypatch: pytest.MonkeyPatch, problem: type[TooLarge | TooSlow]
) -> None:
    tried: list[int] = []
    insert_missing = ReplayStore.insert_missing

    async def little_memory(store: ReplayStore, part: Slice) -> None:
        tried.append(sum((record.value or b"").count(b"\n") + 1 for record in part.records))
        if len(part.records) > 3:
            raise problem("limit exceeded")
        await insert_missing(store, part)

    monkeypatch.setattr(run, "BATCH_LINES", 21)
    monkeypatch.setattr(ReplayStore, "insert_missing", little_memory)
    async with world.materialiser():
        await fill(world)
        world.ask("TRUNCATE TABLE spans")
        done = await asyncio.wait_for(world.cli("replay", "spans", "--from-offset", "0", "--json"), 60)
        assert (done.items[0]["records"], done.items[0]["rows"]) == (60, 80)
    assert max(tried) == 20
    assert world.ask(RECONCILED) == [(80, 40, 0, 0)]


async def test_a_record_that_was_given_up_is_its_dead_letter_until_it_is_made_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LONE_SECONDS", 0.0)
    monkeypatch.setattr(run, "RETRY_SECONDS", (0.01, 0.01))
    words = ["replay", "spans", "--from-offset", "0", "--json"]
    async with world.materialiser():
        await world.produce(topics.SPANS, [span(span_id="before"), span(span_id="large"), span(span_id="after")])
        await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(2,)])
        letter = "topic, partition, offset, stage, _topic, _partition, _offset, _ts"
        world.ask(
            f"INSERT INTO dead_letters ({letter}, reason) SELECT _topic, _partition, _offset, 'materialiser', _topic, "
            f"_partition, _offset, _ts, '{GIVEN_UP[-1]}' FROM spans WHERE span_id = 'large'"
        )
        world.ask("DELETE FROM spans WHERE _offset < 2")
        filled = await world.cli(*words)
        assert (filled.items[0]["there"], filled.items[0]["inserted"]) == (2, 1), filled
        assert world.ask("SELECT span_id FROM spans ORDER BY _offset") == [("before",), ("after",)]
        assert world.ask("SELECT _offset FROM dead_letters") == [(1,)]
        # With as little memory as then it says so, and there is still the letter; with more there are rows instead.
        with monkeypatch.context() as patched:
            insert_missing = ReplayStore.insert_missing

            async def little_memory(store: ReplayStore, part: Slice) -> None:
                if any(record.offset == 1 for record in part.records):
                    raise TooLarge("memory limit exceeded")
                await insert_missing(store, part)

            patched.setattr(ReplayStore, "insert_missing", little_memory)
            ended = await asyncio.wait_for(world.cli(*words, "--rebuild"), 60)
            assert (ended.code, "the record at offset 1 alone needs more memory" in ended.err) == (1, True), ended
        assert world.ask("SELECT _offset FROM dead_letters") == [(1,)]
        done = await world.cli(*words, "--rebuild")
        assert (done.code, "going on with the replay" in done.err) == (0, True), done.err
    assert world.ask("SELECT span_id FROM spans ORDER BY _offset") == [("before",), ("large",), ("after",)]
    assert world.ask(RECONCILED) == [(3, 0, 0, 0)]


async def test_what_kafka_has_forgotten_stays(world: World) -> None:
    """Expired records and compacted ones keep their rows through a rebuild; the summary says how many expired."""
    versions = [ResourceVersion(resource="p", version=n, uri="file:///x", sha256="a" * 64) for n in range(2)]
    async with world.materialiser():
        await fill(world)
        for version in versions:
            await world.produce_in_transaction(topics.RESOURCES, encode(version), b"p")
        await world.until("SELECT count() FROM resources", lambda rows: rows == [(2,)])
        # Offset 1 is a marker: no record is read there, as if it had been compacted away.
        world.ask("INSERT INTO resources SELECT * REPLACE (1 AS _offset, 9 AS version) FROM resources LIMIT 1")
        await world.until("SELECT max(hi) FROM ingest_log WHERE _topic LIKE '%resources'", lambda rows: rows == [(2,)])
        admin = AIOKafkaAdminClient(bootstrap_servers=world.settings.kafka.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(world.name(topics.SPANS), 0): RecordsToDelete(12)})
        finally:
            await admin.close()
        done = await world.cli("replay", "spans", "--from-offset", "0", "--rebuild", "--json")
        assert (done.items[0]["expired"], done.items[0]["records"]) == (12, 48)
        assert "12 offsets before 12 have expired" in done.err
        again = await world.cli("replay", "resources", "--from-offset", "0", "--rebuild", "--json")
        assert (again.items[0]["records"], again.items[0]["rows"]) == (2, 3)
    assert world.ask("SELECT sum(rows), sum(dead), sum(duplicates) FROM reconciliation") == [(83, 40, 0)]
    assert world.ask("SELECT version FROM resources ORDER BY _offset") == [(0,), (9,), (1,)]


async def test_wrong_arguments_and_abandoning(world: World) -> None:
    assert (await world.cli("replay", "spans")).code == 2
    assert (await world.cli("replay", "nothing", "--from-offset", "0")).code == 2
    assert (await world.cli("replay", "spans", "--from-offset", "0", "--partition", "9")).code == 2
    assert (await world.cli("replay", "spans", "--from-time", "yesterday")).code == 2
    empty = await world.cli("replay", "spans", "--from-offset", "0")
    assert (empty.code, "Nothing to do" in empty.out) == (0, True)
    async with world.materialiser():
        await fill(world)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "inserted", "1"),
            env=world.environment,
        )
        await asyncio.wait_for(child.wait(), 90)
        assert world.ask("SELECT sum(duplicates) > 0 FROM reconciliation") == [(True,)]
        ended = await world.cli("replay", "spans", "--abandon")
        assert (ended.code, "Ended 1 unfinished replay" in ended.out) == (0, True), ended
    assert world.ask(RECONCILED) == [(80, 40, 0, 0)]


@pytest.mark.parametrize("table", ["spans", "dead_letters"])
@pytest.mark.parametrize("step", ["inserted", "whole"])
async def test_what_was_abandoned_half_way_has_all_its_rows(world: World, step: str, table: str) -> None:
    """Killed where a chunk reached one table of two, or where the old rows of one of two are gone."""
    async with world.materialiser():
        await fill(world)
        child = await asyncio.create_subprocess_exec(*(sys.executable, __file__, step, "1"), env=world.environment)
        await asyncio.wait_for(child.wait(), 90)
        begun = "(SELECT min(at) FROM replay_log)"
        world.ask(f"DELETE FROM {table} WHERE _ingested {'<' if step == 'whole' else '>='} {begun} AND _partition = 0")
        ended = await world.cli("replay", "spans", "--abandon")
        assert ended.code == 0, ended.err
    assert world.ask(RECONCILED) == [(80, 40, 0, 0)]
    assert world.ask("SELECT uniqExact(span_id) FROM spans") == [(80,)]
    new = world.ask(f"SELECT _partition, countIf(_ingested >= {begun}) FROM {table} GROUP BY 1 ORDER BY 1")
    assert [rows > 0 for _, rows in new] == [step == "whole", False]


def _child() -> int:
    """`fulgurite replay spans --from-offset 0`, which kills or stops itself after the first time a step is done."""
    what, _, step = sys.argv[1].rpartition(":")

    reached: list[str] = []

    def checkpoint(done: str) -> None:
        reached.append(done)
        if done == step and reached.count(done) == 1:
            os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)

    options = command.Options("spans", from_offset=0, rebuild=sys.argv[2] == "1")
    try:
        return command.replay(load_settings(), options, as_json=True, watch=Watch(checkpoint=checkpoint))
    except FulguriteError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(_child())
