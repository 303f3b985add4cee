"""OTLP through the real engine: records become rows of `spans`, and dead letters."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from clickhouse_connect.driver.exceptions import DatabaseError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fulgurite.consumers.otlp import batches
from fulgurite.consumers.otlp.rollout import attempt_of
from fulgurite.consumers.otlp.spans import decode
from tests.consumers.otlp_encoding import (
    START,
    Record,
    event,
    fixed,
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

DATA = Path(__file__).parents[1] / "data" / "otlp"


def recorded(encoding: str) -> list[Record]:
    """What a Collector wrote: see tests/data/otlp/README.md."""
    lines = (DATA / f"{encoding}.txt").read_text().splitlines()
    pairs = [line.split(" ") for line in lines]
    return [Record(at, base64.b64decode(value), key.encode()) for at, (key, value) in enumerate(pairs)]


@pytest.mark.parametrize("encoding", ["otlp_proto", "otlp_json"])
def test_what_a_real_collector_wrote(tables: Tables, encoding: str) -> None:
    tables.insert(recorded(encoding))
    rows = {row["name"]: row for row in tables.rows("spans")}
    assert len(rows) == 9
    assert not tables.rows("dead_letters")
    chat = rows["chat m"]
    assert (chat["rollout_id"], chat["attempt_id"], chat["sequence_id"]) == ("ro-1", "at-1", 4)
    assert (chat["kind"], chat["status"], chat["service"], chat["operation"]) == ("client", "ok", "agent", "chat")
    assert (chat["model"], chat["endpoint"], chat["finish_reason"]) == ("m-2026", "api.example.com", "stop")
    assert (chat["input_tokens"], chat["output_tokens"]) == (12, 3)
    assert json.loads(chat["input"])[0]["parts"][0]["content"] == "1+1?"
    assert json.loads(chat["output"])[0]["role"] == "assistant"
    assert (chat["prompt_token_ids"], chat["response_token_ids"], chat["logprobs"]) == (
        [1, 2, 3],
        [4, 5],
        [-0.5, -0.25],
    )
    assert chat["attributes"]["otel.scope.name"] == "recorder"
    assert chat["attributes"]["gen_ai.usage.input_tokens"] == "12"
    assert "prompt_token_ids" not in chat["attributes"]
    assert chat["resource_attributes"]["telemetry.sdk.language"] == "python"
    assert chat["events"][0]["name"] == "gen_ai.evaluation.result"
    assert chat["events"][0]["attributes"]["gen_ai.evaluation.score.value"] == "0.75"
    agent = rows["invoke_agent"]
    assert (agent["agent"], agent["span_id"], agent["trace_id"]) == ("solver", chat["parent_span_id"], chat["trace_id"])
    tool = rows["calculator"]
    assert (tool["operation"], tool["input"], tool["output"]) == ("execute_tool", "1+1", "2")
    assert (tool["status"], tool["status_message"]) == ("error", "slow")
    older = rows["openai.chat"]
    assert (older["rollout_id"], older["attempt_id"], older["operation"]) == ("ro-2", "at-2", "chat")
    assert (older["input_tokens"], older["output_tokens"], older["finish_reason"]) == (7, 2, "stop")
    assert json.loads(older["input"]) == {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "hi"}
    inference = rows["LLM"]
    assert (inference["rollout_id"], inference["operation"], inference["model"]) == ("ro-3", "chat", "oi")
    assert (inference["input_tokens"], inference["output_tokens"]) == (5, 6)
    linked = rows["linked"]
    assert (linked["rollout_id"], linked["attempt_id"]) == ("ro-4", "at-4")
    assert (linked["links"][0]["trace_id"], linked["links"][0]["span_id"]) == ("11" * 16, "22" * 8)


def test_values_as_text(tables: Tables) -> None:
    tables.insert(recorded("otlp_proto"))
    (plain,) = tables.rows("spans", "name = 'plain'")
    assert plain["rollout_id"] == ""
    own = {k: v for k, v in plain["attributes"].items() if not k.startswith("otel.") and k != "nested"}
    assert own == {
        "zero": "0",
        "no": "false",
        "half": "0.5",
        "names": '["a","b"]',
        "counts": "[1,2]",
        "flags": "[true,false]",
        "empty": "",
        "none": "[]",
        "raw": "AP8=",
    }
    assert json.loads(plain["attributes"]["nested"]) == {"list": [{"role": "user"}], "a": {"b": [1, {"c": "d"}]}}
    traced = tables.client.query("SELECT SpanName, ServiceName FROM otel_traces WHERE SpanName = 'plain'").result_rows
    assert list(traced) == [("plain", "agent")]


def test_the_place_of_a_span_counts_over_the_whole_record(tables: Tables) -> None:
    value = traces(
        resource_spans(
            {"service.name": "a"}, scope_spans([span(name="0"), span(name="1")]), scope_spans([span(name="2")])
        ),
        resource_spans({"service.name": "b"}, scope_spans([span(name="3")], "scope", "1")),
    )
    tables.insert([Record(5, value)])
    found = [(r["_offset"], r["_index"], r["name"], r["service"]) for r in tables.rows("spans")]
    assert found == [(5, 0, "0", "a"), (5, 1, "1", "a"), (5, 2, "2", "a"), (5, 3, "3", "b")]


def test_a_span_that_cannot_be_used_is_a_dead_letter_and_the_others_are_rows(tables: Tables) -> None:
    bad = [
        (span({"why": "x"}, span_id=b""), "span_id: must not be empty"),
        (span(start=START, end=START - 1), "end_time_unix_nano: is before start_time_unix_nano"),
        (span(start=2**63, end=2**63), "start_time_unix_nano, end_time_unix_nano: must be below 2^63"),
        (span(events=[event("e", {}), event("e", {}, 2**64 - 1)]), "events: time_unix_nano: must be below 2^63"),
    ]
    tables.insert([Record(9, record(span(), *(value for value, _ in bad), span()))])
    assert [row["_index"] for row in tables.rows("spans")] == [0, 5]
    dead = tables.rows("dead_letters")
    assert [(d["_offset"], d["_index"], d["reason"], d["message"]) for d in dead] == [
        (9, at + 1, "bad_field", message) for at, (_, message) in enumerate(bad)
    ]
    (kept,) = json.loads(dead[0]["value"])["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert kept["attributes"] == [{"key": "why", "value": {"stringValue": "x"}}]
    (late,) = json.loads(dead[3]["value"])["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert int(late["events"][1]["timeUnixNano"]) == 2**64 - 1
    assert (dead[0]["stage"], dead[0]["key"], dead[0]["topic"]) == ("materialiser", "k", "otlp_spans")


HOSTILE = 'q"uo,"kvlist_value":""}\\ é\n'
EVERY_KIND: dict[str, Any] = {
    "text": HOSTILE,
    "whole": -5,
    "yes": True,
    "no": False,
    "half": 0.5,
    "zero": 0,
    "empty": "",
    "none": None,
    "list": ["a", 1, [True, 2.5, None]],
    "map": {"a": {"b": 1}, "c": []},
    HOSTILE: {},
    "time": '{"time":',
    "raw": b'\x00\xff"\n\\\xe2\x80\xa8\x1f',
    "raws": [b"\xfe", {"q": b'\x01","array_value":'}],
    "gen_ai.usage.input_tokens": 7,
}
FEW_KINDS: dict[str, Any] = {name: EVERY_KIND[name] for name in ("text", "whole", "yes", "half", "raw", "none")}


@pytest.mark.parametrize("wrong", [{"end": START - 1}, {"start": 2**63, "end": 2**63}, {"span_id": b""}])
def test_a_dead_letter_is_the_whole_span_ready_to_be_sent_again(tables: Tables, wrong: dict[str, Any]) -> None:
    def value(**changes: Any) -> bytes:
        more = part(15, part(2, b"boom") + integer(3, 2)) + part(3, b"vendor=x") + integer(10, 3) + part(4, b"parent!!")
        events = [event("e", FEW_KINDS), event("other", {})]
        one = span(EVERY_KIND, kind=3, events=events, links=[link(FEW_KINDS)], more=more, **changes)
        scope = scope_spans([span(name="another"), one], "scope", "1", {"of": "the scope"})
        return traces(resource_spans({**FEW_KINDS, "service.name": "s"}, scope))

    tables.insert([Record(1, value()), Record(2, value(**wrong))])
    (dead,) = tables.rows("dead_letters")
    kept = json.loads(dead["value"])
    (mended,) = kept["resourceSpans"][0]["scopeSpans"][0]["spans"]
    mended |= {"startTimeUnixNano": str(START), "endTimeUnixNano": str(START + 1_000), "spanId": bytes(range(8)).hex()}
    tables.insert([Record(3, json.dumps(kept).encode())])
    _, good, _, again = tables.rows("spans")
    same = good.keys() - {"_offset", "_index", "_ingested"}
    assert {name: again[name] for name in same} == {name: good[name] for name in same}
    assert good["attributes"]["text"] == HOSTILE
    assert len(good["events"]) == 2


def test_what_protobuf_does_not_parse_is_refused_by_the_server_before_anything_is_inserted(tables: Tables) -> None:
    deep = record(span({"deep": [[[]]]}))
    broken = [b"\x0a\xff", b"\x10\x02", b"\x0a\x01a\x18\x01", b"\x0f"]
    for value in (deep, *(record(part(9, part(1, b"key") + part(2, attribute))) for attribute in broken)):
        with pytest.raises(DatabaseError) as error:
            tables.client.raw_insert(
                "in_otlp_spans",
                batches.COLUMNS,
                batches.body("otlp_spans", 0, [Record(1, record(span())), Record(2, value)], lambda _: 3),
                settings={"async_insert": 0, **batches.insert_settings()},
                fmt=batches.FORMAT,
            )
        assert error.value.code in batches.REFUSALS, error.value
        assert not tables.rows("spans")


@pytest.mark.parametrize(
    ("own", "resource", "number"),
    [
        ({}, {"fulgurite.sequence_id": 3, "agentlightning.span_sequence_id": 4}, 3),
        ({}, {"agentlightning.span_sequence_id": 4}, 4),
        ({"agentlightning.span_sequence_id": 5}, {"fulgurite.sequence_id": 3}, 5),
        ({}, {}, 0),
    ],
)
def test_the_order_within_an_attempt(
    tables: Tables, own: dict[str, Any], resource: dict[str, Any], number: int
) -> None:
    assert tables.row(record(span(own), resource=resource))["sequence_id"] == number


def test_later_versions_of_otlp_are_read(tables: Tables) -> None:
    row = tables.row(record(span(kind=9, more=part(900, b"new") + integer(901, 5) + fixed(902, 6) + part(3, b"k=v"))))
    assert (row["kind"], row["extra"]) == ("internal", {"span_kind": "9", "trace_state": "k=v"})


def test_one_insert_is_one_part_of_each_table_and_its_repetition_none(tables: Tables) -> None:
    many = [span({"fulgurite.rollout_id": f"r{at}"}, span_id=at.to_bytes(8, "big")) for at in range(1, 1_000)]
    records = [Record(at, record(*many, span(span_id=b""))) for at in range(100)]
    token = secrets.token_hex(8)
    for _ in range(2):
        tables.insert(records, token=token)
    found = tables.client.query(
        "SELECT table, count(), sum(rows) FROM system.parts WHERE database = currentDatabase() AND level = 0 "
        "AND rows > 0 AND table IN ('spans', 'dead_letters') GROUP BY table ORDER BY table"
    ).result_rows
    assert list(found) == [("dead_letters", 1, 100), ("spans", 1, 99_900)]


@pytest.mark.parametrize(("into", "expected"), [(1, (1, 0)), (2, (0, 1)), (3, (1, 1))])
def test_a_broken_insert_is_mended_table_by_table(tables: Tables, into: int, expected: tuple[int, int]) -> None:
    tables.insert([Record(1, record(span(), span(span_id=b"")))], into=into)
    assert (len(tables.rows("spans")), len(tables.rows("dead_letters"))) == expected


IDS = st.sampled_from(["", "r1", "r2", "ä:b"])
NAMES = [
    f"{where}{prefix}.{name}"
    for where in ("", "baggage.")
    for prefix in ("fulgurite", "agentlightning")
    for name in ("rollout_id", "attempt_id")
]
FEW = st.dictionaries(st.sampled_from(NAMES), IDS, max_size=4)


@given(st.lists(st.tuples(FEW, FEW, st.lists(FEW, max_size=2)), min_size=20, max_size=60))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sql_and_python_find_the_same_rollout(
    tables: Tables, cases: list[tuple[dict[str, str], dict[str, str], list[dict[str, str]]]]
) -> None:
    tables.client.command("TRUNCATE TABLE spans")
    values = [record(span(own, links=[link(one) for one in links]), resource=res) for own, res, links in cases]
    tables.insert([Record(at, value) for at, value in enumerate(values)])
    expected = [attempt_of(decode(value)[0]) for value in values]
    assert [(row["rollout_id"], row["attempt_id"]) for row in tables.rows("spans")] == expected


COLUMN_NAMES: dict[str, list[str]] = {
    "agent": ["gen_ai.agent.name", "agent.name"],
    "model": [
        *("gen_ai.response.model", "gen_ai.request.model", "llm.model_name", "embedding.model_name"),
        *("llm.response.model_name", "llm.request.model_name"),
    ],
    "input": [
        *("gen_ai.input.messages", "gen_ai.prompt", "gen_ai.tool.call.arguments", "input.value"),
        *("traceloop.entity.input", "gen_ai.retrieval.query.text"),
    ],
    "output": [
        *("gen_ai.output.messages", "gen_ai.completion", "gen_ai.tool.call.result", "output.value"),
        *("traceloop.entity.output", "gen_ai.retrieval.documents"),
    ],
    "input_tokens": ["gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt"],
    "output_tokens": ["gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"],
    "endpoint": ["server.address", "gen_ai.openai.api_base", "url.full"],
    "finish_reason": ["gen_ai.response.finish_reasons", "gen_ai.response.finish_reason", "llm.finish_reason"],
}
"""The rule once more, as somebody would write it down for users."""
ATTRIBUTES = st.dictionaries(
    st.sampled_from([name for names in COLUMN_NAMES.values() for name in names] + ["other", "gen_ai.system"]),
    st.text(max_size=8) | st.integers(0, 2**62),
    max_size=12,
)


@given(st.lists(ATTRIBUTES, min_size=20, max_size=60))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_several_names_the_newest_counts(tables: Tables, cases: list[dict[str, str | int]]) -> None:
    tables.client.command("TRUNCATE TABLE spans")
    values = [record(span(case, events=[event("e", case)])) for case in cases]
    tables.insert([Record(at, value) for at, value in enumerate(values)])
    rows = tables.rows("spans")
    for case, row in zip(cases, rows, strict=True):
        assert row["attributes"] == {name: str(value) for name, value in case.items()}
        assert row["events"][0]["attributes"] == row["attributes"]
        for column, names in COLUMN_NAMES.items():
            value = str(next((case[name] for name in names if name in case), ""))
            if column.endswith("_tokens"):
                assert row[column] == (int(value) if value.isascii() and value.isdigit() else 0)
            else:
                assert row[column] == value, (column, case)


def test_a_span_of_each_kind_by_the_present_conventions(tables: Tables) -> None:
    question = [{"role": "user", "parts": [{"type": "text", "content": "hi"}]}]
    answer = [{"role": "assistant", "parts": [{"type": "text", "content": "ho"}], "finish_reason": "stop"}]
    usage = {"gen_ai.usage.input_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 2, "gen_ai.usage.output_tokens": 4}
    retrieval = {"gen_ai.retrieval.query.text": "q", "gen_ai.retrieval.documents": [{"id": "d", "score": 0.5}]}
    reranker = {"reranker.model_name": "rr", "reranker.query": "which?", "openinference.span.kind": "RERANKER"}
    messages = {"gen_ai.operation.name": "chat", "gen_ai.input.messages": question, "gen_ai.output.messages": answer}
    as_text = {name: json.dumps(messages[name]) for name in ("gen_ai.input.messages", "gen_ai.output.messages")}
    tables.insert(
        [
            Record(1, record(span(messages | usage))),
            Record(2, record(span(messages | as_text))),
            Record(3, record(span({"gen_ai.operation.name": "retrieval", **retrieval}))),
            Record(4, record(span(reranker))),
        ]
    )
    structured, text, found, ranked = tables.rows("spans")
    for row in (structured, text):
        assert (json.loads(row["input"]), json.loads(row["output"])) == (question, answer)
    assert (structured["input_tokens"], structured["output_tokens"]) == (3, 4)
    assert structured["attributes"]["gen_ai.usage.cache_read.input_tokens"] == "2"
    assert (found["operation"], found["input"]) == ("retrieval", "q")
    assert json.loads(found["output"]) == [{"id": "d", "score": 0.5}]
    assert (ranked["operation"], ranked["model"], ranked["input"]) == ("reranker", "rr", "which?")


@pytest.mark.parametrize(
    ("more", "before", "after"),
    [
        ({"gen_ai.operation.name": "chat"}, "gen_ai.prompt", "gen_ai.completion"),
        ({"openinference.span.kind": "LLM"}, "llm.prompts", "llm.choices"),
        ({"openinference.span.kind": "LLM"}, "llm.input_messages", "llm.output_messages"),
    ],
)
def test_numbered_messages(tables: Tables, more: dict[str, str], before: str, after: str) -> None:
    asked = {f"{before}.0.role": "user", f"{before}.0.content": "hi", f"{before}.10.content": "yes"}
    said = {f"{after}.0.content": "ho", f"{after}.0.role": "assistant"}
    row = tables.row(record(span({**more, **asked, **said, "gen_ai.request.model": "m"})))
    assert (json.loads(row["input"]), json.loads(row["output"])) == (asked, said)
