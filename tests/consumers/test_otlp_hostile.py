"""OTLP nobody should send, through the materialiser's insert: right rows, or dead letters with the reason."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import pytest

from fulgurite.consumers.materialiser.blocks import Unreadable
from fulgurite.consumers.otlp.spans import MAX_DEPTH
from tests.consumers.otlp_encoding import (
    SPAN,
    START,
    TRACE,
    Record,
    attributes,
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

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "parts": [{"type": "text", "content": "Weather in Paris?"}]},
    {
        "role": "assistant",
        "parts": [
            {
                "type": "tool_call",
                "arguments": {"place": {"city": "Paris", "box": [[1, -2.5], [True, None], [], {}]}, "raw": b"\x00\xff"},
            }
        ],
    },
]
"""gen_ai.input.messages in its structured form, seven containers deep."""
AS_JSON = json.loads(json.dumps(MESSAGES, default=lambda raw: base64.b64encode(raw).decode()))


def test_values_are_right_at_any_depth_wherever_they_stand(tables: Tables) -> None:
    value = record(
        span(
            {"gen_ai.input.messages": MESSAGES, "plain": 1},
            events=[event("e", {"m": MESSAGES})],
            links=[link({"m": MESSAGES})],
        ),
        span({"flat": [1, 2]}),
        resource={"m": MESSAGES},
    )
    tables.insert([Record(0, record(span({"before": "x"}))), Record(1, value), Record(2, record(span()))])
    rows = tables.rows("spans")
    assert [(row["_offset"], row["_index"]) for row in rows] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    deep = rows[1]
    for text in (
        deep["input"],
        deep["attributes"]["gen_ai.input.messages"],
        deep["events"][0]["attributes"]["m"],
        deep["links"][0]["attributes"]["m"],
        deep["resource_attributes"]["m"],
    ):
        assert json.loads(text) == AS_JSON
    assert (deep["attributes"]["plain"], rows[2]["attributes"]["flat"]) == ("1", "[1,2]")
    assert not tables.rows("dead_letters")


def test_both_ways_to_read_a_value_give_the_same_row(tables: Tables) -> None:
    values: dict[str, Any] = {
        "text": 'ä"\\\n/',
        "min": -(2**63),
        "max": 2**63 - 1,
        "half": 0.5,
        "huge": 1e300,
        "no": False,
        "raw": b"\x00\xff",
        "none": None,
        "list": ["a", 1, 0.5, True, None, b"x", [1], {"k": "v"}],
        "map": {"a": {"b": 1}, "c": ["d"], "ü": "/"},
        "fulgurite.response_token_ids": [1, 2],
        "fulgurite.logprobs": [-0.5, -1.0],
        "gen_ai.response.finish_reasons": ["stop"],
    }
    tables.insert([Record(1, record(span(values)))])
    tables.insert([Record(2, record(span(values), span({"deep": [[[1]]]})))])
    read, mended, _ = tables.rows("spans")
    for row in (read, mended):
        for name in ("list", "map"):
            row["attributes"][name] = json.loads(row["attributes"][name])
    same = read.keys() - {"_offset", "_ingested"}
    assert {name: read[name] for name in same} == {name: mended[name] for name in same}
    assert (read["response_token_ids"], read["logprobs"], read["finish_reason"]) == ([1, 2], [-0.5, -1.0], "stop")


def test_what_is_too_deep_for_anybody_is_kept_as_base64(tables: Tables) -> None:
    value: Any = "x"
    for _ in range(MAX_DEPTH + 2):
        value = [value]
    text = tables.row(record(span({"deep": value})))["attributes"]["deep"]
    inner = json.loads(text)
    for _ in range(MAX_DEPTH):
        (inner,) = inner
    assert b"x" in base64.b64decode(inner)


def test_a_span_that_cannot_be_read_leaves_the_others_alone(tables: Tables) -> None:
    broken = span(more=part(9, part(1, b"key") + part(2, b"\x0a\xff")))
    bad_scope = part(1, b"\x0a\xff") + part(2, span(name="of a broken scope"))
    value = traces(
        resource_spans({"service.name": "a"}, scope_spans([span(name="0"), broken, span(name="2")]), bad_scope),
        part(1, b"\x0a\xff") + part(2, scope_spans([span(name="of a broken resource")])),
        resource_spans({"service.name": "b"}, scope_spans([span(name="5")])),
    )
    tables.insert([Record(3, value), Record(4, record(span(name="later")))])
    found = [(row["_offset"], row["_index"], row["name"], row["service"]) for row in tables.rows("spans")]
    assert found == [(3, 0, "0", "a"), (3, 2, "2", "a"), (3, 5, "5", "b"), (4, 0, "later", "")]
    dead = tables.rows("dead_letters")
    assert [(row["_index"], row["reason"], row["message"]) for row in dead] == [
        (1, "bad_field", "the span cannot be read: attributes: value: a number is cut off"),
        (3, "bad_field", "the span cannot be read: scope: a number is cut off"),
        (4, "bad_field", "the span cannot be read: resource: a number is cut off"),
    ]
    assert bytes.fromhex(dead[0]["value"]) == broken, "the client shows bytes that are no text as hex"


def test_fields_are_read_as_protobuf_says(tables: Tables) -> None:
    twice = part(9, part(1, b"twice") + part(2, part(1, b"a") + integer(3, 7)))
    row = tables.row(record(span({"x": "y"}, more=twice + integer(1, 5) + integer(6, 2**40 + 3))))
    assert row["attributes"] == {"x": "y", "twice": "7"}
    assert (row["trace_id"], row["kind"]) == (TRACE.hex(), "client")


def test_of_a_name_that_stands_twice_the_first_counts(tables: Tables) -> None:
    more = attributes(9, {"gen_ai.agent.name": "second"})
    row = tables.row(record(span({"gen_ai.agent.name": "first"}, more=more)))
    assert row["agent"] == "first"
    query = "SELECT attributes['gen_ai.agent.name'] FROM spans"
    assert tables.client.query(query).result_rows == [("first",)]


def test_a_text_that_is_no_unicode_is_a_row_with_its_bytes(tables: Tables) -> None:
    values = part(9, part(1, b"bad") + part(2, part(1, b"a\xff\xfeb")))
    tables.insert([Record(1, record(span({"good": "ä"}, more=values), span({"deep": [[["x"]]]}, more=values)))])
    query = "SELECT hex(attributes['bad']) FROM spans"
    assert tables.client.query(query).result_rows == [("61FFFE62",)] * 2


def test_ids_of_any_length_and_none(tables: Tables) -> None:
    tables.insert([Record(1, record(span(trace=b""), span(trace=b"\x01"), span(span_id=b"\x02" * 20)))])
    found = [(row["trace_id"], row["span_id"]) for row in tables.rows("spans")]
    assert found == [("", SPAN.hex()), ("01", SPAN.hex()), (TRACE.hex(), "02" * 20)]


def test_ten_thousand_spans_in_a_record(tables: Tables) -> None:
    spans = [span({"n": at}, span_id=at.to_bytes(8, "big")) for at in range(1, 10_001)]
    tables.insert([Record(1, record(*spans)), Record(2, record(*spans, span({"deep": [[[1]]]})))])
    query = "SELECT _offset, count(), uniqExact(_index), max(_index) FROM spans GROUP BY _offset ORDER BY _offset"
    assert tables.client.query(query).result_rows == [(1, 10_000, 10_000, 9_999), (2, 10_001, 10_001, 10_000)]


@pytest.mark.parametrize("key", [None, b"", TRACE.hex().encode(), b"rollout-1", b"\xff\x00"])
def test_any_key(tables: Tables, key: bytes | None) -> None:
    tables.insert([Record(1, record(span({"fulgurite.rollout_id": "r"}), span(span_id=b"")), key)])
    assert [row["rollout_id"] for row in tables.rows("spans")] == ["r"]
    query = "SELECT hex(key) FROM dead_letters"
    assert tables.client.query(query).result_rows == [((key or b"").hex().upper(),)]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (gzip.compress(record(span()), mtime=0), r"compressed \(gzip\)"),
        (b"\x28\xb5\x2f\xfd" + record(span()), r"compressed \(zstd\)"),
        (record(span({"a": "b" * 300}))[:-200], "cut off"),
        (b"Hello", "wire type|cut off"),
    ],
)
def test_a_record_without_spans_to_tell_apart_is_refused_whole(tables: Tables, value: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        tables.insert([Record(1, value)])
    assert not tables.rows("spans")


def test_logs_in_the_topic_of_spans_are_dead_letters(tables: Tables) -> None:
    """They have the same outer messages."""
    log = b"\x09" + START.to_bytes(8, "little") + integer(2, 9) + part(5, part(1, b"body"))
    tables.insert([Record(1, record(log))])
    assert not tables.rows("spans")
    assert [row["message"] for row in tables.rows("dead_letters")] == ["span_id: must not be empty"]


def otlp_json(*spans: Any, scope: Any = None, resource: Any = None) -> bytes:
    tree = {"resource": resource or {}, "scopeSpans": [{"scope": scope or {}, "spans": spans}]}
    return json.dumps({"resourceSpans": [tree]}).encode()


def json_span(**more: Any) -> dict[str, Any]:
    times = {"startTimeUnixNano": str(START), "endTimeUnixNano": START + 5}
    return {"traceId": TRACE.hex(), "spanId": SPAN.hex(), "name": "j", **times, **more}


def test_json_ids_and_numbers_in_any_spelling(tables: Tables) -> None:
    ids = {"traceId": base64.b64encode(TRACE).decode(), "spanId": base64.b64encode(SPAN).decode()}
    numbers = [
        {"key": "text", "value": {"intValue": "-9223372036854775808"}},
        {"key": "number", "value": {"intValue": 5}},
        {"key": "whole", "value": {"intValue": 5.0}},
        {"key": "nan", "value": {"doubleValue": "NaN"}},
        {"key": "deep", "value": {"arrayValue": {"values": [{"arrayValue": {"values": [{"arrayValue": {}}]}}]}}},
        {"key": "bytes", "value": {"bytesValue": "_-8"}},
    ]
    tables.insert([Record(1, otlp_json(json_span(), json_span(**ids, attributes=numbers)))])
    plain, other = tables.rows("spans")
    assert (plain["trace_id"], plain["span_id"]) == (other["trace_id"], other["span_id"]) == (TRACE.hex(), SPAN.hex())
    assert (plain["start_ns"], plain["end_ns"]) == (START, START + 5)
    assert other["attributes"] == {
        "text": "-9223372036854775808",
        "number": "5",
        "whole": "5",
        "nan": "nan",
        "deep": "[[[]]]",
        "bytes": "/+8=",
    }


def test_a_bad_span_of_json_leaves_the_others_alone(tables: Tables) -> None:
    deep: Any = {"stringValue": "x"}
    for _ in range(200):
        deep = {"arrayValue": {"values": [deep]}}
    bad: list[Any] = [
        json_span(traceId="xyz"),
        json_span(startTimeUnixNano="1.5"),
        json_span(kind=True),
        json_span(attributes={"a": 1}),
        json_span(attributes=[{"key": "deep", "value": deep}]),
        None,
        5,
    ]
    tables.insert([Record(1, otlp_json(json_span(), *bad, json_span()))])
    assert [row["_index"] for row in tables.rows("spans")] == [0, len(bad) + 1]
    dead = tables.rows("dead_letters")
    assert [row["_index"] for row in dead] == list(range(1, len(bad) + 1))
    assert all(row["message"].startswith("the span cannot be read: ") for row in dead)
    assert [row["message"].removeprefix("the span cannot be read: ").split(":")[0] for row in dead] == [
        "traceId",
        "startTimeUnixNano",
        "kind",
        "attributes",
        "attributes",
        "an object is needed, not NoneType",
        "an object is needed, not int",
    ]
    assert json.loads(dead[0]["value"]) == bad[0]


def test_a_bad_resource_or_scope_of_json_takes_its_own_spans_only(tables: Tables) -> None:
    bad = {"attributes": [{"key": 5}]}
    tables.insert([Record(1, otlp_json(json_span(), resource=bad)), Record(2, otlp_json(json_span(), scope=bad))])
    tables.insert([Record(3, otlp_json(json_span()))])
    assert [row["_offset"] for row in tables.rows("spans")] == [3]
    assert [row["message"].split(": ")[1] for row in tables.rows("dead_letters")] == [
        "resource.attributes.key",
        "scope.attributes.key",
    ]


def test_a_repetition_of_mended_records_is_refused_by_its_token(tables: Tables) -> None:
    records = [Record(1, record(span({"deep": [[[1]]]}), span(span_id=b"")))]
    for _ in range(2):
        tables.insert(records, token="one")
    assert (len(tables.rows("spans")), len(tables.rows("dead_letters"))) == (1, 1)
