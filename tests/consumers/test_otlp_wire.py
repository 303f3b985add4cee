"""OTLP in Python: batches around untouched bytes, JSON as protobuf, decoding; and bytes that are none of it."""

from __future__ import annotations

import contextlib
import gzip
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.consumers.otlp.batches import MalformedRecords, body, otlp, scopes
from fulgurite.consumers.otlp.mend import mended
from fulgurite.consumers.otlp.spans import decode
from fulgurite.consumers.otlp.to_json import to_json
from fulgurite.consumers.otlp.wire import Malformed, fields, read_varint
from tests.consumers.otlp_encoding import Record, event, link, record, resource_spans, scope_spans, span, traces

TWO_SCOPES = traces(
    resource_spans({"r": 1}, scope_spans([span(), span()]), scope_spans([]), scope_spans([span()])),
    resource_spans({"r": 2}, scope_spans([span()])),
)


def messages(data: bytes) -> list[dict[int, Any]]:
    """Length-delimited messages, each as field number -> value."""
    at, found = 0, list[dict[int, Any]]()
    while at < len(data):
        length, at = read_varint(data, at, len(data))
        found.append(
            {
                number: start if kind == 0 else bytes(data[start:stop])
                for number, kind, start, stop in fields(data, at, at + length)
            }
        )
        at += length
    return found


def test_spans_travel_unchanged_with_the_number_of_the_first_of_each_scope() -> None:
    batches = messages(
        body("otlp_spans", 3, [Record(7, TWO_SCOPES, b"key"), Record(8, record(span()))], lambda o: o % 4)
    )
    assert [(b[1], b[2], b[3], b[5], b[6], b[7]) for b in batches] == [
        (b"otlp_spans", 3, 7, b"key", 3, 0),
        (b"otlp_spans", 3, 7, b"key", 3, 2),
        (b"otlp_spans", 3, 7, b"key", 3, 3),
        (b"otlp_spans", 3, 8, b"k", 0, 0),
    ]
    assert batches[0][9] == scope_spans([span(), span()])


def test_the_numbers_are_those_of_the_decoder() -> None:
    assert [(s.index, s.resource["r"]) for s in decode(TWO_SCOPES)] == [(0, 1), (1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "no value"),
        (b"", "no value"),
        (b"\x0a", "cut off"),
        (b"\x0a\x05\x12\x01", "cut off"),
        (record(span())[:-1], "cut off"),
        (traces(resource_spans({}, scope_spans([]))), "no spans"),
        (b"\x0b", "wire type"),
        (b"\x00\x00", "number 0"),
        (b"{", "no JSON"),
        (b"{}", "no spans"),
        (b'{"resourceSpans": 1}', "resourceSpans: a list is needed"),
        (b'{"resourceSpans": [5]}', "resourceSpans: an object is needed"),
        (b'{"resourceSpans": [{"scopeSpans": {}}]}', "no spans"),
        (b'{"resourceSpans": [{"scopeSpans": 5}]}', "scopeSpans: a list is needed"),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": 5}]}]}', "scopeSpans: spans: a list is needed"),
        (gzip.compress(b"{}", mtime=0), "compressed"),
        (b'{"resourceSpans":' + b"[" * 2_000, "no JSON"),
    ],
)
def test_what_is_no_traces_data_is_refused(value: bytes | None, what: str) -> None:
    with pytest.raises(Malformed, match=what):
        body("otlp_spans", 0, [Record(0, value)], lambda _: 3)


@pytest.mark.parametrize("mend", [False, True])
def test_all_records_of_a_batch_that_are_refused_are_named_at_once(mend: bool) -> None:
    values = [record(span()), b"[zipkin]", record(), record(span()), b"Hello"]
    with pytest.raises(MalformedRecords) as caught:
        body("otlp_spans", 0, [Record(10 + at, value) for at, value in enumerate(values)], lambda _: 3, mend=mend)
    assert list(caught.value.why) == [11, 12, 14]
    assert caught.value.why[12] == "the record has no spans"


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda junk: record(span({"a": 1})) + junk))
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_worse_than_being_refused(data: bytes) -> None:
    for read in (lambda: scopes(otlp(data)), lambda: decode(otlp(data)), lambda: decode(mended(otlp(data)))):
        with contextlib.suppress(Malformed):
            read()


@given(st.integers(0, 2_000), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_broken_byte_does_no_worse_either(place: int, byte: int) -> None:
    data = bytearray(
        record(span({"a": [1, {"b": "c"}]}, events=[event("e", {})], links=[link({})]), span({"x": "y" * 300}))
    )
    data[place % len(data)] = byte
    for read in (lambda: scopes(otlp(bytes(data))), lambda: decode(otlp(bytes(data)))):
        with contextlib.suppress(Malformed):
            read()
    with contextlib.suppress(Malformed):
        assert mended(mended(bytes(data))) == mended(bytes(data))


def test_what_needs_no_mending_stays_what_it_was() -> None:
    assert decode(mended(TWO_SCOPES)) == decode(TWO_SCOPES)
    assert [(at, bytes(part)) for at, _, part in scopes(mended(TWO_SCOPES))] == [
        (at, bytes(part)) for at, _, part in scopes(TWO_SCOPES)
    ]


def test_json_says_the_same_as_protobuf() -> None:
    values = [
        {"key": "text", "value": {"stringValue": "ä"}},
        {"key": "big", "value": {"intValue": "-9007199254740993"}},
        {"key": "small", "value": {"intValue": 3}},
        {"key": "half", "value": {"doubleValue": 0.5}},
        {"key": "yes", "value": {"boolValue": True}},
        {"key": "bytes", "value": {"bytesValue": "AP8="}},
        {"key": "list", "value": {"arrayValue": {"values": [{"stringValue": "a"}, {}]}}},
        {"key": "map", "value": {"kvlistValue": {"values": [{"key": "k", "value": {"intValue": "1"}}]}}},
    ]
    one = {
        "traceId": "0AF7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "parentSpanId": "",
        "name": "chat",
        "kind": "SPAN_KIND_CLIENT",
        "startTimeUnixNano": "1700000000000000001",
        "endTimeUnixNano": 1700000000000000002,
        "attributes": values,
        "events": [{"name": "e", "timeUnixNano": "5", "attributes": values[:1]}],
        "links": [{"traceId": "00" * 16, "spanId": "01" * 8, "attributes": values[:1]}],
        "status": {"code": 2, "message": "no"},
        "unknown": {"of": "a later version"},
    }
    scope = {"scope": {"name": "s", "version": "1"}, "spans": [one]}
    tree = {"resourceSpans": [{"resource": {"attributes": values[:1]}, "scopeSpans": [scope]}]}
    (found,) = decode(otlp(json.dumps(tree).encode()))
    assert (found.trace_id, found.span_id, found.parent_span_id) == (
        "0af7651916cd43dd8448eb211c80319c",
        "b7ad6b7169203331",
        "",
    )
    assert (found.name, found.kind, found.status, found.status_message) == ("chat", 3, 2, "no")
    assert (found.start_ns, found.end_ns) == (1700000000000000001, 1700000000000000002)
    assert (found.scope_name, found.scope_version, found.resource) == ("s", "1", {"text": "ä"})
    assert found.attributes == {
        "text": "ä",
        "big": -9007199254740993,
        "small": 3,
        "half": 0.5,
        "yes": True,
        "bytes": b"\x00\xff",
        "list": ["a", None],
        "map": {"k": 1},
    }
    assert (found.events[0].time_ns, found.events[0].attributes) == (5, {"text": "ä"})
    assert (found.links[0].span_id, found.links[0].attributes) == ("01" * 8, {"text": "ä"})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (rb"a\ud83d", "a\ufffd"),
        (rb"\ude00\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\ud83d\ud83d\ude00\\ud83d\"", '\ufffd\U0001f600\\ud83d"'),
        (b"a\xff\\uDBFF\n", None),
        (b"a\xff\\uDBFF", "a\ufffd\ufffd"),
    ],
)
def test_text_that_is_no_unicode_is_replaced_as_in_protobuf(text: bytes, wanted: str | None) -> None:
    value = b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"name":"%s"},{"name":"n"}]}]}]}' % text
    if wanted is None:
        with pytest.raises(Malformed, match="no JSON"):
            otlp(value)
        return
    assert [one.name for one in decode(otlp(value))] == [wanted, "n"]


def test_an_integer_that_no_int64_holds_stays_what_it_is() -> None:
    def spans_of(value: Any) -> list[Any]:
        attributes = [{"key": "a", "value": {"intValue": value}}]
        tree = {"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "01" * 8, "attributes": attributes}]}]}]}
        return decode(otlp(json.dumps(tree).encode()))

    for value, wanted in ((2**63 - 1, 2**63 - 1), (str(2**64 - 1), str(2**64 - 1)), (2**63, str(2**63)), (-1, -1)):
        (one,) = spans_of(value)
        assert one.attributes == {"a": wanted}
    (broken,) = spans_of(str(2**64))
    assert (broken.span_id, broken.status_message) == (
        "",
        "the span cannot be read: attributes.value.intValue: the number does not fit into 64 bits",
    )


def test_as_json_and_back_a_record_is_the_same() -> None:
    values = {
        "text": 'ü"\n',
        "empty": "",
        "none": None,
        "yes": True,
        "least": -(2**63),
        "double": 0.1,
        "endless": float("inf"),
        "bytes": b"\x00\xff",
        "list": [1, [2, {"x": [b"y"]}], None],
        "tree": {"a": {"b": {"c": []}}, "d": {}},
    }
    one = span(values, events=[event("e", values, 2**64 - 1)], links=[link(values)], kind=77)
    scope = scope_spans([one, span()], "scope", "2", {"s": 1})
    value = traces(resource_spans(values, scope, scope_spans([])), resource_spans({"r": 2}, scope_spans([span()])))
    assert decode(otlp(to_json(value))) == decode(value)
    for number, wanted in enumerate(decode(value)):
        (alone,) = decode(otlp(to_json(value, number)))
        wanted.index = 0
        assert alone == wanted
    assert scopes(otlp(to_json(value, 1)))[0][1] == scopes(value)[0][1], "attributes of its scope are there, too"


def test_a_value_as_deep_as_may_be_is_written_as_json_and_a_deeper_one_is_not() -> None:
    value: Any = "x"
    for _ in range(63):
        value = {"k": value}
    assert decode(otlp(to_json(record(span({"a": value}))))) == decode(record(span({"a": value})))
    with pytest.raises(Malformed, match="nested too deeply"):
        to_json(record(span({"a": {"b": {"c": value}}})))
