"""Rules and what violates them: hand cases, and bounds that hold for whatever spans there are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fulgurite.schemas.algorithm_settings import ComplianceRule, ComplianceSettings, Predicate
from fulgurite.schemas.spans import Span
from fulgurite.streams.algorithms.compliance import MAX_VIOLATIONS, Rules, Violation


def span(number: int, **fields: Any) -> Span:
    values: dict[str, Any] = {"name": "chat", "start_ns": number, "end_ns": number + 1, **fields}
    return Span(span_id=f"s{number}", **values)


def tool(number: int, name: str, **fields: Any) -> Span:
    named = {"gen_ai.tool.name": name, **fields.pop("attributes", {})}
    return span(number, name=f"execute_tool {name}", operation="execute_tool", attributes=named, **fields)


def found(spans: list[Span], **rule: Any) -> list[Violation]:
    settings = ComplianceSettings(rules=[ComplianceRule(name="rule", **rule)])
    return Rules(settings).violations(spans)


def test_a_pattern_names_span_and_range() -> None:
    spans = [span(1, output="call me at 555-1234 or 555-9999"), span(2, output="no"), span(3, input="555-0000")]
    assert found(spans, pattern="[0-9]{3}-[0-9]{4}", cost=0.5) == [
        Violation("rule", "s1", "output", 11, 19, "555-1234", 0.5),
        Violation("rule", "s1", "output", 23, 31, "555-9999", 0.5),
    ]


def test_tools_are_denied_and_allowed_by_name() -> None:
    spans = [tool(1, "shell.run"), tool(2, "search"), span(3), tool(4, "shell.rm")]
    assert [(v.span_id, v.text) for v in found(spans, deny_tools=["shell.*"])] == [
        ("s1", "shell.run"),
        ("s4", "shell.rm"),
    ]
    assert [v.span_id for v in found(spans, allow_tools=["search", "*.run"])] == ["s4"]


def test_calls_beyond_the_most_are_violations() -> None:
    spans = [tool(1, "search"), tool(2, "search"), tool(3, "other"), tool(4, "search")]
    assert [v.span_id for v in found(spans, tool="search", max_calls=2)] == ["s4"]
    assert [v.span_id for v in found(spans, operation="execute_tool", max_calls=0)] == ["s1", "s2", "s3", "s4"]


def test_costs_are_capped_and_still_recorded() -> None:
    costs = [v.cost for v in found([span(i) for i in range(4)], forbid=True, cost=0.4, max_cost=1.0)]
    assert costs == pytest.approx([0.4, 0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ({"field": "status", "value": "error"}, ["s2"]),
        ({"field": "status", "op": "ne", "value": "error"}, ["s1", "s3"]),
        ({"field": "attributes.http.status", "op": "ge", "value": 400}, ["s2"]),
        ({"field": "attributes.http.status", "op": "lt", "value": 400}, ["s1"]),
        ({"field": "attributes.http.status", "op": "exists", "value": False}, ["s3"]),
        ({"field": "attributes.http.status", "op": "in", "value": [200, 204]}, ["s1"]),
        ({"field": "state.user", "op": "eq", "value": "root"}, ["s3"]),
        ({"field": "output", "op": "contains", "value": "secret"}, ["s1"]),
        ({"field": "output", "op": "matches", "value": "(?i)SECRET[!]"}, ["s1"]),
        ({"field": "duration_seconds", "op": "gt", "value": 1.5}, ["s3"]),
        ({"field": "tool", "value": "search"}, ["s2"]),
        ({"field": "agent", "op": "exists"}, []),
    ],
)
def test_predicates(predicate: dict[str, Any], expected: list[str]) -> None:
    spans = [
        span(1, attributes={"http.status": 200}, output="a secret!"),
        tool(2, "search", status="error", attributes={"http.status": 500}),
        span(3, state={"user": "root"}, end_ns=2_000_000_003),
    ]
    assert [v.span_id for v in found(spans, forbid=True, when=[Predicate(**predicate)])] == expected


def test_the_same_violation_has_the_same_id() -> None:
    rules = Rules(ComplianceSettings(version="v2", rules=[ComplianceRule(name="no-b", pattern="b", cost=2)]))
    violations = rules.violations([span(1, output="abba")])
    first, second = rules.rewards("r", "a", violations), rules.rewards("r", "a", violations)
    assert [reward.reward_id for reward in first] == [reward.reward_id for reward in second]
    assert len({reward.reward_id for reward in first}) == 2
    assert first[1].value == -2
    assert first[1].metadata == {
        "rule": "no-b",
        "rules_version": "v2",
        "field": "output",
        "start": "2",
        "end": "3",
        "text": "b",
    }


@given(outputs=st.lists(st.text("ab", max_size=1_200), max_size=4), cap=st.floats(0.1, 50))
def test_no_rule_costs_more_than_its_most_nor_finds_more_than_the_bound(outputs: list[str], cap: float) -> None:
    spans = [span(number, output=output) for number, output in enumerate(outputs)]
    violations = found(spans, pattern="a", cost=0.5, max_cost=cap)
    assert len(violations) == min(MAX_VIOLATIONS, sum(output.count("a") for output in outputs))
    assert sum(v.cost for v in violations) == pytest.approx(min(cap, 0.5 * len(violations)))
    assert all(outputs[int(v.span_id[1:])][v.start : v.end] == "a" for v in violations)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"pattern": "a", "forbid": True},
        {"pattern": "(?=a)"},
        {"forbid": True, "cost": 0},
        {"pattern": "a", "field": "password"},
        {"forbid": True, "when": [{"field": "status", "op": "lt", "value": "x"}]},
        {"forbid": True, "when": [{"field": "status", "op": "in", "value": "x"}]},
    ],
)
def test_wrong_rules_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ComplianceRule.model_validate({"name": "rule", **wrong})
    with pytest.raises(ValidationError, match="same name"):
        ComplianceSettings.model_validate({"rules": [{"name": "one", "forbid": True}] * 2})
