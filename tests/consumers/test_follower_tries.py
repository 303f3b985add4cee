"""When a version is to be blamed for the end of its server."""

from __future__ import annotations

import time

import pytest

from fulgurite.consumers.follower.tries import LOAD_TRIES, Tries

ONE, OTHER = (1, "v1", "a"), (2, "v2", "b")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def end_after(tries: Tries, clock: Clock, seconds: float, *, away: float = 60.0) -> None:
    """It is loaded, ends, is away for the time of a start, and comes back."""
    tries.loaded(ONE)
    clock.now += seconds
    tries.away()
    clock.now += away
    tries.away()
    tries.observed(ONE, served=False, restarted=True)


def test_what_is_ended_soon_after_each_load_is_deadly(clock: Clock):
    tries = Tries(10.0)
    for _ in range(LOAD_TRIES):
        assert not tries.is_deadly(ONE)
        end_after(tries, clock, 5.0)
    assert tries.is_deadly(ONE)
    assert not tries.is_deadly(OTHER)
    tries.forget(ONE)
    assert not tries.is_deadly(ONE)


def test_what_was_outlived_in_between_is_not(clock: Clock):
    tries = Tries(10.0)
    for _ in range(LOAD_TRIES):
        for _ in range(LOAD_TRIES - 1):
            end_after(tries, clock, 5.0)
        end_after(tries, clock, 11.0)
        for _ in range(LOAD_TRIES - 1):
            end_after(tries, clock, 5.0)
        tries.loaded(ONE)
        clock.now += 11.0
        tries.observed(ONE, served=True, restarted=False)
    assert not tries.is_deadly(ONE)


def test_neither_a_server_that_did_not_answer_once_nor_one_that_another_loaded_into_has_ended(clock: Clock):
    tries = Tries(10.0)
    for _ in range(LOAD_TRIES):
        tries.loaded(ONE)
        tries.away()
        tries.observed(ONE, served=True, restarted=False)
        clock.now += 11.0
        tries.observed(ONE, served=False, restarted=True)
        tries.loaded(ONE)
        tries.observed(ONE, served=False, restarted=False)
        tries.loaded(ONE)
        tries.observed(OTHER, served=False, restarted=True)
        tries.observed(ONE, served=False, restarted=True)
    assert not tries.is_deadly(ONE)


def test_loads_that_failed_count_until_one_succeeds(clock: Clock):
    tries = Tries(10.0)
    for _ in range(LOAD_TRIES - 1):
        assert not tries.failed(ONE, counts=True)
    assert not tries.failed(ONE, counts=False)
    end_after(tries, clock, 1.0)
    assert not tries.is_deadly(ONE)
    for _ in range(LOAD_TRIES - 1):
        assert not tries.failed(ONE, counts=True)
    assert tries.failed(ONE, counts=True)
