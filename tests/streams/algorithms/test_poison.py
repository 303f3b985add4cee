"""Whatever one attempt holds, it becomes exactly one trajectory, and the aggregator goes on."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from fulgurite.schemas.codec import decode, encode
from fulgurite.schemas.dead_letters import HEADER_REASON
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import AlgorithmSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import CallRange, FinishedAttempt, TokenSequence, Trajectory
from fulgurite.streams.algorithms.aggregator import scoring as scoring_module
from fulgurite.streams.algorithms.aggregator.combine import given_up
from fulgurite.streams.algorithms.aggregator.scoring import Scoring
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.definition import Algorithm, InputRefused
from fulgurite.streams.algorithms.groups import Record
from fulgurite.streams.algorithms.work import AlgorithmFailed, Worker

RULES: dict[str, Any] = {"compliance": {"rules": [{"name": "no-shell", "deny_tools": ["shell"]}]}}
NAMES: dict[str, dict[str, float]] = {"half": {"\ud83d": 1.0}, "long": {"x" * 513: 1.0}}


def named(attempt: FinishedAttempt) -> dict[str, float]:
    return NAMES[attempt.agent]


def attempt(span_id: str = "s", **fields: Any) -> FinishedAttempt:
    span = Span(
        span_id=span_id, name="execute_tool shell", operation="execute_tool", start_ns=1, end_ns=2, attributes={"n": 1}
    )
    sequence = TokenSequence(
        token_ids=[1, 2],
        loss_mask=[0, 1],
        logprobs=[0, -1],
        span_ids=[span_id],
        calls=[CallRange(span_id=span_id, number=0, start=1, end=2)],
    )
    given = FinishedAttempt(
        rollout_id="r", attempt_id="a", status="succeeded", reward=1.0, spans=[span], sequences=[sequence], **fields
    )
    return decode(FinishedAttempt, encode(given))


async def scored(given: FinishedAttempt, **settings: Any) -> list[BaseModel]:
    async with httpx.AsyncClient() as client:
        return await Scoring(Settings.model_validate(settings), client, Verdicts(None, 10)).score(given)


@pytest.mark.parametrize("span_id", ["call/1", "tool call 1", "_1", "#1", "x" * 128])
async def test_a_violation_names_whatever_id_its_span_has(span_id: str) -> None:
    violation, total, trajectory = await scored(attempt(span_id), **RULES)
    assert isinstance(violation, Reward)
    assert isinstance(trajectory, Trajectory)
    assert (violation.span_id, violation.value) == (span_id, -1.0)
    assert (getattr(total, "value", None), trajectory.reward, trajectory.rewards[0].span_id) == (0.0, 0.0, span_id)


@pytest.mark.parametrize("agent", list(NAMES))
async def test_a_function_whose_names_no_record_can_have_has_failed(agent: str) -> None:
    sources = [{"name": "named", "function": f"{__name__}:named"}]
    with pytest.raises(InputRefused, match="gave a value named") as refused:
        await scored(attempt(agent=agent), aggregator={"sources": sources, "tries": 1})
    assert [getattr(event, "partial", "") for event in refused.value.events] == ["reward_failed"]


async def test_what_nobody_thought_of_in_an_attempt_is_a_failed_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise ArithmeticError("nobody thought of this")

    monkeypatch.setattr(scoring_module, "total", broken)
    with pytest.raises(InputRefused, match="nobody thought of this") as refused:
        await scored(attempt())
    [trajectory] = refused.value.events
    assert isinstance(trajectory, Trajectory)
    assert (refused.value.reason, trajectory.partial, trajectory.reward) == ("reward_failed", "reward_failed", None)
    assert len(trajectory.sequences) == 1


def test_unknown_fields_of_any_name_stay_with_the_trajectory() -> None:
    given = decode(FinishedAttempt, b'{"rollout_id":"r","status":"failed","_fields_set":1,"cls":2,"spans":[]}')
    assert decode(Trajectory, encode(given.trajectory())).model_extra == {"_fields_set": 1, "cls": 2}


@dataclasses.dataclass(frozen=True)
class _Record:
    topic: str = "attempts"
    partition: int = 0
    offset: int = 5
    key: bytes = b"g"
    value: bytes = b"{}"


def publishing(events: list[Any], error: Exception | None = None) -> tuple[Worker, Record]:
    async def score(given: FinishedAttempt) -> list[Any]:
        if error is not None:
            raise error
        return events

    own = AlgorithmSettings(tries=1, on_error="stop")
    algorithm = Algorithm("aggregator", score, reads="attempts", instead=given_up)
    return Worker(Settings(algorithm=own), algorithm), _Record()  # type: ignore[return-value]


async def test_an_attempt_whose_events_cannot_be_published_has_a_trajectory_all_the_same() -> None:
    large = Reward(rollout_id="r", value=1.0, metadata={f"{n}": "x" * 4_096 for n in range(1_024)})
    worker, record = publishing([large, large.model_copy(update={"metadata": {"a": "x" * 2**23}})])
    trajectory, letter = await worker.on_events(record, [(0, attempt(group_id="g"))])
    found = decode(Trajectory, trajectory.value)
    assert (trajectory.key, found.partial, found.sequences, found.reward) == (b"g", "reward_failed", [], None)
    assert dict(letter.headers or [])[HEADER_REASON] == b"algorithm_failed"


async def test_time_that_is_up_and_memory_that_is_short_still_stop() -> None:
    for error in (MemoryError(), TimeoutError()):
        worker, record = publishing([], error)
        with pytest.raises(AlgorithmFailed):
            await asyncio.wait_for(worker.on_events(record, [(0, attempt())]), 5)
