"""What rules take out is in no column made of it, and in no dead letter, whoever wrote that one."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any, cast

import clickhouse_connect
import pytest
from clickhouse_connect.driver import Client
from pydantic import SecretStr

from fulgurite.consumers.materialiser.blocks import Partition, Slice
from fulgurite.consumers.materialiser.fences import Guard
from fulgurite.consumers.materialiser.store import Store
from fulgurite.consumers.otlp.batches import otlp
from fulgurite.consumers.otlp.spans import decode
from fulgurite.consumers.redaction import VIEWS, apply_redaction, view_selects
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas.codec import encode
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.redaction import KeyRule, RedactionSettings, ValueRule
from fulgurite.schemas.rollouts import AttemptFinished, RolloutFinished, RolloutQueued, RolloutRequeued
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import OTLP_SPANS, SPANS
from fulgurite.schemas.trajectories import Trajectory
from tests.consumers.otlp_encoding import START, Record, event, record, span
from tests.consumers.otlp_tables import Tables

KEYS = [
    KeyRule(name="gen_ai.input.messages", action="drop"),
    KeyRule(name="gen_ai.output.messages", action="cut", chars=64),
    KeyRule(name="url.full", action="mask"),
    KeyRule(name="service.name", action="hash"),
    KeyRule(name="gen_ai.prompt.*", action="drop"),
    KeyRule(regex="(?i)baggage|token|rollout|attempt|sequence", action="drop"),
]
VALUES = [ValueRule(name="email")]


@pytest.fixture
def client(migrated_settings: ClickHouseSettings) -> Iterator[Client]:
    options = connection_options(migrated_settings)
    with clickhouse_connect.get_client(**options, database=migrated_settings.database) as found:
        yield found


def test_columns_made_of_otlp_attributes_follow_the_rules_for_these(
    migrated_settings: ClickHouseSettings, client: Client
) -> None:
    apply_redaction(client, RedactionSettings(keys=KEYS, values=VALUES, hash_salt=SecretStr("salt")))
    row = Tables(client, migrated_settings).row(
        record(
            span(
                {
                    "gen_ai.input.messages": "SECRET PROMPT",
                    "gen_ai.output.messages": "é" * 60 + "ann@example.org " + "x" * 100,
                    "url.full": "https://host/SECRETPATH",
                    "gen_ai.operation.name": "chat",
                    "gen_ai.agent.name": "ann@example.org",
                    "gen_ai.request.model": "m",
                    "baggage.fulgurite.rollout_id": "r",
                    "agentlightning.attempt_id": "a",
                    "agentlightning.span_sequence_id": 4,
                    "gen_ai.usage.input_tokens": 12,
                    "llm.hosted_vllm.response_token_ids": [4, 5],
                }
            ),
            resource={"service.name": "alice-laptop"},
        )
    )
    assert (row["input"], row["endpoint"]) == ("", "[redacted]")
    assert row["output"] == row["attributes"]["gen_ai.output.messages"]
    assert row["output"].endswith("… (177 characters)")
    hashed = Redactor(RedactionSettings(keys=KEYS, hash_salt=SecretStr("salt"))).attributes(
        {"service.name": "alice-laptop"}
    )
    assert row["service"] == row["resource_attributes"]["service.name"] == hashed["service.name"]
    assert (row["operation"], row["model"], row["agent"]) == ("chat", "m", "[redacted:email]")
    assert (row["rollout_id"], row["attempt_id"], row["sequence_id"]) == ("r", "a", 4), "ids are no rule's business"
    assert (row["input_tokens"], row["response_token_ids"]) == (12, [4, 5])
    assert "baggage.fulgurite.rollout_id" not in row["attributes"]
    assert not any(secret in str(row) for secret in ("SECRET", "alice", "ann@"))


def test_a_slash_hides_nothing_from_rules_wherever_in_otlp_it_stands(
    migrated_settings: ClickHouseSettings, client: Client
) -> None:
    """JSON may write it with a backslash before it: neither rules nor who asks for a text would find it."""
    rules = RedactionSettings(
        values=[ValueRule(name="bearer"), ValueRule(name="intern", regex="https://intern/[a-z]+")]
    )
    apply_redaction(client, rules)
    tables = Tables(client, migrated_settings)
    secrets = ["Bearer QUJDREVGR0hJSktM/SECRET0123456789abcdef==", "https://intern/SECRET".lower()]
    said: dict[str, Any] = {
        "list": [*secrets, "a/b"],
        "map": {"inner": secrets, "path": "a/b"},
        "gen_ai.prompt.0.content": " ".join(secrets),
        "plain": secrets[0],
    }
    row = tables.row(record(span(said, events=[event("e", said)]), resource=said))
    assert json.loads(row["attributes"]["list"]) == ["[redacted:bearer]", "[redacted:intern]", "a/b"]
    assert '"a/b"' in row["attributes"]["list"]
    assert json.loads(row["attributes"]["map"])["path"] == "a/b"
    tables.insert(
        [Record(99, record(span(said, start=START, end=START - 1, events=[event("e", said)]), resource=said))]
    )
    (letter,) = tables.rows("dead_letters", "_offset = 99")
    for kept in (row, letter):
        assert "secret" not in str(kept).lower()
        assert "\\/" not in str(kept)


def test_what_is_dropped_was_never_there(migrated_settings: ClickHouseSettings, client: Client) -> None:
    apply_redaction(client, RedactionSettings(keys=KEYS))
    tables = Tables(client, migrated_settings)
    row = tables.row(record(span({"gen_ai.input.messages": "SECRET", "gen_ai.prompt": "the next name"})))
    assert row["input"] == "the next name"
    numbered = {"gen_ai.prompt.0.content": "SECRET", "gen_ai.prompt.0.role": "user", "gen_ai.completion.0.content": "b"}
    row = tables.row(record(span(numbered)))
    assert (row["input"], json.loads(row["output"])) == ("", {"gen_ai.completion.0.content": "b"})


def test_no_dead_letter_goes_past_the_rules(migrated_settings: ClickHouseSettings, client: Client) -> None:
    apply_redaction(client, RedactionSettings(values=VALUES))
    packed = gzip.compress(b"carol@example.org", mtime=0)
    cut_off = record(span({"a": "bob@example.org", "pad": "x" * 50}))[:-20]
    refused = [b"\x1f\x8b carol@example.org", cut_off, packed]
    for at, value in enumerate(refused):
        asyncio.run(_insert_dead(migrated_settings, at, value))
    for topic in ("rollouts", "trajectories", "resources", "training", "workers", "dead_letters"):
        columns = ["raw", "key", "headers", "_topic", "_partition", "_offset"]
        client.insert(f"in_{topic}", [["no JSON dave@example.org", "k", {}, topic, 0, 10]], column_names=columns)
    for topic in ("spans", "rewards"):
        row = {"raw": "no JSON dave@example.org", "_topic": topic, "_offset": 10, "_into": 3}
        client.insert(f"in_{topic}", [list(row.values())], column_names=list(row))
    bad = record(span({"mail": "erin@example.org"}, start=START, end=START - 1))
    Tables(client, migrated_settings).insert([Record(20, bad)])
    asyncio.run(_insert_undecodable(migrated_settings, 30, b"\xff frank@example.org"))
    rows = client.query(
        "SELECT value, message FROM dead_letters ORDER BY _offset", column_formats={"value": "bytes"}
    ).result_rows
    assert len(rows) == len(refused) + 10
    assert rows[0] == (b"\x1f\x8b [redacted:email]", "refused: [redacted:email]")
    assert rows[-1] == (b"\xff [redacted:email]", "a header's name is not UTF-8: [redacted:email]")
    assert [packed in row for row in rows].count(True) == 1, "what is compressed is kept as it is"
    assert not any(b"@example.org" in row[0] or "@example.org" in row[1] for row in rows)


def test_protobuf_of_which_a_rule_takes_out_parts_can_be_read_all_the_same(
    migrated_settings: ClickHouseSettings, client: Client
) -> None:
    rules = RedactionSettings(values=VALUES)
    apply_redaction(client, rules)
    spoilt, untouched = record(span({"mail": "erin@example.org"})), record(span({"mail": "nobody"}))
    for offset, value in enumerate((spoilt, untouched)):
        asyncio.run(_insert_dead(migrated_settings, offset, value, rules))
    rows = client.query("SELECT value, message FROM dead_letters ORDER BY _offset", column_formats={"value": "bytes"})
    (first, said), (second, _) = rows.result_rows
    assert decode(otlp(first)) == decode(record(span({"mail": "[redacted:email]"})))
    assert "kept as OTLP JSON" in said
    assert second == untouched


def test_keys_are_found_within_attributes_and_dead_letters(
    migrated_settings: ClickHouseSettings, client: Client
) -> None:
    rules = RedactionSettings(keys=[KeyRule(regex="(?i)password", action="mask")])
    apply_redaction(client, rules)
    secret = {"password": "SECRET", "user": {"password": "SECRET", "kept": 1}}
    spans = [
        {"events": [{"name": "e", "time_ns": 1, "attributes": secret}], "attributes": secret, "more": secret},
        {"kind": "odd", "attributes": secret},
    ]
    tables = Tables(client, migrated_settings)
    for offset, one in enumerate(spans):
        known = {"rollout_id": "r", "span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2}
        row = {"raw": json.dumps({**known, **one}), "_topic": "spans", "_offset": offset, "_into": 3}
        client.insert("in_spans", [list(row.values())], column_names=list(row))
    arguments = {"gen_ai.tool.call.arguments": json.dumps(secret), **secret}
    tables.insert([Record(2, record(span(arguments, events=[event("e", secret)])))])
    tables.insert([Record(3, record(span(secret, start=START, end=START - 1)))])
    asyncio.run(_insert_dead(migrated_settings, 4, record(span(secret)), rules))
    nested = '{"password":"[redacted]","kept":1}'
    native, otlp_row = tables.rows("spans")
    assert native["attributes"]["user"] == native["events"][0]["attributes"]["user"] == nested
    assert otlp_row["attributes"]["user"] == otlp_row["events"][0]["attributes"]["user"] == nested
    assert json.loads(native["extra"]["more"])["user"] == json.loads(nested)
    assert json.loads(otlp_row["input"])["user"] == json.loads(nested)
    letters = [row["value"] for row in tables.rows("dead_letters")]
    assert len(letters) == 3
    assert all("redacted" in letter and json.loads(letter) for letter in letters)
    assert "SECRET" not in str((native, otlp_row, letters))


def test_errors_and_metadata_of_rollouts_follow_the_rules(
    migrated_settings: ClickHouseSettings, client: Client
) -> None:
    rules = RedactionSettings(keys=[KeyRule(name="token", action="drop")], values=VALUES, max_text_chars=64)
    apply_redaction(client, rules)
    secret, told = {"token": "SECRET", "by": "ann@example.org"}, "no such user: ann@example.org"
    records = [
        ("rollouts", RolloutQueued(rollout_id="r", metadata=secret)),
        ("rollouts", AttemptFinished(rollout_id="r", attempt_id="a", status="failed", error=told)),
        ("rollouts", RolloutRequeued(rollout_id="r", reason=told)),
        ("rollouts", RolloutFinished(rollout_id="r", attempt_id="a", status="failed", error=told + " x" * 50)),
        ("trajectories", Trajectory(rollout_id="r", attempt_id="a", status="failed", error=told, metadata=secret)),
    ]
    for offset, (topic, said) in enumerate(records):
        row = {"raw": encode(said).decode(), "_topic": topic, "_offset": offset}
        client.insert(f"in_{topic}", [list(row.values())], column_names=list(row))
    tables = Tables(client, migrated_settings)
    found = [
        client.query(f"SELECT error, metadata, {reason} FROM {table} ORDER BY _offset").result_rows
        for table, reason in (("rollout_events", "reason"), ("trajectories", "''"))
    ]
    mail, clean = "[redacted:email]", {"by": "[redacted:email]"}
    assert found[0][:3] == [("", clean, ""), (f"no such user: {mail}", {}, ""), ("", {}, f"no such user: {mail}")]
    assert found[1] == [(f"no such user: {mail}", clean, "")]
    assert found[0][3][0].endswith(" x x… (130 characters)")
    assert not tables.rows("dead_letters")


@pytest.mark.parametrize(
    "rules",
    [
        RedactionSettings(max_value_chars=64),
        *(RedactionSettings(keys=[KeyRule(name=name, action="mask")]) for name in ("agent", "re*", "left_out", "*")),
        RedactionSettings(keys=[KeyRule(name="left*", action="drop")]),
        RedactionSettings(values=[ValueRule(name="all", regex="[a-z]+")]),
    ],
)
def test_no_rule_spoils_whose_calls_a_trajectory_lacks(
    migrated_settings: ClickHouseSettings, client: Client, rules: RedactionSettings
) -> None:
    """It is a field of the contract, though it lies among those that the table does not know."""
    apply_redaction(client, rules)
    left = [("sampling", "user", "simulator"), ("unfinished", "judge", "policy")]
    said = [dict(zip(("reason", "agent", "resource"), each, strict=True)) for each in left]
    fields = {"rollout_id": "r", "status": "succeeded", "event": "finished", "attempt_id": "a", "left_out": said}
    for topic in ("trajectories", "rollouts"):
        row = {"raw": json.dumps(fields | {"left_over": said}), "_topic": topic}
        client.insert(f"in_{topic}", [list(row.values())], column_names=list(row))
    (whose,) = client.query("SELECT arrayMap(l -> [l.1, l.2, l.3], left_out) FROM trajectories").result_rows[0]
    assert [tuple(each) for each in whose] == left
    others = [
        client.query(f"SELECT extra['{field}'] FROM {table}").result_rows[0][0]
        for table, field in (("trajectories", "left_over"), ("rollout_events", "left_out"))
    ]
    named = [rule.name for rule in rules.keys]
    assert [other == json.dumps(said, separators=(",", ":")) for other in others] == [named == ["left_out"], False]


async def _insert_dead(
    settings: ClickHouseSettings, offset: int, value: bytes, rules: RedactionSettings | None = None
) -> None:
    store = Store(settings, 30, "test", rules)
    await store.connect()
    try:
        one = Slice(Partition(OTLP_SPANS, "otlp_spans", 0), [Record(offset, value)])
        await store.insert_dead(one, "refused: carol@example.org", Guard("test"))
    finally:
        await store.close()


async def _insert_undecodable(settings: ClickHouseSettings, offset: int, value: bytes) -> None:
    store = Store(settings, 30, "test")
    await store.connect()
    try:
        lost = Undecodable("t", 0, offset, 1, b"k", value, "a header's name is not UTF-8: frank@example.org")
        await store.insert_undecodable(Slice(Partition(SPANS, "spans", 0), [lost]), Guard("test"))
    finally:
        await store.close()


def test_every_view_that_writes_dead_letters_is_known(client: Client) -> None:
    rows = client.query(
        "SELECT name FROM system.tables WHERE database = currentDatabase() AND engine = 'MaterializedView' "
        "AND create_table_query LIKE '%.dead_letters (%'"
    ).result_rows
    writing = {str(name) for (name,) in rows}
    assert len(writing) == 9
    assert writing <= VIEWS.keys() <= view_selects().keys()


def test_a_replays_dead_letter_comes_once(migrated_settings: ClickHouseSettings, client: Client) -> None:
    settings: dict[str, str | int] = {
        "insert_deduplication_token": "token",
        "insert_deduplicate": 1,
        "deduplicate_blocks_in_dependent_materialized_views": 1,
    }

    async def insert() -> None:
        store = Store(migrated_settings, 30, "test")
        await store.connect()
        one = Slice(Partition(SPANS, "spans", 0), [Record(1, b"x")])
        await store.insert_dead(one, "no", Guard("test", settings=settings))
        await store.insert_dead(one, "no", Guard("test", settings=settings))
        await store.close()

    asyncio.run(insert())
    assert client.query("SELECT count() FROM dead_letters").result_rows == [(1,)]


def test_rules_that_would_make_each_insert_slow_are_refused_before_anything_changes() -> None:
    rules = RedactionSettings(
        keys=[KeyRule(name=f"http.request.header.x-secret-{i}.*", action="hash") for i in range(64)],
        values=[ValueRule(name=f"ticket{i}", regex=f"TICKET{i}-[0-9]{{4,12}}") for i in range(64)],
        max_value_chars=8_000,
        max_text_chars=200_000,
    )
    with pytest.raises(StartError, match=r"64 keys and 64 values make the view spans_mv a query of .* as one regex"):
        apply_redaction(cast(Client, None), rules)
