"""otel_traces: the columns of the Collector's ClickHouse exporter, and what Grafana's plugin asks of them."""

from __future__ import annotations

from tests.consumers.otlp_encoding import (
    SPAN,
    START,
    TRACE,
    Record,
    event,
    integer,
    link,
    part,
    record,
    resource_spans,
    scope_spans,
    span,
    traces,
)
from tests.consumers.otlp_tables import Tables

COLUMNS = {
    "Timestamp": "DateTime64(9, 'UTC')",
    "TraceId": "String",
    "SpanId": "String",
    "ParentSpanId": "String",
    "TraceState": "String",
    "SpanName": "LowCardinality(String)",
    "SpanKind": "LowCardinality(String)",
    "ServiceName": "LowCardinality(String)",
    "ResourceAttributes": "Map(LowCardinality(String), String)",
    "ScopeName": "String",
    "ScopeVersion": "String",
    "SpanAttributes": "Map(LowCardinality(String), String)",
    "Duration": "UInt64",
    "StatusCode": "LowCardinality(String)",
    "StatusMessage": "String",
    "Events.Timestamp": "Array(DateTime64(9, 'UTC'))",
    "Events.Name": "Array(LowCardinality(String))",
    "Events.Attributes": "Array(Map(LowCardinality(String), String))",
    "Links.TraceId": "Array(String)",
    "Links.SpanId": "Array(String)",
    "Links.TraceState": "Array(String)",
    "Links.Attributes": "Array(Map(LowCardinality(String), String))",
}
"""Of the exporter's table, in its order; times are in UTC instead of the server's zone."""
BY_TRACE = """
WITH '{trace}' AS id,
    (SELECT min(Start) FROM otel_traces_trace_id_ts WHERE TraceId = id) AS trace_start,
    (SELECT max(End) + 1 FROM otel_traces_trace_id_ts WHERE TraceId = id) AS trace_end
SELECT TraceId AS traceID, SpanId AS spanID, ParentSpanId AS parentSpanID, ServiceName AS serviceName,
    SpanName AS operationName, multiply(toUnixTimestamp64Nano(Timestamp), 0.000001) AS startTime,
    multiply(Duration, 0.000001) AS duration,
    arrayMap(key -> map('key', key, 'value', SpanAttributes[key]), mapKeys(SpanAttributes)) AS tags,
    arrayMap(key -> map('key', key, 'value', ResourceAttributes[key]), mapKeys(ResourceAttributes)) AS serviceTags,
    if(StatusCode IN ('Error', 'STATUS_CODE_ERROR'), 2, 0) AS statusCode,
    arrayMap((name, timestamp, attributes) -> tuple(name, toString(toUnixTimestamp64Milli(timestamp)),
        arrayMap(key -> map('key', key, 'value', attributes[key]), mapKeys(attributes)))
            ::Tuple(name String, timestamp String, fields Array(Map(String, String))),
        Events.Name, Events.Timestamp, Events.Attributes) AS logs,
    arrayMap((traceID, spanID, attributes) -> tuple(traceID, spanID,
        arrayMap(key -> map('key', key, 'value', attributes[key]), mapKeys(attributes)))
            ::Tuple(traceID String, spanID String, tags Array(Map(String, String))),
        Links.TraceId, Links.SpanId, Links.Attributes) AS references,
    SpanKind AS kind, StatusMessage AS statusMessage, TraceState AS traceState
FROM otel_traces
WHERE traceID = id AND Timestamp >= trace_start AND Timestamp <= trace_end
"""
SEARCH = """
SELECT TraceId AS traceID, ServiceName AS serviceName, SpanName AS operationName, Timestamp AS startTime,
    multiply(Duration, 0.000001) AS duration
FROM otel_traces
WHERE (Timestamp >= fromUnixTimestamp64Milli({lo}) AND Timestamp <= fromUnixTimestamp64Milli({hi}))
    AND ParentSpanId = '' AND Duration > 0 AND ServiceName IN ('agent') AND SpanName ILIKE '%chat%'
ORDER BY Timestamp DESC, Duration DESC
LIMIT 1000
"""


def chat(**more: bytes) -> bytes:
    status = part(15, part(2, b"slow") + integer(3, 2))
    return span(
        {"gen_ai.request.model": "asked", "gen_ai.response.model": "answered", "fulgurite.rollout_id": "r1"},
        name="chat m",
        kind=3,
        end=START + 2_000_000,
        events=[event("e", {"n": 1}, START + 1_000_000)],
        links=[link({"why": "x"}, b"\x01" * 16, b"\x02" * 8)],
        more=part(3, b"vendor=1") + status,
    )


def sent(*spans: bytes) -> bytes:
    return traces(resource_spans({"service.name": "agent"}, scope_spans(spans, "lib", "1.2", {"build": 7})))


def test_the_columns_are_those_of_the_exporter(tables: Tables) -> None:
    query = "SELECT name, type FROM system.columns WHERE database = currentDatabase() AND table = 'otel_traces'"
    assert tables.client.query(query + " ORDER BY position").result_rows == list(COLUMNS.items())


def test_a_scope_stays_with_its_spans(tables: Tables) -> None:
    tables.insert([Record(1, sent(chat())), Record(2, sent(span({"deep": [[[1]]]}))), Record(3, record(span()))])
    first, mended, without = tables.rows("spans")
    for row in (first, mended):
        assert (row["attributes"]["otel.scope.name"], row["attributes"]["otel.scope.version"]) == ("lib", "1.2")
        assert row["resource_attributes"] == {"service.name": "agent", "otel.scope.build": "7"}
    assert not [name for name in without["attributes"] | without["resource_attributes"] if "scope" in name]
    query = "SELECT ScopeName, ScopeVersion, mapKeys(SpanAttributes) FROM otel_traces WHERE SpanName = 'chat m'"
    ((name, version, keys),) = tables.client.query(query).result_rows
    assert (name, version) == ("lib", "1.2")
    assert not [key for key in keys if key.startswith("otel.scope")], "they have columns of their own"


def test_a_trace_as_grafana_asks_for_it(tables: Tables) -> None:
    twice = Record(2, sent(chat()))
    tables.insert([Record(1, sent(chat())), twice, Record(3, sent(span(trace=b"\x07" * 16)))])
    found = list(tables.client.query(BY_TRACE.format(trace=TRACE.hex())).named_results())
    assert len(found) == 1, "a span that was sent twice counts once"
    (row,) = found
    tags = {tag["key"]: tag["value"] for tag in row.pop("tags")}
    assert (tags["gen_ai.request.model"], tags["gen_ai.response.model"]) == ("asked", "answered")
    assert tags["fulgurite.rollout_id"] == "r1"
    assert {tag["key"]: tag["value"] for tag in row.pop("serviceTags")}["service.name"] == "agent"
    assert row.pop("startTime") == START / 1e6
    assert row == {
        "traceID": TRACE.hex(),
        "spanID": SPAN.hex(),
        "parentSpanID": "",
        "serviceName": "agent",
        "operationName": "chat m",
        "duration": 2.0,
        "statusCode": 2,
        "logs": [{"name": "e", "timestamp": str(START // 10**6 + 1), "fields": [{"key": "n", "value": "1"}]}],
        "references": [{"traceID": "01" * 16, "spanID": "02" * 8, "tags": [{"key": "why", "value": "x"}]}],
        "kind": "Client",
        "statusMessage": "slow",
        "traceState": "vendor=1",
    }


def test_a_search_as_grafana_asks_it(tables: Tables) -> None:
    later = span(name="chat later", start=START + 10**10, end=START + 10**10 + 5)
    tables.insert([Record(1, sent(chat(), later, span(name="other"))), Record(2, sent(chat()))])
    lo, hi = START // 10**6 - 1, START // 10**6 + 5_000
    rows = tables.client.query(SEARCH.format(lo=lo, hi=hi)).result_rows
    assert [row[2] for row in rows] == ["chat m"]
    rows = tables.client.query(SEARCH.format(lo=lo, hi=hi + 10_000)).result_rows
    assert [row[2] for row in rows] == ["chat later", "chat m"]


def test_filters_reach_the_table_and_its_indexes(tables: Tables) -> None:
    """On the spans themselves; and where other copies are looked for, twice, the trace does."""
    tables.insert([Record(1, sent(chat()))])
    for query, index, sides in (
        (BY_TRACE.format(trace=TRACE.hex()), "Name: traces", 3),
        (SEARCH.format(lo=0, hi=1), "Name: start_times", 1),
    ):
        plan = "\n".join(str(row[0]) for row in tables.client.query(f"EXPLAIN indexes = 1 {query}").result_rows)
        assert plan.count(index) == sides, plan
