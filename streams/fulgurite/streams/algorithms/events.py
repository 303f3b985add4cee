"""Where an event goes that an algorithm yields: its topic, its key, and the mark that says who made it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from fulgurite.producers.redaction import Redactor
from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.dead_letters import DeadLetter, Headers
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rewards import HEADER_AFTER_END, Reward
from fulgurite.schemas.rollouts import RolloutCancelled, RolloutQueued
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.training import TrainingEventBase
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.streams.assembler.outputs import fitting
from fulgurite.streams.transactions import Outgoing

HEADER_ALGORITHM = "fulgurite.algorithm"
"""On everything an algorithm publishes, with its name: it does not read its own words, so it cannot talk to itself."""

_PLACES: tuple[tuple[type[BaseModel], Topic, Callable[[Any], str]], ...] = (
    (Reward, topics.REWARDS, lambda event: event.rollout_id),
    (Span, topics.SPANS, lambda event: event.rollout_id),
    (RolloutQueued, topics.ROLLOUTS, lambda event: event.rollout_id),
    (RolloutCancelled, topics.ROLLOUTS, lambda event: event.rollout_id),
    (ResourceVersion, topics.RESOURCES, lambda event: event.resource),
    (TrainingEventBase, topics.TRAINING, lambda event: event.run_id),
    (Trajectory, topics.TRAJECTORIES, lambda event: event.group_id or event.rollout_id),
)
"""The other events of `rollouts` are the coordinator's alone."""


class Publisher:
    """Makes records of events, for one algorithm."""

    def __init__(self, settings: KafkaSettings, name: str, after_end: bool, redactor: Redactor | None = None) -> None:
        """`after_end`: it reads trajectories, so the assembler is done with the rollouts that it gives rewards to."""
        self._settings = settings
        self._mark: Headers = [(HEADER_ALGORITHM, name.encode())]
        self._after_end = after_end
        self._redactor = redactor

    def record(self, event: BaseModel) -> Outgoing:
        """Raises TypeError for an event that nobody but its own service may write, RecordTooLarge for a large one.

        A trajectory that is too large says so and goes without what does not fit, as the assembler's do.
        """
        place = next((place for place in _PLACES if isinstance(event, place[0])), None)
        if place is None or isinstance(event, FinishedAttempt):
            known = ", ".join(kind.__name__ for kind, _, _ in _PLACES)
            raise TypeError(f"a {type(event).__name__} cannot be published by an algorithm; {known} can")
        _, topic, key = place
        redacted = self._redactor.event(event) if self._redactor else event
        headers = [*self._mark]
        if self._after_end and isinstance(event, Reward):
            headers.append((HEADER_AFTER_END, b"1"))
        bound = self._settings.max_record_bytes
        value = fitting(redacted, bound) if isinstance(redacted, Trajectory) else encode(redacted, bound)
        return Outgoing(self._settings.topic(topic), encode_key(key(event)), value, headers)

    def dead_letter(self, letter: DeadLetter) -> Outgoing:
        letter = self._redactor.dead_letter(letter) if self._redactor else letter
        topic = self._settings.topic(topics.DEAD_LETTERS)
        value = letter.value_within(self._settings.max_record_bytes)
        return Outgoing(topic, letter.key, value, [*letter.headers(), *self._mark])


def is_own(headers: Any, name: str) -> bool:
    """Whether this algorithm wrote the record."""
    return (HEADER_ALGORITHM, name.encode()) in list(headers)
