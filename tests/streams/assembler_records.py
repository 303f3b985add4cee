"""Events as producers write them, for the assembler's tests."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import AttemptFinished, AttemptStarted, FinalStatus, RolloutFinished, RolloutQueued
from fulgurite.schemas.spans import Span


def value(event: BaseModel) -> bytes:
    return event.model_dump_json().encode()


def llm_call(
    rollout_id: str,
    number: int,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    attempt: int = 1,
    version: int = 1,
    sequence_id: int | None = None,
) -> Span:
    """Call `number` of an attempt; its logprobs follow from its tokens."""
    return Span(
        rollout_id=rollout_id,
        attempt_id=f"{rollout_id}-{attempt}",
        sequence_id=number if sequence_id is None else sequence_id,
        span_id=f"{rollout_id}-{attempt}-{number}",
        name="chat",
        start_ns=1_000 * number,
        end_ns=1_000 * number + 500,
        operation="chat",
        resource="policy",
        prompt_token_ids=list(prompt),
        response_token_ids=list(response),
        logprobs=[-token / 1_000 for token in response],
        weight_versions=[VersionSpan(version=version, start=0, end=len(response))] if response else [],
        finish_reason="stop",
    )


def reward(rollout_id: str, amount: float, *, attempt: int = 1, name: str = "reward", number: int = 1) -> Reward:
    return Reward(
        reward_id=f"{rollout_id}-{attempt}-r{number}",
        rollout_id=rollout_id,
        attempt_id=f"{rollout_id}-{attempt}",
        name=name,
        value=amount,
    )


def queued(rollout_id: str, group_id: str = "") -> RolloutQueued:
    return RolloutQueued(rollout_id=rollout_id, group_id=group_id, time_ns=7, metadata={"label": rollout_id})


def started(rollout_id: str, attempt: int = 1) -> AttemptStarted:
    return AttemptStarted(rollout_id=rollout_id, attempt_id=f"{rollout_id}-{attempt}", sequence_id=attempt)


def attempt_finished(rollout_id: str, attempt: int = 1) -> AttemptFinished:
    return AttemptFinished(
        rollout_id=rollout_id, attempt_id=f"{rollout_id}-{attempt}", sequence_id=attempt, status="succeeded"
    )


def finished(
    rollout_id: str, *, attempt: int = 1, status: FinalStatus = "succeeded", group_id: str = "", error: str = ""
) -> RolloutFinished:
    return RolloutFinished(
        rollout_id=rollout_id,
        attempt_id=f"{rollout_id}-{attempt}" if attempt else "",
        status=status,
        attempts=attempt,
        group_id=group_id,
        error=error,
    )
