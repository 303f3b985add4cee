"""What an agent touches: loading it, its rollout, its outbox, rewards from other processes; and how light that is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from time import time
from typing import Any, cast

import pytest
from aiokafka.structs import RecordMetadata

from fulgurite.producers import outbox as outbox_module
from fulgurite.producers import rollout as rollout_module
from fulgurite.producers.agents import AgentCalls, load_agent, reward_of
from fulgurite.producers.outbox import Outbox
from fulgurite.producers.publisher import Acknowledgement, Publisher
from fulgurite.producers.rewards import emit_reward, emit_reward_async
from fulgurite.producers.rollout import RolloutContext
from fulgurite.schemas.codec import decode
from fulgurite.schemas.coordinator import Attempt, AttemptedRollout
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, FulguriteError, SettingsError, Undelivered
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import REWARDS, SPANS, Topic


class FakePublisher:
    """Keeps what it is given; acknowledges when told to."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes | None]] = []
        self.dead: list[DeadLetter] = []
        self.acknowledgements: list[Acknowledgement] = []
        self.full = 0

    async def publish_bytes(self, topic: Topic, key: bytes | None, value: bytes | None) -> Acknowledgement:
        if self.full:
            self.full -= 1
            raise BufferFull("full")
        self.records.append((topic.name, value))
        return self._acknowledgement()

    async def publish_dead_letter(self, dead: DeadLetter) -> Acknowledgement:
        self.dead.append(dead)
        return self._acknowledgement()

    def _acknowledgement(self) -> Acknowledgement:
        self.acknowledgements.append(asyncio.get_running_loop().create_future())
        return self.acknowledgements[-1]

    def acknowledge(self) -> None:
        for one in self.acknowledgements:
            if not one.done():
                one.set_result(cast(RecordMetadata, None))


def an_outbox(publisher: FakePublisher, max_record_bytes: int = 10_000) -> Outbox:
    return Outbox(cast(Publisher, publisher), KafkaSettings().topic, max_record_bytes)


def a_rollout(outbox: Outbox) -> RolloutContext:
    attempt = Attempt(rollout_id="r1", attempt_id="a1", sequence_id=1, status="preparing", start_time=time())
    attempted = AttemptedRollout(rollout_id="r1", status="preparing", start_time=time(), attempt=attempt)
    return RolloutContext(attempted, gateway_url="http://gateway:4750/", agent="solver", outbox=outbox)


async def test_flush_waits_for_every_acknowledgement_in_order_of_put() -> None:
    publisher = FakePublisher()
    publisher.full = 2  # the broker is away for a moment
    outbox = an_outbox(publisher)
    for number in range(5):
        outbox.put(REWARDS, "r1", Reward(rollout_id="r1", reward_id=str(number), value=number))
    flushing = asyncio.create_task(outbox.flush())
    await asyncio.sleep(0.5)
    assert not flushing.done()
    ids = [Reward.model_validate_json(value or b"").reward_id for _, value in publisher.records]
    assert ids == ["0", "1", "2", "3", "4"]
    publisher.acknowledge()
    await flushing


async def test_flush_reports_what_was_not_delivered() -> None:
    publisher = FakePublisher()
    outbox = an_outbox(publisher)
    a_rollout(outbox).reward(1.0)
    await asyncio.sleep(0.01)
    publisher.acknowledgements[0].set_exception(Undelivered(1, TimeoutError()))
    with pytest.raises(Undelivered, match="1 records"):
        await outbox.flush()


async def test_an_event_too_large_becomes_a_dead_letter() -> None:
    publisher = FakePublisher()
    outbox = an_outbox(publisher, max_record_bytes=2_000)
    with a_rollout(outbox).span("big", input="x" * 5_000):
        pass
    await asyncio.sleep(0.01)
    publisher.acknowledge()
    await outbox.flush()
    assert publisher.records == []
    assert (publisher.dead[0].reason, publisher.dead[0].key) == ("too_large", b"r1")


async def test_the_outbox_is_bounded_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_WAITING_RECORDS", 2)
    rollout = a_rollout(outbox := an_outbox(FakePublisher()))
    rollout.reward(1.0)
    rollout.reward(2.0)
    with pytest.raises(BufferFull, match="2 records"):
        rollout.reward(3.0)
    outbox.allow(1)
    rollout.reward(3.0)
    outbox.close()
    with pytest.raises(FulguriteError, match="the attempt is over"):
        rollout.reward(4.0)


async def test_a_span_takes_what_json_cannot_hold_and_records_the_error() -> None:
    publisher = FakePublisher()
    rollout = a_rollout(an_outbox(publisher))

    def fail() -> None:
        with rollout.span("odd", input={"path": Path("/x")}, attributes={"object": {1, 2}}) as span:
            assert rollout.traceparent == span.traceparent
            raise KeyError("gone")

    with pytest.raises(KeyError):
        fail()
    await asyncio.sleep(0.01)
    text = (publisher.records[0][1] or b"").decode()
    assert publisher.records[0][0] == SPANS.name
    assert "KeyError: 'gone'" in text
    assert "/x" in text


async def test_what_utf8_or_json_cannot_hold_is_cleaned_and_never_raises() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    publisher = FakePublisher()
    rollout = a_rollout(an_outbox(publisher))
    circle: list[Any] = []
    circle.append(circle)
    odd: dict[str, Any] = {"half \ud83d": "a\ud83d", "é": float("nan"), "inf": [float("inf")], "mute": Mute()}
    with rollout.span("n\ud83d", input="in\ud83d", attributes=odd, state={"s\ud83d": circle}) as span:
        span.output = {(1, 2): "a tuple is no key"}
        span.error = "bad \ud83d"
    rollout.reward(1.0, name="style \ud83d", metadata={"why\ud83d": "so\ud83d"})
    await asyncio.sleep(0.01)
    event, reward = decode(Span, publisher.records[0][1]), decode(Reward, publisher.records[1][1])
    assert (event.name, event.input, event.status_message) == ("n?", "in?", "bad ?")
    assert event.output == "{(1, 2): 'a tuple is no key'}"
    assert event.attributes == {"half ?": "a?", "é": "NaN", "inf": ["Infinity"], "mute": "<Mute>"}
    assert event.state == {"s?": "[[...]]"}
    assert (reward.name, reward.metadata) == ("style ?", {"why?": "so?"})


async def test_the_rewards_of_an_attempt_are_bounded_but_for_the_final_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "MAX_REWARDS", 2)
    rollout = a_rollout(an_outbox(FakePublisher()))
    rollout.reward(1.0)
    rollout.reward(2.0)
    with pytest.raises(FulguriteError, match="gave 2 rewards, the bound of one attempt"):
        rollout.reward(3.0)
    rollout.allow_final_reward()
    rollout.reward(3.0)


async def test_the_environment_leads_other_processes_to_the_rollout(
    monkeypatch: pytest.MonkeyPatch, kafka_settings: KafkaSettings
) -> None:
    environment = a_rollout(an_outbox(FakePublisher())).environment()
    assert environment["OPENAI_BASE_URL"] == "http://gateway:4750/rollout/r1/attempt/a1/v1"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", environment["OTEL_RESOURCE_ATTRIBUTES"])
    async with Publisher(kafka_settings) as publisher:
        reward = await emit_reward_async(publisher, 0.5)
        assert (reward.rollout_id, reward.attempt_id) == ("r1", "a1")
        monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES")
        with pytest.raises(FulguriteError, match="which rollout"):
            await emit_reward_async(publisher, 0.5)
        assert publisher.delivered == 1
    with pytest.raises(FulguriteError, match="needs publisher"):
        emit_reward(1.0, rollout_id="r1")


def test_agents_are_checked_when_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loaded_agents.py").write_text(
        "async def good(task, rollout): ...\ndef plain(task, rollout, extra=1): ...\ndef short(task): ...\nnumber = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_agent("loaded_agents:good").is_async
    assert not load_agent("loaded_agents:plain").is_async
    for spec, message in {
        "loaded_agents": "module:function",
        "no_such_module:x": "cannot import no_such_module",
        "loaded_agents:missing": "has no missing",
        "loaded_agents:short": r"cannot be called with \(task, rollout\)",
        "loaded_agents:number": "is a int, not a function",
    }.items():
        with pytest.raises(SettingsError, match=message):
            load_agent(spec)


class Pair:
    """As an array of two numbers."""

    def __float__(self) -> float:
        raise TypeError("only arrays of length 1 can be converted")


def test_rewards_returned_are_numbers_or_nothing() -> None:
    assert (reward_of(None), reward_of(True), reward_of(2)) == (None, 1.0, 2.0)
    for wrong in ("1", {}, float("inf"), 10**400, Pair()):
        with pytest.raises(ValueError, match="expected a finite number or None"):
            reward_of(wrong)


async def test_a_thread_that_exits_or_stops_iterating_has_failed() -> None:
    def call(error: BaseException) -> Any:
        raise error

    calls = AgentCalls()
    for error in (SystemExit(2), StopIteration("x"), ValueError("bad")):
        with pytest.raises(Exception, match=r"exited with|StopIteration|bad"):
            await calls.run_in_thread(lambda error=error: call(error))
    assert calls.hung == 0


def test_the_agents_side_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fulgurite.producers import agents, coordinator_client, exporter, publisher, rewards, runner\n"
        "heavy = {'torch', 'clickhouse_connect', 'starlette', 'uvicorn', 'aiohttp', 'faststream', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
