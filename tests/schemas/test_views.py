"""Views: what was sent twice counts once, and a filter reaches the table's index instead of reading everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import clickhouse_connect
import pytest
from clickhouse_connect.driver import Client

from fulgurite.schemas.codec import encode
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.resources import ResourceVersion, prompt_version
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.training import DroppedRollout, RolloutsDecided, TrainingStep

ROLLOUTS = 400
SPANS = 100 * ROLLOUTS
GRANULE = 8192
"""Rows; all lie in ten."""
RUNTIME_FILTERS = "SETTINGS enable_join_runtime_filters = 1, enable_join_runtime_filters_index_analysis = 1"
# A second between spans, a rollout after the other; every tenth is an LLM call of version rollout / 4. All sent twice.
FILL_SPANS = f"""
INSERT INTO spans (rollout_id, attempt_id, trace_id, span_id, name, start_ns, end_ns, response_token_ids, input,
    min_version, max_version, _ts, _offset)
SELECT
    concat('r', leftPad(toString(rollout), 3, '0')), 'a', concat('t', toString(rollout)), toString(number),
    'n', number * 1000000000, number * 1000000000 + 1, range(if(number % 10 = 0, 3, 0)), 'x', version, version,
    '2026-11-21 00:00:00', offset
FROM (
    SELECT number, intDiv(number, 100) AS rollout, if(number % 10 = 0, intDiv(rollout, 4), NULL) AS version
    FROM numbers({SPANS}))
ARRAY JOIN [number, number + 1000000] AS offset
"""
FILL_TRAJECTORIES = """
INSERT INTO trajectories (rollout_id, run_id, mode, group_id, reward, min_version, max_version, metadata, _offset, _ts)
SELECT concat('r', toString(number)), 'run', 'train', concat('g', toString(intDiv(number, 2))), number % 2 + late, 1, 1,
    map('sampling', 'sampled'), number + 1000 * late, '2026-11-21 00:00:00'
FROM numbers(100) ARRAY JOIN {late} AS late
"""


@pytest.fixture
def client(migrated_settings: ClickHouseSettings) -> Iterator[Client]:
    options = connection_options(migrated_settings)
    with clickhouse_connect.get_client(**options, database=migrated_settings.database) as found:
        yield found


def asked(client: Client, sql: str) -> tuple[int, int]:
    """How many rows were found, and how many were read for it."""
    result = client.query(sql)
    return len(result.result_rows), int(result.summary["read_rows"])


def test_a_filter_reaches_the_index(client: Client) -> None:
    client.command(FILL_SPANS)
    client.command("OPTIMIZE TABLE spans FINAL")
    for sql, rows in {
        "llm_calls WHERE rollout_id = 'r200'": 10,
        "llm_calls WHERE trace_id = 't200'": 10,
        "llm_calls WHERE start_time >= '1970-01-01 11:00:00'": 40,
        "spans WHERE start_time >= '1970-01-01 11:00:00'": 800,
        "otel_traces WHERE Timestamp >= '1970-01-01 11:00:00'": 400,
        "otel_traces WHERE TraceId = 't200'": 100,
        "rollout_rewards WHERE rollout_id = 'r200'": 0,
        "distinct_spans WHERE rollout_id = 'r200'": 100,
        "distinct_spans WHERE trace_id = 't200'": 100,
        "distinct_spans WHERE start_time >= '1970-01-01 11:00:00'": 400,
    }.items():
        found, read = asked(client, f"SELECT * FROM {sql} {RUNTIME_FILTERS}")
        assert found == rows, sql
        # Of a view, twice as much again: what may have been sent before, of which a time says nothing.
        of_times = "start" in sql or "Timestamp" in sql
        again = 0 if sql.startswith("spans") else 4 * SPANS if of_times else 4 * GRANULE
        assert read <= 2 * GRANULE + again, sql
        if not of_times:
            assert asked(client, f"SELECT * FROM {sql}")[1] <= 6 * GRANULE, sql
    assert asked(client, "SELECT * FROM llm_calls") == (SPANS // 10, 6 * SPANS)


def test_a_view_holds_what_it_leaves_out_by_and_no_span(client: Client) -> None:
    """Of 330 MB of texts, which are little on the disk. Some spans were sent twice."""
    client.command(
        "INSERT INTO spans (rollout_id, span_id, name, operation, start_ns, end_ns, input, _ts, _offset) "
        "SELECT toString(intDiv(number, 100)), toString(number), 'chat', 'chat', number, number, "
        "repeat('some words ', 1000), '2026-11-21 00:00:00', offset "
        "FROM numbers(30000) ARRAY JOIN if(number % 100 = 0, [1, 2], [1]) AS offset"
    )
    client.command("OPTIMIZE TABLE spans FINAL")
    # The planner guesses by what joins of other tests needed.
    alone = "collect_hash_table_stats_during_joins = 0"
    bounded = f"SETTINGS max_memory_usage = 200000000, max_threads = 1, {alone}"
    for view in ("distinct_spans", "llm_calls", "otel_traces"):
        assert asked(client, f"SELECT * FROM {view} LIMIT 5 {bounded}")[0] == 5
    newest = f"SELECT * FROM llm_calls ORDER BY start_ns DESC LIMIT 10 {bounded}"
    assert [row[1] for row in client.query("SELECT start_ns, span_id FROM (" + newest + ")").result_rows] == [
        str(number) for number in range(29999, 29989, -1)
    ]
    assert asked(client, f"SELECT * FROM distinct_spans WHERE start_ns < 27000 LIMIT 5 {bounded}")[0] == 5
    assert client.query("SELECT count(), uniqExact(span_id) FROM distinct_spans").result_rows == [(30000, 30000)]


def test_spans_and_rewards_that_were_sent_twice_count_once_where_they_came_first(client: Client) -> None:
    client.command(
        "INSERT INTO spans (rollout_id, attempt_id, span_id, start_ns, end_ns, name, input_tokens, output, _ts, "
        "_offset) "
        "VALUES ('r', 'a', 's', 1, 3, 'n', 5, 'later', '2026-11-21 00:00:00', 9), "
        "('r', 'a', 's', 1, 3, 'n', 5, 'first', '2026-11-21 00:00:00', 2), "
        "('r', 'b', 's', 1, 3, 'n', 5, 'another attempt', '2026-11-21 00:00:00', 3)"
    )
    found = client.query(
        "SELECT output, input_tokens, duration_ns, toString(start_time) FROM distinct_spans ORDER BY ALL"
    )
    start = "1970-01-01 00:00:00.000000001"
    assert found.result_rows == [("another attempt", 5, 2, start), ("first", 5, 2, start)]
    rewards = [("r", "w", 2.0, 8), ("r", "w", 1.0, 4), ("r", "x", 0.5, 5), ("other", "w", 3.0, 6)]
    client.insert(
        "rewards",
        [[rollout, "a", reward, value, offset, 0] for rollout, reward, value, offset in rewards],
        ["rollout_id", "attempt_id", "reward_id", "value", "_offset", "_ts"],
    )
    found = client.query("SELECT rollout_id, reward_id, value FROM distinct_rewards ORDER BY ALL")
    assert found.result_rows == [("other", "w", 3.0), ("r", "w", 1.0), ("r", "x", 0.5)]
    for view, table in (("distinct_spans", "spans"), ("distinct_rewards", "rewards")):
        columns = [
            {
                row[0]
                for row in client.query(f"DESCRIBE TABLE {name} SETTINGS describe_include_subcolumns = 0").result_rows
            }
            for name in (view, table)
        ]
        assert columns[0] == columns[1], "a view of a table has the table's columns, computed ones too"


def test_a_span_that_was_stamped_anew_counts_once_and_its_first_row_is_it(client: Client) -> None:
    """Whatever differs but rollout, attempt, trace and id; and where a row is there twice, as while it is made anew."""
    rows = [
        # span, start, end, operation, place: partition, offset, line; when
        ("x", 11, 21, "chat", 1, 3, 0, 1),
        ("x", 10, 20, "chat", 0, 100, 0, 2),
        ("x", 10, 99, "chat", 1, 4, 0, 3),
        ("x", 5, 6, "chat", 1, 3, 1, 4),
        ("twice", 7, 8, "chat", 0, 5, 0, 5),
        ("twice", 7, 8, "chat", 0, 5, 0, 6),
        ("tool", 7, 8, "execute_tool", 0, 6, 0, 7),
    ]
    names = ["span_id", "start_ns", "end_ns", "operation", "_partition", "_offset", "_index", "_ingested"]
    more = {"rollout_id": "r", "attempt_id": "a", "trace_id": "t", "name": "n", "_ts": 0}
    client.insert("spans", [[*row, *more.values()] for row in rows], [*names, *more])
    client.insert("spans", [["x", 1, 2, "chat", 0, 200, 0, 8, *(more | {"attempt_id": "b"}).values()]], [*names, *more])
    columns = "attempt_id, span_id, start_ns, end_ns"
    calls = [("a", "twice", 7, 8), ("a", "x", 11, 21), ("b", "x", 1, 2)]
    assert client.query(f"SELECT {columns} FROM llm_calls ORDER BY ALL").result_rows == calls
    found = client.query(f"SELECT {columns}, toUnixTimestamp64Milli(_ingested) FROM distinct_spans ORDER BY ALL")
    assert [row[:4] for row in found.result_rows] == [("a", "tool", 7, 8), *calls]
    assert found.result_rows[1][4] == 5
    assert client.query("SELECT count() FROM otel_traces WHERE TraceId = 't'").result_rows == [(4,)]
    # A later copy is none, also where the first does not meet the filter.
    assert client.query("SELECT count() FROM distinct_spans WHERE start_ns = 10").result_rows == [(0,)]


def test_every_llm_call_is_one_whoever_recorded_it(client: Client) -> None:
    known = {"attempt_id": "a", "rollout_id": "r", "start_ns": 1, "end_ns": 2, "_ts": "2026-11-21 00:00:00"}
    spans: list[dict[str, Any]] = [
        {"span_id": "sampled", "response_token_ids": [1, 2]},
        {"span_id": "provider", "operation": "chat", "model": "gpt", "input_tokens": 5, "output_tokens": 7},
        {"span_id": "gemini", "operation": "generate_content", "input_tokens": 1},
        {"span_id": "text", "operation": "text_completion"},
        {"span_id": "unnamed", "model": "gpt", "output_tokens": 3},
        {"span_id": "agent", "operation": "invoke_agent", "model": "gpt", "output_tokens": 3},
        {"span_id": "embedded", "operation": "embeddings", "model": "e", "input_tokens": 3},
        {"span_id": "tool", "operation": "execute_tool"},
    ]
    for span in [*spans, *spans]:
        row = known | span
        client.command(f"INSERT INTO spans FORMAT JSONEachRow {json.dumps(row)}")
    columns = "span_id, length(response_token_ids), input_tokens, output_tokens"
    assert client.query(f"SELECT {columns} FROM llm_calls WHERE rollout_id = 'r' ORDER BY ALL").result_rows == [
        ("gemini", 0, 1, 0),
        ("provider", 0, 5, 7),
        ("sampled", 2, 0, 0),
        ("text", 0, 0, 0),
        ("unnamed", 0, 0, 3),
    ]


def test_an_index_added_later_serves_spans_of_before(client: Client) -> None:
    client.command("ALTER TABLE spans DROP INDEX start_times")
    client.command(FILL_SPANS)
    sql = "SELECT span_id FROM spans WHERE start_time >= '1970-01-01 11:00:00'"
    assert asked(client, sql) == (800, 2 * SPANS)
    client.command(
        "ALTER TABLE spans ADD INDEX start_times fromUnixTimestamp64Nano(start_ns, 'UTC') TYPE minmax GRANULARITY 1"
    )
    client.command("ALTER TABLE spans MATERIALIZE INDEX start_times SETTINGS mutations_sync = 1")
    found, read = asked(client, sql)
    assert found == 800
    assert read <= 2 * GRANULE


def test_a_trajectory_counts_where_it_came_first(client: Client) -> None:
    client.command(FILL_TRAJECTORIES.replace("{late}", "[1]"))
    client.command(FILL_TRAJECTORIES.replace("{late}", "[0, 0]"))
    assert client.query("SELECT count(), avg(reward) FROM rollout_versions").result_rows == [(100, 0.5)]
    assert client.query("SELECT run_id, sampling, version, n, mean FROM reward_by_version").result_rows == [
        ("run", "sampled", 1, 100, 0.5)
    ]
    columns = "run_id, mode, sampling, group_id, reward, min_version"
    assert client.query(f"SELECT {columns} FROM rollout_versions WHERE rollout_id = 'r7'").result_rows == [
        ("run", "train", "sampled", "g3", 1.0, 1)
    ]


def test_violations_are_counted_once_by_rule_and_version(client: Client) -> None:
    client.command(FILL_TRAJECTORIES.replace("{late}", "[0, 0]"))
    metadata = "map('rule', 'no-b', 'rules_version', '2', 'field', 'output', 'start', '3', 'end', '7', 'text', 'b')"
    client.command(
        "INSERT INTO rewards (reward_id, rollout_id, attempt_id, span_id, name, value, source, metadata, _offset, _ts) "
        f"SELECT concat('v', toString(number % 6)), concat('r', toString(number % 3)), 'a', 's', 'compliance', -0.5, "
        f"'compliance', {metadata}, number, '2026-11-21 00:00:00' FROM numbers(12)"
    )
    columns = "rule, rules_version, span_id, field, start, end, text, cost, run_id, version"
    rows = client.query(f"SELECT DISTINCT {columns} FROM violations").result_rows
    assert rows == [("no-b", "2", "s", "output", 3, 7, "b", 0.5, "run", 1)]
    assert client.query("SELECT * FROM violations_by_rule").result_rows == [("no-b", "2", "run", 1, 6, 3, 100, 3.0)]


def test_a_rollout_that_a_window_had_again_is_in_both_and_once_in_the_ledger(client: Client) -> None:
    def step(number: int, rollout_ids: str, again: str) -> str:
        return (
            f'{{"event": "step", "event_id": "s{number}", "run_id": "run", "step": {number}, "resource": "policy", '
            f'"version_in": {number}, "version_out": {number + 1}, "rollout_ids": {rollout_ids}, "again": {again}}}'
        )

    records = [step(1, '["a", "b"]', "[]"), step(2, '["c"]', '["a"]'), step(2, '["c"]', '["a"]')]
    rows = [[text, "run", {}, "training", 0, offset] for offset, text in enumerate(records)]
    client.insert("in_training", rows, ["raw", "key", "headers", "_topic", "_partition", "_offset"])
    members = client.query(
        "SELECT step, rollout_id, is_again FROM window_members ORDER BY step, rollout_id"
    ).result_rows
    assert members == [(1, "a", 0), (1, "b", 0), (2, "a", 1), (2, "c", 0)]
    ledger = client.query("SELECT rollout_id, step, times_trained FROM ledger ORDER BY rollout_id").result_rows
    assert ledger == [("a", 1, 1), ("b", 1, 1), ("c", 2, 1)]


def test_what_took_more_than_one_record_is_in_the_ledger_once(client: Client) -> None:
    """A step in parts, rollouts that were named between two steps, and a part that was sent again."""
    given: dict[str, Any] = {"run_id": "run", "resource": "policy", "version_in": 1}
    gone = {name: [DroppedRollout(rollout_id=name, reason="failed")] for name in "xyz"}
    metrics = {"rollouts/trained": 3.0, "rollouts/dropped": 2.0}
    part = RolloutsDecided(
        **given,
        step=1,
        version_out=2,
        event_id="s1-part1",
        part_of="s1",
        rollout_ids=["c"],
        again=["d"],
        dropped=gone["y"],
    )
    records = [
        RolloutsDecided(**given, step=1, version_out=1, event_id="early", dropped=gone["x"], offsets={"0": 3}),
        part,
        TrainingStep(**given, step=1, version_out=2, event_id="s1", rollout_ids=["a", "b"], metrics=metrics),
        RolloutsDecided(**given, step=1, version_out=1, event_id="f-part1", part_of="f", dropped=gone["z"]),
        part,
    ]
    rows = [[encode(each), "run", {}, "training", 0, offset] for offset, each in enumerate(records)]
    client.insert("in_training", rows, ["raw", "key", "headers", "_topic", "_partition", "_offset"])
    assert client.query("SELECT count() FROM dead_letters").result_rows == [(0,)]
    ledger = client.query("SELECT rollout_id, outcome, reason, step, version_out FROM ledger ORDER BY rollout_id")
    assert ledger.result_rows == [
        ("a", "trained", "", 1, 2), ("b", "trained", "", 1, 2), ("c", "trained", "", 1, 2),
        ("x", "dropped", "failed", 1, 1), ("y", "dropped", "failed", 1, 2), ("z", "dropped", "failed", 1, 1),
    ]  # fmt: skip
    members = client.query("SELECT rollout_id, is_again FROM window_members ORDER BY rollout_id").result_rows
    assert members == [("a", 0), ("b", 0), ("c", 0), ("d", 1)]
    assert client.query("SELECT step, rollouts, rollouts_dropped FROM steps").result_rows == [(1, 3, 2)]
    assert client.query("SELECT reason, rollouts FROM why_dropped").result_rows == [("failed", 3)]
    parts = client.query("SELECT DISTINCT event_id, part_of FROM training_events ORDER BY event_id").result_rows
    assert parts == [("early", ""), ("f-part1", "f"), ("s1", ""), ("s1-part1", "s1")]


def test_a_prompt_templates_text_is_a_column(client: Client) -> None:
    versions = [
        prompt_version("support", 1, "Answer {question}\n"),
        ResourceVersion(resource="policy", version=1, uri="file:///x", sha256="0" * 64),
    ]
    rows = [[encode(version).decode(), version.resource, {}, "resources", 0, at] for at, version in enumerate(versions)]
    client.insert("in_resources", rows, ["raw", "key", "headers", "_topic", "_partition", "_offset"])
    found = client.query("SELECT resource, kind, content, extra FROM resources ORDER BY resource").result_rows
    assert found == [("policy", "weights", "", {}), ("support", "prompt_template", "Answer {question}\n", {})]
    assert client.query("SELECT count() FROM dead_letters").result_rows == [(0,)]
