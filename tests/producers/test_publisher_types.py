"""Both publishers say the same of what is no event, before anything is connected or sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fulgurite.producers.publisher import Publisher
from fulgurite.producers.sync_publisher import SyncPublisher
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import SPANS

NOWHERE = KafkaSettings(bootstrap_servers="127.0.0.1:1")
FIELDS = {"rollout_id": "r1", "span_id": "s1", "name": "n", "start_ns": 1, "end_ns": 2}

CALLS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda to: to.publish_span(FIELDS), r"takes a Span, not a dict: Span\(\*\*fields\) makes one of a dict"),
    (lambda to: to.publish_span(Reward(rollout_id="r1", value=1.0)), "takes a Span, not a Reward$"),
    (lambda to: to.publish_reward({"value": 1.0}), r"takes a Reward, not a dict: Reward\(\*\*fields\)"),
    (lambda to: to.publish_reward(1.0), "takes a Reward, not a float$"),
    (lambda to: to.publish_dead_letter(b"{}"), "takes a DeadLetter, not a bytes$"),
    (lambda to: to.publish(SPANS, "r1", None), r"takes an event \(a pydantic model\), not a NoneType$"),
    (lambda to: to.publish(SPANS, "r1", FIELDS), r"takes an event .* not a dict: the model of its topic, such as Span"),
]


@pytest.mark.parametrize(("call", "words"), CALLS)
async def test_what_is_no_event_is_a_type_error_that_says_what_would_be_one(
    call: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        await call(Publisher(NOWHERE))
    publisher = SyncPublisher(NOWHERE)
    with pytest.raises(TypeError, match=words):
        call(publisher)
    publisher.close()


async def test_a_rollouts_event_too() -> None:
    fields: Any = {"event": "queued", "rollout_id": "r1"}
    with pytest.raises(TypeError, match="takes an event of a rollout, not a dict"):
        await Publisher(NOWHERE).publish_rollout(fields)
