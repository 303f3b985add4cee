"""Token budgets and deadlines of calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.producers.gateway.budgets import Budgets, allowed_seconds
from fulgurite.producers.gateway.errors import ApiError


def refused(budgets: Budgets, rollout_id: str) -> bool:
    try:
        budgets.check(rollout_id)
    except ApiError:
        return True
    return False


@given(st.lists(st.tuples(st.sampled_from(["r1", "r2", "r3"]), st.integers(0, 50)), max_size=60))
def test_a_rollout_is_refused_exactly_when_it_has_used_its_tokens(calls: list[tuple[str, int]]):
    budgets = Budgets(100)
    used: dict[str, int] = {}
    for rollout_id, tokens in calls:
        assert refused(budgets, rollout_id) == (used.get(rollout_id, 0) >= 100)
        budgets.spent(rollout_id, tokens)
        used[rollout_id] = used.get(rollout_id, 0) + tokens


def test_a_spent_budget_is_429_that_clients_do_not_retry():
    budgets = Budgets(10)
    budgets.spent("r1", 12)
    with pytest.raises(ApiError, match=r"r1 has used 12 tokens; .*gateway\.max_rollout_tokens is 10") as caught:
        budgets.check("r1")
    assert (caught.value.status, caught.value.code, caught.value.retriable) == (429, "token_budget", False)
    assert caught.value.headers() == [(b"x-should-retry", b"false")]


def test_no_bound_and_no_rollout_are_never_refused():
    for budgets, rollout_id in ((Budgets(0), "r1"), (Budgets(1), "")):
        budgets.spent(rollout_id, 1_000_000)
        budgets.check(rollout_id)


def test_memory_is_bounded_and_the_silent_are_forgotten_first():
    budgets = Budgets(10, max_rollouts=3)
    for rollout_id in ("r1", "r2", "r3", "r1", "r4"):
        budgets.spent(rollout_id, 10)
    assert [refused(budgets, rollout_id) for rollout_id in ("r1", "r2", "r3", "r4")] == [True, False, True, True]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 120.0),
        ({"x-request-timeout": "5"}, 5.0),
        ({"x-request-timeout": "0.5"}, 0.5),
        ({"x-request-timeout": "900"}, 120.0),
        ({"x-request-timeout": "1e-12"}, 0.001),
        ({"x-stainless-read-timeout": "30.0"}, 30.0),
        ({"x-stainless-read-timeout": "600", "x-stainless-timeout": "20"}, 20.0),
        ({"x-stainless-read-timeout": "NOT_GIVEN"}, 120.0),
        ({"x-stainless-read-timeout": "5", "x-request-timeout": "7"}, 5.0),
    ],
)
def test_an_agent_may_ask_for_less_time(headers: dict[str, str], seconds: float):
    assert allowed_seconds(headers, 120.0) == seconds


@pytest.mark.parametrize("said", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(said: str):
    with pytest.raises(ApiError, match="x-request-timeout must be seconds") as caught:
        allowed_seconds({"x-request-timeout": said}, 120.0)
    assert caught.value.status == 400
