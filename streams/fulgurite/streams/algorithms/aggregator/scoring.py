"""All parts of one attempt's reward: functions, judges and rules, at once; then the sum.

Promises: whatever a source does, an attempt becomes exactly one trajectory. With all required parts it has the sum as
its reward; without one it has none, says `reward_failed`, and InputRefused carries it together with the dead letter's
reason. An attempt that did not succeed, or of which the assembler says that records are missing, is passed on, as
nothing could be said of it: the agent's own reward is all that it may have. Where more would have counted, one that
succeeded says so (`unscored`), so that nobody trains on it. And whatever else is in an attempt that cannot be scored,
it is `reward_failed`, too.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

import httpx
from pydantic import BaseModel

from fulgurite.producers.named_objects import load_object
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import AggregatorSettings, RewardSource, Settings
from fulgurite.schemas.trajectories import FinishedAttempt
from fulgurite.streams.algorithms.aggregator.combine import (
    FAILED,
    Part,
    fault_of,
    part_reward,
    passed_on,
    rewarded,
    shares,
    sum_reward,
    total,
    total_fault,
)
from fulgurite.streams.algorithms.aggregator.judges import Judge, PartFailed
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.calls import PlainCalls, TooManyHung, awaited
from fulgurite.streams.algorithms.compliance import Rules, Violation
from fulgurite.streams.algorithms.definition import InputRefused

logger = logging.getLogger(__name__)

MAX_DIMENSIONS = 64
"""Names that one function may give: the bound of a reward."""

MAX_NAME_CHARS = 512
"""Of each of them."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: no record can have it."""

RULES_THREADS = 4

INCOMPLETE = frozenset({"invalid_record", "expired", "unattributed", "too_large"})
"""Words of `partial` that say that spans or rewards of the attempt are missing."""


class Scorer(Protocol):
    """A source, ready to be asked. None: it says nothing of this attempt. Raises PartFailed."""

    async def score(self, attempt: FinishedAttempt) -> Part | None: ...


class Scoring:
    """The sources and rules of the settings."""

    def __init__(self, settings: Settings, client: httpx.AsyncClient, verdicts: Verdicts) -> None:
        """Raises SettingsError for a function or a template that is not there, and where nothing counts."""
        self._settings = settings.aggregator
        self._rules = Rules(settings.compliance)
        self._rules_weight = settings.compliance.weight
        rules_count = bool(self._rules) and self._rules_weight > 0
        if not (self._settings.agent_weight or self._settings.sources or rules_count):
            raise SettingsError(
                "aggregator.agent_weight = 0 with neither aggregator.sources nor compliance.rules that cost something: "
                "no attempt would have a reward; count the agent's own, or add a source, or rules with a weight"
            )
        # Rules end by themselves and have no time limit, so they share no threads with what may hang.
        self._ruling = ThreadPoolExecutor(RULES_THREADS, thread_name_prefix="rules")
        calls = PlainCalls()
        room = asyncio.Semaphore(settings.aggregator.max_judge_calls)
        self._scorers: list[tuple[RewardSource, Scorer]] = []
        for source in settings.aggregator.sources:
            scorer: Scorer = (
                FunctionScorer(source, settings.aggregator, calls)
                if source.function
                else Judge(source, settings.aggregator, client, verdicts, room)
            )
            self._scorers.append((source, scorer))

    async def score(self, attempt: FinishedAttempt) -> list[BaseModel]:
        """What is to be published. Raises InputRefused, with the same, where a required part is missing."""
        try:
            return await self._scored(attempt)
        except (InputRefused, TooManyHung, MemoryError):
            raise
        except Exception as error:  # what nobody thought of in one attempt's records: it must not stop the others
            logger.exception("rollout %s cannot be scored", attempt.rollout_id)
            problem = f"rollout {attempt.rollout_id}: it cannot be scored: {type(error).__name__}: {error}"
            raise InputRefused(FAILED, problem, [rewarded(attempt, [], None, failed=True)]) from error

    async def _scored(self, attempt: FinishedAttempt) -> list[BaseModel]:
        if attempt.status != "succeeded":
            return [passed_on(attempt, self._settings, lacks=False)]
        if INCOMPLETE & set(attempt.partial.split(",")):
            return [passed_on(attempt, self._settings, lacks=self._more_counts(attempt))]
        wanted = [(source, scorer) for source, scorer in self._scorers if source.agent in ("", attempt.agent)]
        results = await asyncio.gather(*(_outcome(scorer, attempt) for _, scorer in wanted))
        parts = [result for result in results if isinstance(result, Part)]
        failed = [
            str(result) if isinstance(result, PartFailed) else f"{source.name} gave no reward"
            for (source, _), result in zip(wanted, results, strict=True)
            if source.required and not isinstance(result, Part)
        ]
        found = await self._violations(attempt) if self._rules else []
        cost = sum(violation.cost for violation in found)
        rewards = [part_reward(attempt, part) for part in parts]
        rewards += self._rules.rewards(attempt.rollout_id, attempt.attempt_id, found)
        violations = -self._rules_weight * cost if self._rules and self._rules_weight else None
        added = total(self._settings, attempt.reward, parts, violations)
        if fault := total_fault(self._settings, attempt.reward, added):
            failed.append(fault)
        # The agent's own reward is a part like the others: without it the trajectory says `no_reward`, as ever.
        lacks_own = bool(self._settings.agent_weight) and attempt.reward is None
        if failed or lacks_own or added is None:
            events: list[BaseModel] = [*rewards, rewarded(attempt, rewards, None, failed=bool(failed))]
            if failed:
                raise InputRefused(FAILED, f"rollout {attempt.rollout_id}: {'; '.join(failed)}", events)
            return events
        value, dimensions = added
        counted = shares(attempt, rewards, dimensions, self._rules_weight)
        rewards = [*rewards, sum_reward(attempt, value, dimensions)]
        return [*rewards, rewarded(attempt, rewards, value, failed=False, counted=counted)]

    def _more_counts(self, attempt: FinishedAttempt) -> bool:
        """Whether anything but the agent's own reward would be a part of this attempt's."""
        is_asked = any(source.agent in ("", attempt.agent) for source, _ in self._scorers)
        return is_asked or (bool(self._rules) and self._rules_weight > 0)

    async def _violations(self, attempt: FinishedAttempt) -> list[Violation]:
        running = asyncio.get_running_loop().run_in_executor(self._ruling, self._rules.violations, attempt.spans)
        return await running


class FunctionScorer:
    """A Python function of the user's: plain ones run in threads of their own."""

    def __init__(self, source: RewardSource, settings: AggregatorSettings, calls: PlainCalls) -> None:
        self._name = source.name
        self._settings = settings
        self._calls = calls
        where = f"aggregator.sources: function of {source.name}"
        self._function: Callable[[FinishedAttempt], Any] = load_object(
            source.function, where, "examples.algorithms.rewards:short_answer"
        )
        if not callable(self._function):
            raise SettingsError(f"{where} = {source.function!r}: is no function; function(attempt) gives a number")

    async def score(self, attempt: FinishedAttempt) -> Part | None:
        """Raises PartFailed; TooManyHung where calls before this one never ended."""
        self._calls.check()
        problem = ""
        for _ in range(self._settings.tries):
            try:
                async with asyncio.timeout(self._settings.timeout_seconds):
                    return self._part(await self._call(attempt))
            except TimeoutError:
                problem = f"no end within {self._settings.timeout_seconds:g} s"
            except Exception as error:  # a function of the user's may raise anything
                problem = f"{type(error).__name__}: {error}"
        raise PartFailed(f"function {self._name}: {problem} ({self._settings.tries} tries)")

    async def _call(self, attempt: FinishedAttempt) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await awaited(self._function(attempt), self._name)
        return await self._calls.run(lambda: self._function(attempt), self._name)

    def _part(self, given: Any) -> Part | None:
        if given is None:
            return None
        values = cast(Mapping[str, Any], given) if isinstance(given, Mapping) else {self._name: given}
        if not 0 < len(values) <= MAX_DIMENSIONS:
            raise ValueError(f"gave {len(values)} values; 1 to {MAX_DIMENSIONS} are allowed")
        numbers = {str(name): float(value) for name, value in values.items()}
        if wrong := next((name for name in numbers if len(name) > MAX_NAME_CHARS or _SURROGATE.search(name)), None):
            raise ValueError(
                f"gave a value named {wrong[:80]!r}; a name is a text of up to {MAX_NAME_CHARS} characters"
            )
        part = Part(self._name, numbers)
        faults = [fault_of(name, value) for name, value in (*numbers.items(), ("the sum of its values", part.value))]
        if fault := next(filter(None, faults), ""):
            raise ValueError(fault)
        return part


async def _outcome(scorer: Scorer, attempt: FinishedAttempt) -> Part | PartFailed | None:
    try:
        return await scorer.score(attempt)
    except PartFailed as error:
        return error
