"""Giving rewards from anywhere: inside an agent, in a child process of one, in a reward model's own service.

    emit_reward(1.0)                                       # inside an agent: the current rollout
    emit_reward(0.3, rollout_id="r1", publisher=publisher) # anywhere: waits for the broker
    await emit_reward_async(publisher, 0.3, rollout_id="r1")

Inside an agent it returns at once; the runner waits for the broker before it reports the attempt's end. Elsewhere it
returns when the broker has acknowledged the reward. A rollout's own reward is the last one named `reward`.
Does not know how rewards become advantages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import unquote

from fulgurite.producers.publisher import Publisher
from fulgurite.producers.rollout import ATTRIBUTE_ATTEMPT_ID, ATTRIBUTE_ROLLOUT_ID, current_rollout
from fulgurite.producers.sync_publisher import SyncPublisher
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.ids import new_id
from fulgurite.schemas.rewards import FINAL_REWARD, Reward

ENV_RESOURCE_ATTRIBUTES = "OTEL_RESOURCE_ATTRIBUTES"


def emit_reward(
    value: float,
    *,
    name: str = FINAL_REWARD,
    rollout_id: str = "",
    attempt_id: str = "",
    span_id: str = "",
    dimensions: Mapping[str, float] | None = None,
    reward_id: str = "",
    source: str = "",
    metadata: Mapping[str, str] | None = None,
    publisher: SyncPublisher | None = None,
) -> Reward:
    """Gives a reward and returns the event. Inside an agent it needs no ids and no publisher; elsewhere a publisher,
    and the ids, unless OTEL_RESOURCE_ATTRIBUTES has them. The same reward_id given twice counts once.
    """
    current = current_rollout()
    if current is not None and publisher is None and rollout_id in ("", current.rollout_id):
        return current.reward(
            value,
            name=name,
            span_id=span_id,
            dimensions=dict(dimensions or {}),
            reward_id=reward_id,
            source=source,
            metadata=dict(metadata or {}),
        )
    if publisher is None:
        raise FulguriteError("outside of an agent, emit_reward needs publisher=SyncPublisher(load_settings().kafka)")
    reward = _reward(value, name, rollout_id, attempt_id, span_id, dimensions, reward_id, source, metadata)
    publisher.publish_reward(reward).result()
    return reward


async def emit_reward_async(
    publisher: Publisher,
    value: float,
    *,
    name: str = FINAL_REWARD,
    rollout_id: str = "",
    attempt_id: str = "",
    span_id: str = "",
    dimensions: Mapping[str, float] | None = None,
    reward_id: str = "",
    source: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Reward:
    """The same for services that run an event loop, with their own publisher. Returns when the broker has it."""
    reward = _reward(value, name, rollout_id, attempt_id, span_id, dimensions, reward_id, source, metadata)
    await (await publisher.publish_reward(reward))
    return reward


def _reward(
    value: float,
    name: str,
    rollout_id: str,
    attempt_id: str,
    span_id: str,
    dimensions: Mapping[str, float] | None,
    reward_id: str,
    source: str,
    metadata: Mapping[str, str] | None,
) -> Reward:
    if not rollout_id:
        rollout_id, attempt_id = _ids_from_environment()
    return Reward(
        reward_id=reward_id or new_id(),
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        span_id=span_id,
        name=name,
        value=value,
        dimensions=dict(dimensions or {}),
        source=source,
        metadata=dict(metadata or {}),
    )


def _ids_from_environment(env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """rollout_id and attempt_id, where a runner's `rollout.environment()` started this process."""
    pairs = (pair.partition("=") for pair in env.get(ENV_RESOURCE_ATTRIBUTES, "").split(","))
    attributes = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    rollout_id = attributes.get(ATTRIBUTE_ROLLOUT_ID, "")
    if not rollout_id:
        raise FulguriteError(
            f"which rollout? Give rollout_id, or set {ATTRIBUTE_ROLLOUT_ID} in {ENV_RESOURCE_ATTRIBUTES}"
        )
    return rollout_id, attributes.get(ATTRIBUTE_ATTEMPT_ID, "")
