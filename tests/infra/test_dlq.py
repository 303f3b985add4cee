"""Dead letters are a feature: found, shown, mended, sent again, followed; nothing lost or hidden at any crash."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fulgurite.infra.dlq import actions, letters, replaying, sending
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.sql import connect
from fulgurite.infra.topics import create_topics
from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.rollouts import AttemptFinished, RolloutQueued
from fulgurite.schemas.settings import ClickHouseSettings, Settings, load_settings
from tests.consumers import otlp_encoding as otlp
from tests.consumers.poison import poison
from tests.infra.dlq_world import World, span

BIG_NS = 1_700_000_000_123_456_789


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> World:
    return World(settings, tmp_path)


async def test_the_life_of_a_dead_letter(world: World) -> None:
    """Two unusable spans: listed, counted, shown, mended, sent again; one becomes a row, one a dead letter again."""
    wrong = span(span_id="s1", name=5, start_ns=BIG_NS, end_ns=BIG_NS + 1)
    async with world.materialiser():
        await world.produce(topics.SPANS, [wrong, b"\xff\xfe nothing", span(span_id="good")], partition=1)
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(2,)])

        listed = await world.cli("dlq", "list", "--json")
        assert [(one["id"], one["reason"]) for one in listed.items] == [
            ("spans/1/1", "not_json"),
            ("spans/1/0", "bad_field"),
        ]
        reasons = (await world.cli("dlq", "reasons", "--json")).items
        assert {(one["reason"], one["count"], one["example"]) for one in reasons} == {
            ("not_json", 1, "spans/1/1"),
            ("bad_field", 1, "spans/1/0"),
        }
        assert "ff fe 20 6e" in (await world.cli("dlq", "show", "spans/1/1")).out
        shown = await world.cli("dlq", "show", "spans/1/0")
        assert shown.code == 0
        assert "name: wrong type" in shown.out
        assert f'"start_ns": {BIG_NS}' in shown.out

        refused = await world.cli("dlq", "replay", "spans/1/0")
        assert (refused.code, "it would be a dead letter again: bad_field" in refused.out) == (1, True), refused.out
        still = await world.cli("dlq", "mend", "spans/1/0", "--with", "r['name'] = 7")
        assert (still.code, "spans: name: Input should be a valid string" in still.out) == (1, True), still.out
        mend = ("dlq", "mend", "spans/1/0", "--with", "r['name'] = str(r['name'])")
        dry = await world.cli(*mend, "--dry-run")
        assert (dry.code, '- "name": 5' in dry.out, '+ "name": "5"' in dry.out) == (0, True, True), dry.out
        assert world.ask("SELECT count() FROM dead_letter_actions") == [(0,)]
        assert (await world.cli(*mend)).code == 0

        sent = await world.cli("dlq", "replay", "spans/1/0", "spans/1/1", "--force", "--json")
        to = {one["id"]: one["to"] for one in sent.items}
        assert sent.code == 0, sent
        record = next(r for r in await world.records(topics.SPANS) if r.value and b'"name":"5"' in r.value)
        assert (record.key, dict(record.headers)["fulgurite.replay_of"]) == (
            b"r",
            f"{world.name(topics.SPANS)}/1/0/0".encode(),
        )
        await world.until("SELECT start_ns FROM spans WHERE span_id = 's1'", lambda rows: rows == [(BIG_NS,)])
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(3,)])

        status = {one["id"]: one for one in (await world.cli("dlq", "status", "--json")).items}
        assert (status["spans/1/0"]["tables"], status["spans/1/0"]["mended"]) == (["spans"], True)
        assert [v["reason"] for v in status["spans/1/1"]["verdicts"]] == ["not_json"]
        assert "a row of spans" in (await world.cli("dlq", "show", "spans/1/0")).out
        again = await world.cli("dlq", "show", to["spans/1/1"])
        assert "is a replay of" in again.out
        twice = await world.cli("dlq", "replay", "spans/1/0")
        assert (twice.code, "it was replayed at" in twice.out, "--again" in twice.out) == (1, True, True)
        assert len(await world.records(topics.SPANS)) == 5
        assert (await world.cli("dlq", "replay", "spans/1/0", "--again")).code == 0
        await world.until("SELECT count() FROM spans WHERE span_id = 's1'", lambda rows: rows == [(2,)])
        assert world.ask("SELECT count() FROM otel_traces WHERE SpanId = 's1'") == [(1,)]


async def test_an_otlp_span_is_mended_and_sent_again(world: World) -> None:
    """A span whose end lies before its start, among good ones: shown whole, mended, replayed, a row of spans."""
    judged_name = "gen_ai.evaluation.result"
    judged = otlp.event(judged_name, {"gen_ai.evaluation.score.value": 1.0})
    more = otlp.part(15, otlp.part(2, b"boom") + otlp.integer(3, 2)) + otlp.part(3, b"vendor=x")
    values = {"gen_ai.prompt": "hi", "fulgurite.rollout_id": "r", "n": 5}
    bad = otlp.span(
        values, start=BIG_NS, end=BIG_NS - 5, kind=3, events=[judged], links=[otlp.link({"a": "b"})], more=more
    )
    scope = otlp.scope_spans([otlp.span(), bad], "scope", "1")
    value = otlp.traces(otlp.resource_spans({"service.name": "s"}, scope))
    async with world.materialiser():
        await world.produce(topics.OTLP_SPANS, [value], key=None, partition=1)
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(1,)])
        name = f"{world.name(topics.OTLP_SPANS)}/1/0/1"
        shown = " ".join((await world.cli("dlq", "show", name)).out.split())  # wherever lines end
        missing = [words for words in ("is before start_time", "vendor=x", judged_name, "boom") if words not in shown]
        assert not missing, shown
        refused = await world.cli("dlq", "replay", name)
        assert (refused.code, "endTimeUnixNano: is before startTimeUnixNano" in refused.out) == (1, True), refused.out
        the_span = 'r["resourceSpans"][0]["scopeSpans"][0]["spans"][0]'
        mend = await world.cli("dlq", "mend", name, "--with", f'{the_span}["endTimeUnixNano"] = "{BIG_NS + 5}"')
        assert mend.code == 0, mend
        sent = await world.cli("dlq", "replay", name)
        assert sent.code == 0, sent
        columns = "end_ns, kind, status, status_message, service, input, attributes['n'], extra['trace_state'], "
        columns += "events.name, links.attributes, attributes['otel.scope.name']"
        wanted = (
            BIG_NS + 5,
            "client",
            "error",
            "boom",
            "s",
            "hi",
            "5",
            "vendor=x",
            [judged_name],
            [{"a": "b"}],
            "scope",
        )
        await world.until(
            f"SELECT {columns} FROM spans WHERE start_ns = {BIG_NS}",
            lambda rows: rows == [wanted],
        )
        (status,) = (await world.cli("dlq", "status", "--json")).items
        assert (status["tables"], status["mended"]) == (["spans"], True)


async def test_lines_by_the_hundred(world: World) -> None:
    """Lines of newline-delimited records: each has an ID, is mended by one command, and replayed once by another."""
    lines = [span(span_id=f"s{number}", kind="sideways" if number % 2 else "client") for number in range(300)]
    async with world.materialiser():
        await world.produce(topics.SPANS, [b"\n".join(lines[:200]), b"\n".join(lines[200:])])
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(150,)])
        assert (await world.cli("dlq", "show", "spans/0/0/7")).code == 0
        missing = await world.cli("dlq", "show", "spans/0/0/8")
        assert (missing.code, "Other lines of the same record are: spans/0/0/1" in missing.err) == (1, True)
        chosen = ("--topic", "spans", "--reason", "bad_field")
        mended = await world.cli("dlq", "mend", *chosen, "--set-field", "kind=internal")
        assert (mended.code, "150 mended, 0 refused." in mended.out) == (0, True), mended.out
        sent = await world.cli("dlq", "replay", *chosen, "--mended")
        assert (sent.code, "150 sent, 0 refused." in sent.out) == (0, True), sent.out
        await world.until("SELECT count() FROM spans", lambda rows: rows == [(300,)])
        assert "No such dead letters" in (await world.cli("dlq", "replay", *chosen)).err
        await world.until(
            "SELECT count() FROM dead_letter_replays WHERE tables = ['spans'] AND empty(verdicts)",
            lambda rows: rows == [(150,)],
        )
    assert world.ask("SELECT uniqExact(span_id) FROM spans") == [(300,)]


async def test_a_line_that_another_reader_refused(world: World) -> None:
    """One dead letter with the line's number and both verdicts; only that line is sent again."""
    lines = [span(span_id=f"s{number}") for number in range(8)]
    lines[7] = span(span_id="s7", rollout_id="ghost", kind="sideways")
    topic, why = world.name(topics.SPANS), "unknown_rollout"
    letters_of = [
        DeadLetter(topic, 0, 0, "assembler", why, "nobody", b"r", lines[number], number) for number in (3, 5, 7)
    ]
    async with world.materialiser():
        await world.produce(topics.SPANS, [b"\n".join(lines)])
        for letter in letters_of:
            await world.produce(topics.DEAD_LETTERS, [letter.value], letter.key, headers=letter.headers())
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(4,)])
        listed = [one["id"] for one in (await world.cli("dlq", "list", "--json")).items]
        assert sorted(listed) == ["spans/0/0/3", "spans/0/0/5", "spans/0/0/7"]
        shown = await world.cli("dlq", "show", "spans/0/0/7")
        assert "refused by assembler" in shown.out
        assert "refused by materialiser" in shown.out
        assert "partition 0, offset 0, line 7 (the first is 0)" in " ".join(shown.out.split()), shown.out
        await world.produce(topics.ROLLOUTS, [encode(RolloutQueued(rollout_id="r"))], b"r")
        await world.until("SELECT count() FROM rollout_events", lambda rows: rows == [(1,)])
        sent = await world.cli("dlq", "replay", "spans/0/0/5")
        assert sent.code == 0, sent
        [record] = [record for record in await world.records(topics.SPANS) if record.headers]
        assert record.value == lines[5]
        assert dict(record.headers)["fulgurite.replay_of"] == f"{topic}/0/0/5".encode()
        other = await world.cli("dlq", "replay", "spans/0/0/3", "--dry-run")
        assert "1 would be sent" in other.out, "what was sent for one line says nothing of another"


async def test_what_makes_no_sense_is_refused(world: World) -> None:
    """Every stage's letters are listed; each that cannot or should not be sent again says why."""
    kafka = world.settings.kafka
    spans, rollouts, rewards = (kafka.topic(t) for t in (topics.SPANS, topics.ROLLOUTS, topics.REWARDS))
    end = encode(AttemptFinished(rollout_id="r1", attempt_id="a1", status="succeeded"))
    reward = b'{"rollout_id": "r1", "value": 1.0}'
    written = [
        (DeadLetter("", -1, -1, "gateway", "bad_field", "no json", b"r1", b"<html>"), "it never was a record"),
        (DeadLetter(spans, 0, 70, "assembler", "late", "too late", b"r1", span()), "it would come late again"),
        (DeadLetter(spans, 0, 71, "assembler", "unknown_rollout", "?", b"r1", span()), "still nobody announced"),
        (DeadLetter(rollouts, 0, 72, "coordinator", "unknown_rollout", "?", b"r1", end), "for the coordinator alone"),
        (DeadLetter(kafka.topic(topics.RESOURCES), 0, 73, "follower", "x", "?", b"p", b"{}"), "is compacted"),
        (DeadLetter(spans, -1, -1, "runner", "too_large", "cut", b"r1", span()[:20]), "dead letter again: not_json"),
        (DeadLetter("other.spans", 0, 1, "assembler", "late", "?", b"r1", span()), "is no topic that takes"),
        (DeadLetter(rewards, 1, 74, "assembler", "unknown_rollout", "?", None, reward), "still nobody announced"),
    ]
    async with world.materialiser():
        for letter, _ in written:
            await world.produce(topics.DEAD_LETTERS, [letter.value], letter.key, headers=letter.headers())
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(len(written),)])
        ids = {one["message"]: one["id"] for one in (await world.cli("dlq", "list", "--json")).items}
        assert "dead_letters/0/0" in ids.values()
        places = [letters.Place(world.name(topics.DEAD_LETTERS), 0, 0), letters.Place(spans, 0, 70)]
        with connect(world.settings.clickhouse) as client:
            everything = letters.newest(client, letters.Filter(), 100)
            found = letters.at(client, [one.place for one in everything])
            plan = await replaying.plan(kafka, client, found, replaying.Wishes())
        why = {(one.letter.stage, one.letter.place.offset): one.why for one in plan.refused}
        assert not plan.send
        for number, (letter, words) in enumerate(written):
            assert words in why[letter.stage, letter.offset if letter.offset >= 0 else number], letter
        assert places[0] in {one.place for one in everything}
        # Once the rollout is announced, a reward may be replayed; nameless, it has the name of its place ever after.
        await world.produce(topics.ROLLOUTS, [encode(RolloutQueued(rollout_id="r1"))], b"r1")
        await world.until("SELECT count() FROM rollout_events", lambda rows: rows == [(1,)])
        for extra in ((), ("--again",)):
            done = await world.cli("dlq", "replay", "rewards/1/74", *extra)
            assert done.code == 0, done.out
        await world.until("SELECT count() FROM rewards", lambda rows: rows == [(2,)])
    assert world.ask("SELECT DISTINCT reward_id FROM rewards") == [(f"{rewards}-1-74",)]
    assert {record.key for record in await world.records(topics.REWARDS)} == {b"r1"}


@pytest.mark.chaos
@pytest.mark.parametrize("step", ["intended", "looked", "sent", "recorded"])
async def test_killed_after_a_step(world: World, step: str) -> None:
    """Each of three letters is in Kafka once in the end, and the tables say so, wherever the first replay died."""
    async with world.materialiser():
        await world.produce(topics.SPANS, [span(span_id=f"s{number}", kind="sideways") for number in range(3)])
        await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(3,)])
        await world.cli("dlq", "mend", "--topic", "spans", "--set-field", "kind=client")
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            step,
            env=world.environment,
        )
        assert await asyncio.wait_for(child.wait(), 90) == -signal.SIGKILL
        early = await world.cli("dlq", "replay", "--topic", "spans")
        if step != "recorded":
            assert (early.code, early.out.count("began to replay it")) == (1, 3), early
        with connect(world.settings.clickhouse) as client:
            found = letters.matching(client, letters.Filter(), 10)
            wishes = replaying.Wishes(intent_seconds=0)
            plan = await replaying.plan(world.settings.kafka, client, found, wishes)
            assert len(plan.send) == (0 if step in ("sent", "recorded") else 3)
            await replaying.carry_out(world.settings.kafka, client, plan, lambda _: None)
        await world.until("SELECT count() FROM spans", lambda rows: rows == [(3,)])
        replays = (
            "SELECT count(), uniqExact(offset) FROM dead_letter_replays WHERE state = 'sent' AND tables = ['spans']"
        )
        await world.until(replays, lambda rows: rows == [(3, 3)])
    assert len(await world.records(topics.SPANS)) == 6


async def test_two_replays_at_once_never_both_send(world: World) -> None:
    async with world.materialiser():
        await world.produce(topics.SPANS, [span(span_id="s")])
        await asyncio.to_thread(refuse, world, span(span_id="s"))
        done = await asyncio.gather(*(world.cli_apart("dlq", "replay", "spans/0/0") for _ in range(3)))
        sent = len(await world.records(topics.SPANS)) - 1
        assert sent <= 1, done
        assert [code for code, _ in done].count(0) == sent, done


@pytest.mark.chaos
@pytest.mark.slow
async def test_kafka_dies_before_it_acknowledges(
    migrated_settings: ClickHouseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody acknowledged is neither called sent nor sent twice: the next run looks for it first."""
    monkeypatch.setattr(sending, "SEND_SECONDS", 3.0)
    monkeypatch.setattr(sending, "CHUNK_LETTERS", 1)
    with EmbeddedKafka(tmp_path / "kafka") as broker:
        kafka = broker.settings()
        await create_topics(kafka)
        world = World(Settings(kafka=kafka, clickhouse=migrated_settings), tmp_path)
        for offset in range(2):
            await asyncio.to_thread(refuse, world, span(span_id=f"s{offset}"), offset)
        steps: list[str] = []

        def checkpoint(step: str) -> None:
            steps.append(step)
            if steps.count("looked") == 2:  # the first letter is sent already
                broker.kill()

        with connect(migrated_settings) as client:
            found = letters.matching(client, letters.Filter(), 10)
            plan = await replaying.plan(kafka, client, found, replaying.Wishes())
            with pytest.raises(sending.Unfinished, match="did not acknowledge 1 of 1 records"):
                await replaying.carry_out(kafka, client, plan, lambda _: None, checkpoint)
            after = actions.replays(client, [one.place for one in found])
            assert [after[one.place][0].state for one in found] == ["sent", "intended"]
            code, said = await world.cli_apart("dlq", "replay", "spans/0/0", "--again")
            assert (code, "Kafka" in said, "Traceback" in said) == (3, True, False), said
            await asyncio.to_thread(broker.start)
            await poison(kafka, topics.SPANS)
            plan = await replaying.plan(kafka, client, found, replaying.Wishes(intent_seconds=0))
            await replaying.carry_out(kafka, client, plan, lambda _: None)
        assert sorted(r.value or b"" for r in await world.records(topics.SPANS)) == [one.value for one in found]
        states = "SELECT offset, state FROM dead_letter_replays ORDER BY offset, intended_at"
        assert world.ask(states) == [(0, "sent"), (1, "withdrawn"), (1, "sent")]


def refuse(world: World, value: bytes, offset: int = 0) -> None:
    """A dead letter, written as the materialiser writes it."""
    place = f"'{world.name(topics.SPANS)}', 0, {offset}"
    world.ask(
        "INSERT INTO dead_letters (topic, partition, offset, stage, reason, value, key, _topic, _partition, _offset) "
        f"SELECT {place}, 'materialiser', 'rejected', value, 'r', {place} "
        f"FROM values('value String', '{value.decode()}')"
    )


def _child() -> None:
    """Replays everything there is, and dies after a step."""

    def checkpoint(done: str) -> None:
        if done == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = load_settings()
    with connect(settings.clickhouse) as client:
        found = letters.matching(client, letters.Filter(), 10)

        async def work() -> Any:
            plan = await replaying.plan(settings.kafka, client, found, replaying.Wishes())
            await replaying.carry_out(settings.kafka, client, plan, lambda _: None, checkpoint)

        asyncio.run(work())


if __name__ == "__main__":
    _child()
