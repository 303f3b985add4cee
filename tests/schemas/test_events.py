"""Events: ids and clocks, bounds, and what their validators refuse."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from fulgurite.schemas.dead_letters import HEADER_LINE, HEADER_MESSAGE, HEADER_REASON, MAX_MESSAGE_CHARS, DeadLetter
from fulgurite.schemas.ids import Id, new_id, new_span_id, new_trace_id
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import CO_PARTITIONED, TOPICS
from fulgurite.schemas.training import TRAINING_EVENT
from fulgurite.schemas.trajectories import TokenSequence


def test_ids_sort_by_time_and_are_ids() -> None:
    first = new_id()
    time.sleep(0.002)
    second = new_id()
    assert first < second
    assert first[12] == "7"
    TypeAdapter(Id).validate_python(first)
    assert (len(new_trace_id()), len(new_span_id())) == (32, 16)


@pytest.mark.parametrize("wrong", ["", " ", "a b", "a/b", "../x", "x" * 129, "-x", "ä"])
def test_ids_are_safe_in_urls_and_file_names(wrong: str) -> None:
    with pytest.raises(ValidationError):
        Reward(rollout_id=wrong, value=1)


def span(**changes: Any) -> Span:
    return Span.model_validate({"span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"end_ns": 0}, "end_ns 0 is before start_ns 1"),
        ({"response_token_ids": [1], "logprobs": [0.0, 0.0]}, "2 logprobs for 1 response_token_ids"),
        ({"response_token_ids": [1, 2], "weight_versions": [{"version": 1, "start": 1, "end": 2}]}, "do not cover"),
        ({"response_token_ids": [1, 2], "weight_versions": [{"version": 1, "start": 0, "end": 1}]}, "end at 1"),
        ({"response_token_ids": [-1]}, "greater than or equal to 0"),
        ({"logprobs": [float("nan")], "response_token_ids": [1]}, "finite"),
    ],
)
def test_spans_are_consistent(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        span(**changes)


def test_llm_calls() -> None:
    assert span(response_token_ids=[1], logprobs=[-0.5]).is_llm_call
    assert not span(response_token_ids=[1]).is_llm_call
    assert not span().is_llm_call


def test_sequences_have_one_length() -> None:
    with pytest.raises(ValidationError, match="2 token_ids, 1 loss_mask, 2 logprobs"):
        TokenSequence(token_ids=[1, 2], loss_mask=[1], logprobs=[0.0, 0.0])
    with pytest.raises(ValidationError, match="reach outside"):
        TokenSequence.model_validate(
            {
                "token_ids": [1],
                "loss_mask": [1],
                "logprobs": [0.0],
                "weight_versions": [{"version": 1, "start": 0, "end": 2}],
            }
        )


def test_training_events_are_told_apart() -> None:
    with pytest.raises(ValidationError, match="version_out"):
        TRAINING_EVENT.validate_python({"event": "step", "run_id": "a", "step": 1, "resource": "p", "version_in": 0})


def test_dead_letter_headers() -> None:
    letter = DeadLetter("spans", 1, 2, "assembler", "late", "m" * (2 * MAX_MESSAGE_CHARS), None, None)
    headers = dict(letter.headers())
    assert headers[HEADER_REASON] == b"late"
    assert headers[HEADER_LINE] == b"0"
    assert dict(replace(letter, line=7).headers())[HEADER_LINE] == b"7"
    assert len(headers[HEADER_MESSAGE]) == MAX_MESSAGE_CHARS


def test_topics() -> None:
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)
    assert len({(topic.key, topic.partitions) for topic in CO_PARTITIONED}) == 1
