"""Seats, lines and breakers: pure rules over random histories."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.producers.gateway.breaker import Breaker
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.places import Capacity, Places, QueueTimeout, Seat, choose

URLS = st.lists(st.integers(0, 50).map("http://h{}:1".format), min_size=2, max_size=8, unique=True)
FOR_EVER = float("inf")


def capacity(url: str = "http://h:1", most: int = 0, most_waiting: int = 0) -> Capacity:
    return Capacity(url, Breaker(3, 1.0, 8.0), most, most_waiting)


def home(capacities: list[Capacity], pin: str) -> str:
    found = choose(capacities, pin, 0)
    assert found
    return found.url


@given(URLS, st.lists(st.text(max_size=20), unique=True, max_size=50), st.data())
def test_a_backend_that_goes_moves_only_its_own_pins(urls: list[str], pins: list[str], data: st.DataObject):
    capacities = [capacity(url) for url in urls]
    pins = [pin for pin in pins if pin]
    before = {pin: home(capacities, pin) for pin in pins}
    gone = data.draw(st.sampled_from(capacities))
    gone.well = False
    for pin in pins:
        assert before[pin] == gone.url or home(capacities, pin) == before[pin]
    gone.well = True
    assert {pin: home(capacities, pin) for pin in pins} == before
    data.draw(st.randoms()).shuffle(capacities)
    assert {pin: home(capacities, pin) for pin in pins} == before, "the order of the settings must not matter"


def test_pins_are_spread_evenly():
    capacities = [capacity(f"http://h{index}:1") for index in range(4)]
    counts = Counter(home(capacities, f"rollout-{index}") for index in range(4_000))
    assert min(counts.values()) > 900


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=8))
def test_without_a_pin_the_least_busy_that_has_room_is_chosen(drawn: list[tuple[bool, int]]):
    capacities = [capacity(f"http://h{index}:1", most=8) for index in range(len(drawn))]
    for one, (well, in_flight) in zip(capacities, drawn, strict=True):
        one.well, one.in_flight = well, in_flight
    found = choose(capacities, "", 0)
    free = [one for one in capacities if one.well and one.in_flight < 8]
    assert (found is None) == (not free)
    assert found is None or found.in_flight == min(one.in_flight for one in free)


def test_a_breaker_opens_after_failures_in_a_row_and_doubles_its_pause():
    breaker = Breaker(3, 1.0, 3.0)
    assert [breaker.failed(0, breaker.entered(0)) for _ in range(2)] == [False, False]
    breaker.succeeded()
    era = breaker.entered(0)
    assert [breaker.failed(0, era) for _ in range(4)] == [False, False, True, False]
    assert (breaker.state(0.9), breaker.allows(0.9), breaker.allows_at()) == ("open", False, 1.0)
    assert (breaker.state(1.0), breaker.allows(1.0)) == ("half-open", True)
    probe = breaker.entered(1.0)
    assert not breaker.allows(1.5), "one probe at a time"
    assert breaker.allows(2.0), "one that says nothing gives way"
    assert breaker.failed(1.5, probe)
    assert breaker.allows_at() == 3.5
    assert not breaker.failed(1.5, era), "old news"
    assert breaker.failed(3.5, breaker.entered(3.5))
    assert breaker.allows_at() == 6.5, "the pause has a bound"
    assert breaker.succeeded()
    assert not breaker.succeeded()
    assert breaker.state(0) == "closed"


def test_a_breaker_lets_others_in_when_an_answer_has_begun_and_opens_when_it_breaks():
    breaker = Breaker(2, 1.0, 8.0)
    assert not breaker.works(), "nothing is closed by it that was not open"
    for now in (0.0, 0.0):
        breaker.failed(now, breaker.entered(now))
    probe = breaker.entered(1.0)
    assert breaker.works()
    assert breaker.state(1.0) == "closed"
    assert breaker.failed(1.5, probe), "one failure, not two"
    assert breaker.state(2.0) == "open"
    breaker.works()
    breaker.succeeded()
    assert not breaker.failed(9.0, breaker.entered(9.0)), "after a whole answer they count from none"


@given(st.lists(st.tuples(st.sampled_from(["ask", "good", "bad"]), st.floats(0, 3)), max_size=60))
def test_a_breaker_always_lets_somebody_through_in_the_end(history: list[tuple[str, float]]):
    breaker = Breaker(2, 0.5, 4.0)
    now, era = 0.0, 0
    for what, pause in history:
        now += pause
        if what == "ask" and breaker.allows(now):
            era = breaker.entered(now)
        elif what == "good":
            breaker.succeeded()
            assert breaker.allows(now)
        elif what == "bad":
            breaker.failed(now, era)
        assert breaker.allows(now + 4.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 6), st.integers(0, 3))
async def test_seats_are_freed_exactly_once_under_random_cancels(seed: int, most: int, each: int):
    rng = random.Random(seed)
    capacities = tuple(capacity(f"http://h{index}:1", each) for index in range(3))
    places = Places(most, 1_000)

    async def one() -> None:
        mine = capacities[rng.randrange(3) :]
        with places.admitted(mine):
            now = asyncio.get_running_loop().time()
            seat = await places.take(mine, str(rng.random()), now + 1, now + 1)
            try:
                assert places.in_flight <= most
                assert all(not each or one.in_flight <= each for one in capacities)
                await asyncio.sleep(rng.uniform(0, 0.003))
            finally:
                seat.leave()
                seat.leave()

    tasks = [asyncio.create_task(one()) for _ in range(40)]
    for task in rng.sample(tasks, 20):
        await asyncio.sleep(rng.uniform(0, 0.002))
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for task in tasks if not task.cancelled() and (error := task.exception())] == []
    assert (places.in_flight, places.waiting) == (0, 0)
    assert [one.in_flight for one in capacities] == [0, 0, 0]
    places.close()


async def test_a_seat_given_while_its_taker_is_cancelled_is_left_again():
    one = capacity(most=1)
    places = Places(10, 10)
    seat = await places.take((one,), "", FOR_EVER, FOR_EVER)
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(places.take((one,), "", loop.time() + 5, loop.time() + 5))
    await asyncio.sleep(0.01)
    seat.leave()  # gives the seat to whoever waits …
    assert one.in_flight == 1
    waiting.cancel()  # … who is gone before they hear of it
    await asyncio.gather(waiting, return_exceptions=True)
    assert one.in_flight == 0


async def test_lines_are_served_in_order_and_the_longest_waiting_head_first():
    one, two = capacity("http://h1:1"), capacity("http://h2:1")
    places = Places(1, 10)
    held = await places.take((one,), "", FOR_EVER, FOR_EVER)
    served: list[int] = []

    async def wait(number: int, *where: Capacity) -> None:
        until = asyncio.get_running_loop().time() + 5
        seat = await places.take(where, "", until, until)
        served.append(number)
        seat.leave()

    tasks: list[asyncio.Task[None]] = []
    for number, where in enumerate([(one,), (two,), (one, two), (one,), (two,)]):
        tasks.append(asyncio.create_task(wait(number, *where)))
        await asyncio.sleep(0)
    held.leave()
    await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 3, 4]


async def test_who_waits_for_an_open_breaker_goes_when_it_lets_one_through():
    one = Capacity("http://h:1", Breaker(1, 0.1, 0.1))
    loop = asyncio.get_running_loop()
    one.breaker.failed(loop.time(), 0)
    places = Places(10, 10)
    began = loop.time()
    seats: list[Seat] = []
    for at in (0.1, 0.2):  # the probe, and the next one since that says nothing
        seats.append(await places.take((one,), "", began, began + 5))
        assert at - 0.01 < loop.time() - began < at + 0.09
    with pytest.raises(QueueTimeout) as caught:
        await places.take((one,), "", loop.time(), loop.time() + 0.05)
    assert not caught.value.busy
    for seat in seats:
        seat.leave()
    places.close()


async def test_the_queue_has_an_end():
    one, other = capacity("http://h1:1", most=1), capacity("http://h2:1")
    places = Places(10, 2)

    async def wait() -> None:
        with places.admitted((one,)):
            until = asyncio.get_running_loop().time() + 0.1
            await places.take((one,), "", until, until)

    with places.admitted((one,)):
        seat = await places.take((one,), "", FOR_EVER, FOR_EVER)
        waiting = [asyncio.create_task(wait()) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert places.waiting == 2
        with pytest.raises(ApiError, match="max_queued_requests") as caught:
            await wait()
        assert caught.value.status == 429
        with places.admitted((other,)):  # goes straight through: the queue is not in its way
            pass
        for late in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(late, QueueTimeout)
            assert late.busy
        seat.leave()
    assert places.waiting == 0
