"""What the gateway takes as a call, and what it refuses: ids, bodies, traces, order."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from fulgurite.producers.gateway.attributes import request_attributes
from fulgurite.producers.gateway.calls import Call, Sequences, identify, parse_call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols import BY_ROUTE
from fulgurite.schemas.ids import attempt_trace_id

IDS = {"rollout_id": "r1", "attempt_id": "a1"}
BODY: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "2+2?"}]}


def parse(
    body: dict[str, Any] | bytes = BODY, ids: dict[str, str] = IDS, headers: dict[str, str] | None = None
) -> Call:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    said = headers or {}
    return parse_call(BY_ROUTE["/v1/chat/completions"], identify(ids, said), said, data, Sequences())


def refusal(body: dict[str, Any] | bytes = BODY, ids: dict[str, str] = IDS) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as refused:
        parse(body, ids)
    return refused.value.status, refused.value.param


def test_the_backend_is_asked_for_everything_that_is_recorded_and_never_for_a_seed():
    call = parse(BODY | {"seed": 7, "temperature": 0.5, "logprobs": False})
    assert orjson.loads(call.policy_body) == BODY | {
        "temperature": 0.5,
        "logprobs": True,
        "return_token_ids": True,
        "return_weight_versions": True,
    }


LONG = 123456789012345678901


def test_whole_numbers_of_more_than_64_bits_stay_whole():
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 2**64, "minimum": -(2**63) - 1}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    call = parse(json.dumps(BODY | {"tools": tools, "max_tokens": LONG}).encode())
    assert json.loads(call.policy_body)["tools"] == tools
    assert json.loads(call.body_for("openai"))["tools"] == tools
    recorded = request_attributes(call)
    assert json.loads(recorded["gen_ai.tool.definitions"]) == tools
    assert recorded["gen_ai.request.max_tokens"] == str(LONG)


def test_a_number_without_end_breaks_nothing():
    assert parse(b'{"model": "policy", "messages": [1' + b"0" * 200 + b"]}").policy_body


def test_what_is_asked_unchanged_is_asked_byte_for_byte():
    body = (
        b'{ "model":"policy", "max_tokens": 5, "messages": [{"role": "user", "content": "\\u00e4 1.10"}], "x": 1.10 }'
    )
    caller = identify(IDS, {})
    for kind in ("vllm", "openai"):
        assert parse_call(BY_ROUTE["/v1/messages"], caller, {}, body, Sequences()).body_for(kind) == body


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 10_000}, "n"),
        ({"model": 3}, "model"),
        ({"stream": "false"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": []}, "stream"),
    ],
)
def test_a_body_that_cannot_be_a_call_is_refused_with_the_field(change: dict[str, Any], param: str):
    assert refusal(BODY | change) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": [' + b"[" * 500 + b"]" * 500 + b"]}"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes):
    assert refusal(body)[0] == 400


@pytest.mark.parametrize("bad", ["-x", "a b", "x" * 129, "ä", "a\n"])
def test_ids_that_cannot_be_ids_are_refused(bad: str):
    assert refusal(ids={"rollout_id": bad, "attempt_id": "a1"}) == (422, "rollout_id")
    assert refusal(ids={"rollout_id": "r1", "attempt_id": bad}) == (422, "attempt_id")


def test_one_id_without_the_other_is_refused():
    assert refusal(ids={"rollout_id": "r1"}) == (422, "attempt_id")


def test_ids_may_come_as_headers_and_may_be_absent():
    by_header = parse(ids={}, headers={"x-rollout-id": "r2", "x-attempt-id": "a2", "x-agent": "planner"})
    assert (by_header.rollout_id, by_header.attempt_id, by_header.agent) == ("r2", "a2", "planner")
    without = parse(ids={})
    assert (without.rollout_id, without.attempt_id, without.sequence_ids) == ("", "", (0,))
    assert len(without.trace_id) == 32


@pytest.mark.parametrize(("said", "count"), [("0", 0), ("2", 2), ("", 0), ("-1", 0), ("two", 0), ("9" * 30, 0)])
def test_the_count_of_a_clients_retries_is_taken_where_it_is_one(said: str, count: int):
    assert parse(headers={"x-stainless-retry-count": said}).retry_count == count
    assert parse().retry_count == 0


def test_the_trace_is_the_callers_or_the_attempts():
    assert parse().trace_id == attempt_trace_id("r1", "a1")
    own = parse(headers={"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"})
    assert (own.trace_id, own.parent_span_id) == ("ab" * 16, "cd" * 8)


@pytest.mark.parametrize("broken", ["", "00-xyz", f"00-{'0' * 32}-{'cd' * 8}-01", f"ff-{'ab' * 16}-{'cd' * 8}-01"])
def test_a_broken_traceparent_is_ignored(broken: str):
    assert parse(headers={"traceparent": broken}).trace_id == attempt_trace_id("r1", "a1")


def test_calls_of_an_attempt_are_in_order_also_after_a_restart():
    before = Sequences()
    same_instant = [before.take("r", "a", 1, 5_000_000_000)[0] for _ in range(3)]
    assert same_instant == sorted(set(same_instant))
    assert before.take("r", "a", 2, 5_000_000_000) == (same_instant[-1] + 1, same_instant[-1] + 2)
    after = Sequences()  # remembers nothing
    assert after.take("r", "a", 1, 6_000_000_000)[0] > same_instant[-1] + 2


def test_the_memory_of_attempts_is_bounded():
    sequences = Sequences(max_attempts=2)
    for attempt in ("a", "b", "c"):
        sequences.take("r", attempt, 1, 0)
    assert len(sequences._last) == 2  # pyright: ignore[reportPrivateUsage]
