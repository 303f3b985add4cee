"""What `@algorithm` makes of a function: which records it is given, and one way to call it, however it was written.

    @algorithm()                                  every trajectory
    @algorithm(reads="groups", run_id="first")    all trajectories of a group at once, of one run
    @algorithm(reads="spans")                     every span; likewise rewards, rollouts, resources, training, attempts

The function takes the one thing and may be a generator, an async generator, a coroutine or plain; what it yields or
returns (one event, several, or None) is published. Pure: knows neither Kafka nor when it is called.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pydantic import BaseModel

from fulgurite.producers.named_objects import load_object
from fulgurite.schemas import topics
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.topics import Topic
from fulgurite.streams.algorithms.calls import PlainCalls, awaited

Reads = Literal["trajectories", "groups", "attempts", "spans", "rewards", "rollouts", "resources", "training"]

TOPIC_OF: dict[Reads, Topic] = {
    "trajectories": topics.TRAJECTORIES,
    "groups": topics.TRAJECTORIES,
    "attempts": topics.ATTEMPTS,
    "spans": topics.SPANS,
    "rewards": topics.REWARDS,
    "rollouts": topics.ROLLOUTS,
    "resources": topics.RESOURCES,
    "training": topics.TRAINING,
}

MAX_EVENTS = 10_000
"""Of one input: they are published in one transaction."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TooManyEvents(Exception):
    """Of one input."""


class InputRefused(Exception):
    """Raised by a function: this input is a dead letter at once, with `reason`; `events` are published all the same."""

    def __init__(self, reason: str, message: str, events: Iterable[BaseModel] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.events = list(events)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A function with what it reads. Under its name Kafka keeps how far it has come."""

    name: str
    function: Callable[[Any], Any]
    reads: Reads = "trajectories"
    run_id: str = ""
    agent: str = ""
    mode: str = ""
    instead: Callable[[Any], BaseModel] | None = None
    """What is published of an input, beside its dead letter, that nothing else can be published of: for an algorithm
    that others wait for. Such an input never stops it."""

    def __call__(self, given: Any) -> Any:
        """The function itself: a decorated one can be tested like any other."""
        return self.function(given)

    @property
    def topic(self) -> Topic:
        return TOPIC_OF[self.reads]

    def selects(self, event: object) -> bool:
        """Whether it wants this one. What has no run, agent or mode is wanted only where none is asked for."""
        wanted = (("run_id", self.run_id), ("agent", self.agent), ("mode", self.mode))
        return all(not value or getattr(event, name, "") == value for name, value in wanted)

    async def run(self, given: Any, calls: PlainCalls) -> list[BaseModel]:
        """What the function gives for this input. Raises what the function raises."""
        if inspect.isasyncgenfunction(self.function):
            return await awaited(_listed(self.function(given)), self.name)
        if inspect.iscoroutinefunction(self.function):
            return await awaited(_of_coroutine(self.function(given)), self.name)
        return await calls.run(lambda: _events(self.function(given)), self.name)


def algorithm(
    *, name: str = "", reads: Reads = "trajectories", run_id: str = "", agent: str = "", mode: str = ""
) -> Callable[[Callable[[Any], Any]], Algorithm]:
    """Makes a function an algorithm; `name` is the function's own where none is given."""

    def decorate(function: Callable[[Any], Any]) -> Algorithm:
        own = name or getattr(function, "__name__", "algorithm").replace("_", "-").strip("-")
        return checked(Algorithm(own, function, reads, run_id, agent, mode))

    return decorate


def load_algorithm(spec: str, *, name: str = "", run_id: str = "", agent: str = "", mode: str = "") -> Algorithm:
    """The algorithm `module:function` names, with what the command line says instead. Raises SettingsError."""
    found = load_object(spec, "algorithm", "examples.algorithms.best_of_group:best_of_group")
    if not isinstance(found, Algorithm):
        raise SettingsError(
            f"{spec} is a {type(found).__name__}: write @algorithm() above it "
            "(from fulgurite.streams.algorithms import algorithm)"
        )
    said = {"name": name, "run_id": run_id, "agent": agent, "mode": mode}
    return checked(replace(found, **{key: value for key, value in said.items() if value}))


def checked(made: Algorithm) -> Algorithm:
    """Raises SettingsError for what cannot be run."""
    try:
        inspect.signature(made.function).bind(None)
    except TypeError as error:
        raise SettingsError(f"algorithm {made.name}: cannot be called with one {made.reads}: {error}") from None
    if not _NAME.fullmatch(made.name):
        raise SettingsError(f"algorithm name {made.name!r}: at most 64 letters, digits, dots, dashes and underscores")
    if made.reads not in TOPIC_OF:
        raise SettingsError(f"algorithm {made.name}: reads = {made.reads!r}: one of {', '.join(TOPIC_OF)}")
    if made.mode not in ("", "train", "val", "test"):
        raise SettingsError(f"algorithm {made.name}: mode = {made.mode!r}: train, val or test")
    return made


async def _listed(events: AsyncIterator[Any]) -> list[BaseModel]:
    found: list[BaseModel] = []
    async for event in events:
        _check_count(len(found) + 1)
        found.append(_event(event))
    return found


async def _of_coroutine(given: Awaitable[Any]) -> list[BaseModel]:
    return _events(await given)


def _events(given: Any) -> list[BaseModel]:
    if given is None:
        return []
    if isinstance(given, BaseModel):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
        raise TypeError(f"gave a {type(given).__name__}: an event, several events or None is expected")
    found: list[BaseModel] = []
    for event in cast(Iterable[Any], given):
        _check_count(len(found) + 1)
        found.append(_event(event))
    return found


def _event(event: Any) -> BaseModel:
    if not isinstance(event, BaseModel):
        raise TypeError(f"gave a {type(event).__name__}: events are expected (Reward, RolloutQueued, …)")
    return event


def _check_count(count: int) -> None:
    if count > MAX_EVENTS:
        raise TooManyEvents(f"gave more than {MAX_EVENTS} events for one input")
