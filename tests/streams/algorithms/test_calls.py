"""Plain functions of a user's that hang, end oddly, or refuse badly: nothing but their own input suffers; no broker."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from aiokafka.structs import ConsumerRecord

from fulgurite.schemas.settings import Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.streams.algorithms.aggregator.scoring import Scoring
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.calls import PlainCalls, TooManyHung
from fulgurite.streams.algorithms.definition import Algorithm, InputRefused
from fulgurite.streams.algorithms.work import Worker
from fulgurite.streams.transactions import Outgoing

LET_GO = threading.Event()
LARGE = Span(rollout_id="r", span_id="s", name="chat", start_ns=1, end_ns=2, output="汉" * 4_000_000)


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    LET_GO.clear()
    yield
    LET_GO.set()


def hanging(attempt: FinishedAttempt) -> float:
    if attempt.rollout_id == "bad":
        LET_GO.wait(30)
    return 1.0


def found_nothing(attempt: FinishedAttempt) -> float:
    return next(iter([]))


def attempt(rollout_id: str) -> FinishedAttempt:
    span = Span(span_id="s", name="chat", operation="chat", start_ns=1, end_ns=2, output="x")
    return FinishedAttempt(rollout_id=rollout_id, attempt_id="a", status="succeeded", spans=[span], reward=1.0)


def record() -> ConsumerRecord[bytes | None, bytes | None]:
    return ConsumerRecord("fulgurite.trajectories", 0, 5, 0, 0, b"k", b"{}", None, 1, 2, [])


async def given(function: Callable[[Any], Any], **settings: Any) -> list[Outgoing]:
    """What comes of one input."""
    worker = Worker(Settings.model_validate({"algorithm": settings}), Algorithm("mine", function))
    return await worker.on_group([], [record()])


def words(found: list[Outgoing]) -> str:
    (letter,) = found
    return b" ".join(value for _, value in letter.headers or ()).decode()


async def test_a_reward_function_that_hangs_stops_neither_rules_nor_other_attempts() -> None:
    settings = Settings.model_validate(
        {
            "aggregator": {
                "timeout_seconds": 0.05,
                "tries": 3,
                "sources": [{"name": "f", "function": f"{__name__}:hanging", "required": False}],
            },
            "compliance": {"rules": [{"name": "r", "operation": "chat", "pattern": "zzz"}]},
        }
    )
    async with httpx.AsyncClient() as client:
        scoring = Scoring(settings, client, Verdicts(None, 10))
        async with asyncio.timeout(20):
            for _ in range(15):  # 45 threads: more than the event loop's own pool has
                *_, bad = await scoring.score(attempt("bad"))
                assert isinstance(bad, Trajectory)
                assert bad.reward == 1.0, "the sum without a part that is not required"
            *_, good = await scoring.score(attempt("good"))
            await asyncio.to_thread(lambda: None)
    assert isinstance(good, Trajectory)
    assert good.reward == 2.0


async def test_too_many_hung_calls_end_the_process_with_words_after_what_was_begun() -> None:
    calls = PlainCalls(max_hung=2)
    for _ in range(2):
        calls.check()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await calls.run(lambda: LET_GO.wait(30), "f")
    with pytest.raises(TooManyHung, match="2 calls of functions hang after their time limit"):
        calls.check()
    LET_GO.set()
    async with asyncio.timeout(5):
        while True:
            try:
                calls.check()
                break
            except TooManyHung:
                await asyncio.sleep(0.01)


async def test_stop_iteration_and_exit_are_failures_at_once() -> None:
    begun = time.monotonic()
    assert "mine raised StopIteration" in words(await given(lambda _: next(iter([])), tries=1, timeout_seconds=30))
    assert "mine raised SystemExit" in words(await given(lambda _: sys.exit(3), tries=1))

    async def leaving(_: object) -> None:
        sys.exit(3)

    assert "mine raised SystemExit" in words(await given(leaving, tries=1))
    settings = Settings.model_validate(
        {"aggregator": {"tries": 1, "sources": [{"name": "f", "function": f"{__name__}:found_nothing"}]}}
    )
    async with httpx.AsyncClient() as client:
        with pytest.raises(InputRefused, match="f raised StopIteration"):
            await Scoring(settings, client, Verdicts(None, 10)).score(attempt("r"))
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (InputRefused("too_bad", "m", [Settings()]), "a Settings cannot be published"),
        (InputRefused("too_bad", "m", [LARGE]), "RecordTooLarge"),
        (InputRefused(3, "m"), "reason must be a text"),  # pyright: ignore[reportArgumentType]
        (ValueError("half a pair: \ud800"), "half a pair: ?"),
    ],
    ids=("no event", "too large", "no text", "half a pair"),
)
async def test_what_cannot_be_published_of_a_refusal_is_a_failure_like_any_other(
    refusal: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # xdist cannot bring half a pair to its parent
    tried: list[object] = []

    def refusing(given: object) -> None:
        tried.append(given)
        raise refusal

    found = words(await given(refusing, tries=2))
    assert "algorithm_failed" in found
    assert said in found
    assert len(tried) == 2
