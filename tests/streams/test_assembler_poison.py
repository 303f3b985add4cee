"""What one rollout's records hold ends nothing: its trajectory has no data and says why, and so does a dead letter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode, encode
from fulgurite.schemas.dead_letters import HEADER_OFFSET, HEADER_REASON, HEADER_STAGE, HEADER_TOPIC
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.streams.assembler import building, join
from fulgurite.streams.assembler import outputs as outputs_module
from fulgurite.streams.assembler.join import Announcement, assemble
from fulgurite.streams.assembler.outputs import records
from fulgurite.streams.assembler.rollouts import Batch, Pending
from tests.streams.assembler_bus import assembling, connected
from tests.streams.assembler_records import finished, llm_call, queued, reward, started, value

ODD_IDS = ("call/1", "call 1", "_1", "{9c1}", "#1", "Ж", "x" * 128)
ROLLOUTS = TopicPartition("rollouts", 1)


def _pending(rollout_id: str = "r") -> Pending:
    event = finished(rollout_id, group_id="g")
    return Pending(event, ROLLOUTS, 7, rollout_id.encode(), value(event))


@pytest.mark.parametrize("span_id", ODD_IDS)
def test_a_span_may_have_any_text_as_its_id(span_id: str) -> None:
    """And so may whatever points to it: a parent, a link, a reward, a call."""
    call = llm_call("r", 1, [1, 2], [3]).model_copy(update={"span_id": span_id})
    tool = {"rollout_id": "r", "attempt_id": "r-1", "span_id": "t", "name": "t", "start_ns": 1, "end_ns": 2}
    tool |= {"parent_span_id": span_id, "links": [{"span_id": span_id}]}
    rewarded = reward("r", 1.0).model_copy(update={"span_id": span_id})
    spans = [value(call), json.dumps(tool).encode()]
    found = assemble(finished("r"), Announcement(), spans, [value(rewarded)], keep_spans=True)
    read = decode(FinishedAttempt, encode(found.trajectory))
    assert (read.partial, read.sequences[0].calls[0].span_id, read.rewards[0].span_id) == ("", span_id, span_id)
    assert sorted(span.span_id for span in read.spans) == sorted([span_id, "t"])


@pytest.mark.parametrize(
    ("around", "inside"), [("attributes", "%s"), ("events", '[{"name":"e","attributes":{"n":%s}}]')]
)
def test_a_span_nested_too_deeply_for_the_attempts_record_is_left_out(around: str, inside: str) -> None:
    """The record has it further down than the log of spans, beyond what its readers' parser takes."""

    def span(depth: int) -> bytes:
        deep = inside % ('{"n":' * depth + "1" + "}" * depth)
        start = '{"rollout_id":"r","span_id":"s","name":"n","start_ns":1,"end_ns":2'
        return f'{start},"{around}":{deep}}}'.encode()

    taken = max(depth for depth in range(180, 202) if _is_read(span(depth)))
    kept: list[bool] = []
    for depth in range(taken - 4, taken + 1):
        trajectory = assemble(finished("r"), Announcement(), [span(depth)], [], keep_spans=True).trajectory
        read = decode(FinishedAttempt, encode(trajectory))
        assert bool(read.spans) != ("invalid_record" in read.partial)
        kept.append(bool(read.spans))
    assert kept == [True, True, True, False, False]


def _is_read(data: bytes) -> bool:
    try:
        decode(Span, data)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("keep_spans", [True, False])
def test_a_trajectory_that_cannot_be_built_has_no_data_and_is_a_dead_letter(
    monkeypatch: pytest.MonkeyPatch, keep_spans: bool
) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise ValueError("nobody thought of this")

    monkeypatch.setattr(building, "assemble", broken)
    pending = _pending()
    joined, letter = building.build(pending, Announcement(5, {"a": "b"}), [b"x"], [], keep_spans=keep_spans)
    kind = FinishedAttempt if keep_spans else Trajectory
    read = decode(kind, encode(joined.trajectory))
    assert type(joined.trajectory) is kind
    assert (read.rollout_id, read.group_id, read.status, read.partial) == ("r", "g", "succeeded", "invalid_record")
    assert (read.sequences, read.reward, read.queued_ns, read.metadata) == ([], None, 5, {"a": "b"})
    assert letter is not None
    assert (letter.topic, letter.partition, letter.offset, letter.reason) == ("rollouts", 1, 7, "not_assembled")
    assert (letter.key, letter.value) == (b"r", pending.value)
    assert "nobody thought of this" in letter.message


def test_short_memory_is_no_fault_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(building, "assemble", broken)
    with pytest.raises(MemoryError):
        building.build(_pending(), Announcement(), [], [], keep_spans=False)


def test_a_trajectory_that_cannot_be_written_has_no_data_and_is_a_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trajectory: Trajectory, bound: int) -> bytes:
        if trajectory.sequences:
            raise ValueError("nobody thought of this")
        return encode(trajectory, bound)

    monkeypatch.setattr(outputs_module, "fitting", broken)
    both = [_pending("r"), _pending("s")]
    made = [assemble(each.event, Announcement(), [value(llm_call("r", 1, [1], [2]))], []).trajectory for each in both]
    bad, letter, good = records(Batch(made, both, [], {}), KafkaSettings())
    assert decode(Trajectory, bad.value).partial == "no_reward,invalid_record"
    assert (good.key, decode(Trajectory, good.value).partial) == (b"g", "no_calls,no_reward")
    assert dict(letter.headers or [])[HEADER_REASON] == b"not_assembled"
    assert letter.value == both[0].value


async def test_neither_odd_ids_nor_a_rollout_that_cannot_be_joined_end_the_service(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = join.merge_calls

    def merging(calls: list[Span]) -> Any:
        if calls and calls[0].rollout_id == "bad":
            raise ArithmeticError("nobody thought of this")
        return merge(calls)

    monkeypatch.setattr(join, "merge_calls", merging)
    async with connected(kafka_settings) as bus, assembling(kafka_settings):
        odd = llm_call("odd", 1, [1, 2], [3]).model_copy(update={"span_id": "call/1"})
        await bus.send(queued("odd"), started("odd"), odd, reward("odd", 1.0), finished("odd"))
        await bus.rollout("bad")
        await bus.rollout("after")
        await bus.until(topics.TRAJECTORIES, 3)
        found = {each.rollout_id: each for each in await bus.trajectories()}
        [letter] = await bus.until(topics.DEAD_LETTERS, 1)
    assert {name: (each.partial, each.calls) for name, each in found.items()} == {
        "odd": ("", 1),
        "bad": ("invalid_record", 0),
        "after": ("", 2),
    }
    headers = dict(letter.headers)
    assert (headers[HEADER_STAGE], headers[HEADER_REASON]) == (b"assembler", b"not_assembled")
    [end] = [
        each for each in await _events(bus) if each.offset == int(headers[HEADER_OFFSET]) and b'"bad"' in each.value
    ]
    assert (headers[HEADER_TOPIC].decode(), letter.value) == (end.topic, end.value)


async def _events(bus: Any) -> list[Any]:
    return [each for each in await bus.read(topics.ROLLOUTS) if b'"finished"' in each.value]
