"""Rules of conduct applied to an attempt's spans: what was violated where, and what it costs. Pure.

    rules ──► spans chosen (agent, operation, tool, when) ──► one check ──► violations, each with its cost

Promises: the same spans and rules give the same violations in the same order; each names its span and, for a pattern,
the range of characters in the field; no rule costs an attempt more than its max_cost: violations beyond it are recorded
at 0. Bounds: MAX_VIOLATIONS of a rule in an attempt, MAX_OF_ATTEMPT of all; what comes after is neither recorded nor
charged.

Expressions are those of `redaction`: what Python and RE2 both have. RE2 runs them, so none is slow (`expressions.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fulgurite.schemas.algorithm_settings import ComplianceRule, ComplianceSettings, Predicate
from fulgurite.schemas.patterns import glob, portable
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.spans import OPERATION_CHAT, OPERATION_TOOL, Span
from fulgurite.streams.algorithms.expressions import Expression

SOURCE = "compliance"
"""Name and source of the rewards that violations become."""

MAX_VIOLATIONS = 1_000
MAX_OF_ATTEMPT = 5_000
MAX_TEXT_CHARS = 512
"""Of the text that a pattern found, in the audit."""

_TOOL_NAME = "gen_ai.tool.name"


@dataclass(frozen=True, slots=True)
class Violation:
    """One breach of one rule."""

    rule: str
    span_id: str
    field: str = ""
    start: int = 0
    end: int = 0
    """Characters start (inclusive) to end (exclusive) of the field; both 0 where the whole span is meant."""
    text: str = ""
    """What is there: the match, or the tool's name."""
    cost: float = 0.0


class Rules:
    """The rules of the settings, compiled."""

    def __init__(self, settings: ComplianceSettings) -> None:
        self.version = settings.version
        self._rules = [_Rule(rule) for rule in settings.rules]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def violations(self, spans: Sequence[Span]) -> list[Violation]:
        """Rule by rule in the order of the settings, then in that of the spans."""
        found = (violation for rule in self._rules for violation in rule.violations(spans))
        return list(islice(found, MAX_OF_ATTEMPT))

    def rewards(self, rollout_id: str, attempt_id: str, found: Iterable[Violation]) -> list[Reward]:
        """The audit: a negative reward for each. The same violation has the same id, however often it is found."""
        return [self._reward(rollout_id, attempt_id, violation) for violation in found]

    def _reward(self, rollout_id: str, attempt_id: str, found: Violation) -> Reward:
        identity = f"{rollout_id}/{attempt_id}/{self.version}/{found.rule}/{found.span_id}/{found.field}/{found.start}"
        return Reward(
            reward_id=hashlib.sha256(identity.encode()).hexdigest()[:32],
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            span_id=found.span_id,
            name=SOURCE,
            value=-found.cost,
            dimensions={found.rule: -found.cost},
            source=SOURCE,
            metadata={
                "rule": found.rule,
                "rules_version": self.version,
                "field": found.field,
                "start": str(found.start),
                "end": str(found.end),
                "text": found.text,
            },
        )


class _Rule:
    def __init__(self, rule: ComplianceRule) -> None:
        self._rule = rule
        self._agent = _like(rule.agent)
        self._tool = _like(rule.tool)
        self._denied = [_like(tool) for tool in rule.deny_tools]
        self._allowed = [_like(tool) for tool in rule.allow_tools]
        self._pattern = Expression(portable(rule.pattern)) if rule.pattern else None
        self._when = [_condition(predicate) for predicate in rule.when]

    def violations(self, spans: Sequence[Span]) -> list[Violation]:
        found: list[Violation] = []
        left = self._rule.max_cost
        for violation in self._check([span for span in spans if self._chosen(span)]):
            if len(found) >= MAX_VIOLATIONS:
                break
            cost = self._rule.cost if left is None else min(self._rule.cost, left)
            left = None if left is None else left - cost
            found.append(replace(violation, cost=cost))
        return found

    def _chosen(self, span: Span) -> bool:
        rule = self._rule
        if rule.operation and span.operation != rule.operation:
            return False
        if rule.agent and not self._agent(span.agent):
            return False
        tool = tool_of(span)
        if (rule.tool or rule.deny_tools or rule.allow_tools) and not tool:
            return False
        if rule.tool and not self._tool(tool):
            return False
        return all(holds(span) for holds in self._when)

    def _check(self, spans: Sequence[Span]) -> Iterator[Violation]:
        rule = self._rule
        if self._pattern is not None:
            for span in spans:
                yield from self._matches(self._pattern, span)
        elif rule.max_calls is not None:
            yield from (Violation(rule.name, span.span_id, text=_named(span)) for span in spans[rule.max_calls :])
        else:
            yield from (Violation(rule.name, span.span_id, text=_named(span)) for span in spans if self._is_bad(span))

    def _is_bad(self, span: Span) -> bool:
        tool = tool_of(span)
        if self._rule.deny_tools:
            return any(like(tool) for like in self._denied)
        if self._rule.allow_tools:
            return not any(like(tool) for like in self._allowed)
        return True

    def _matches(self, pattern: Expression, span: Span) -> Iterator[Violation]:
        field = self._rule.field
        for match in pattern.finditer(as_text(value_of(span, field))):
            text = match.text[:MAX_TEXT_CHARS]
            yield Violation(self._rule.name, span.span_id, field, match.start, match.end, text)


def asked_for_by(spans: Sequence[Span]) -> dict[str, str]:
    """Of each call of a tool the model's call that asked for it, both by span_id: the last one that its agent (any,
    where that has none) had begun by then. Ends are not compared: who answers and who acts have clocks of their own."""
    found: dict[str, str] = {}
    latest: dict[str, str] = {}
    of_any = ""
    for span in sorted(spans, key=lambda span: (span.start_ns, span.operation != OPERATION_CHAT)):
        if span.operation == OPERATION_CHAT:
            latest[span.agent] = of_any = span.span_id
        elif span.operation == OPERATION_TOOL and (asker := latest.get(span.agent, of_any)):
            found[span.span_id] = asker
    return found


def tool_of(span: Span) -> str:
    """The tool that a span is a call of; empty where it is none."""
    if span.operation != OPERATION_TOOL:
        return ""
    return str(span.attributes.get(_TOOL_NAME) or span.name.removeprefix(f"{OPERATION_TOOL} "))


def value_of(span: Span, field: str) -> Any:
    """A field by the name it has in rules; None where the span has none."""
    if field.startswith("attributes."):
        return span.attributes.get(field.removeprefix("attributes."))
    if field.startswith("state."):
        return span.state.get(field.removeprefix("state."))
    if field == "tool":
        return tool_of(span)
    if field == "duration_seconds":
        return (span.end_ns - span.start_ns) / 1e9
    return getattr(span, field)


def as_text(value: Any) -> str:
    """As an expression sees it: what is no text, as its JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _named(span: Span) -> str:
    return (tool_of(span) or span.name)[:MAX_TEXT_CHARS]


def _like(text: str) -> Callable[[str], bool]:
    return Expression(glob(text)).found_in


def _condition(predicate: Predicate) -> Callable[[Span], bool]:
    """Whether it holds for a span. A field that is not there fulfils nothing but `ne` and `exists` = false."""
    compare = _COMPARISONS[predicate.op](predicate.value)
    return lambda span: compare(value_of(span, predicate.field))


def _ordered(compare: Callable[[float, float], bool]) -> Callable[[Any], Callable[[Any], bool]]:
    def with_value(value: Any) -> Callable[[Any], bool]:
        return lambda found: isinstance(found, int | float) and not isinstance(found, bool) and compare(found, value)

    return with_value


def _matching(value: Any) -> Callable[[Any], bool]:
    expression = Expression(portable(value))
    return lambda found: expression.found_in(as_text(found))


_COMPARISONS: dict[str, Callable[[Any], Callable[[Any], bool]]] = {
    "eq": lambda value: lambda found: found == value,
    "ne": lambda value: lambda found: found != value,
    "lt": _ordered(lambda found, value: found < value),
    "le": _ordered(lambda found, value: found <= value),
    "gt": _ordered(lambda found, value: found > value),
    "ge": _ordered(lambda found, value: found >= value),
    "in": lambda value: lambda found: found in value,
    "contains": lambda value: lambda found: value in as_text(found),
    "matches": _matching,
    "exists": lambda value: lambda found: (found not in (None, "")) == value,
}
