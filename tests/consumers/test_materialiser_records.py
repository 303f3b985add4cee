"""Every record of every topic becomes a row or a dead letter: with the real broker and the real engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import clickhouse_connect
from aiokafka import AIOKafkaProducer

from fulgurite.consumers.materialiser import serve
from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import AttemptFinished, AttemptStarted, RolloutFinished, RolloutQueued, RolloutRequeued
from fulgurite.schemas.settings import ClickHouseSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.training import DroppedRollout, RunFinished, RunStarted, TrainingStep, VersionApplied
from fulgurite.schemas.trajectories import LeftOutCall, Trajectory
from fulgurite.schemas.workers import WorkerHeartbeat

SHA = "a" * 64


def ask(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    with clickhouse_connect.get_client(
        **connection_options(settings.clickhouse), database=settings.clickhouse.database
    ) as client:
        return [tuple(row) for row in client.query(sql).result_rows]


async def until(
    settings: Settings, sql: str, wanted: Callable[[list[tuple[Any, ...]]], bool], seconds: float = 30
) -> Any:
    rows: list[tuple[Any, ...]] = []
    for _ in range(int(seconds / 0.1)):
        with contextlib.suppress(Exception):
            rows = await asyncio.to_thread(ask, settings, sql)
            if wanted(rows):
                return rows
        await asyncio.sleep(0.1)
    raise AssertionError(f"{sql}: still {rows}")


@contextlib.asynccontextmanager
async def materialiser(settings: Settings) -> AsyncGenerator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        yield
    finally:
        stop.set()
        await task


@contextlib.asynccontextmanager
async def producer(settings: Settings) -> AsyncGenerator[AIOKafkaProducer]:
    client = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        acks="all",
        enable_idempotence=True,
        max_request_size=16 * 1024 * 1024,
    )
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def call(rollout: str, span: str, **fields: Any) -> Span:
    return Span(
        rollout_id=rollout, attempt_id=f"{rollout}-1", span_id=span, name="chat", start_ns=10**18, end_ns=10**18 + 5,
        operation="chat", prompt_token_ids=[1, 2], response_token_ids=[3, 4], logprobs=[-0.5, -0.25],
        weight_versions=[VersionSpan(version=7, start=0, end=1), VersionSpan(version=8, start=1, end=2)], **fields,
    )  # fmt: skip


async def test_one_row_for_every_record(settings: Settings) -> None:
    kafka = settings.kafka
    identity: dict[str, Any] = {"run_id": "run", "task_id": "t", "group_id": "g", "group_size": 2, "mode": "val"}
    records = [
        (topics.ROLLOUTS, "r1", RolloutQueued(rollout_id="r1", input={"question": "1+1"}, **identity)),
        (
            topics.ROLLOUTS,
            "r1",
            AttemptStarted(rollout_id="r1", attempt_id="r1-1", sequence_id=1, worker_id="w", **identity),
        ),
        (topics.ROLLOUTS, "r1", AttemptFinished(rollout_id="r1", attempt_id="r1-1", status="succeeded", **identity)),
        (topics.ROLLOUTS, "r1", RolloutFinished(rollout_id="r1", attempt_id="r1-1", status="succeeded", **identity)),
        (topics.SPANS, "r1", call("r1", "s1", attributes={"n": 1, "s": "x"}, state={"k": [1]})),
        (
            topics.SPANS,
            "r1",
            Span(
                rollout_id="r1",
                attempt_id="r1-1",
                span_id="s2",
                name="tool",
                operation="execute_tool",
                start_ns=1,
                end_ns=2,
            ),
        ),
        (
            topics.REWARDS,
            "r1",
            Reward(reward_id="w1", rollout_id="r1", attempt_id="r1-1", value=1.0, dimensions={"a": 0.5}),
        ),
        (topics.REWARDS, "ghost", Reward(reward_id="w2", rollout_id="ghost", value=0.25)),
        (
            topics.TRAJECTORIES,
            "g",
            Trajectory.model_validate(
                {
                    "rollout_id": "r1",
                    "attempt_id": "r1-1",
                    "status": "succeeded",
                    "reward": 1.0,
                    "calls": 1,
                    "min_version": 7,
                    "max_version": 8,
                    **identity,
                    "sequences": [
                        {
                            "token_ids": [1, 2, 3, 4],
                            "loss_mask": [0, 0, 1, 1],
                            "logprobs": [0, 0, -0.5, -0.25],
                            "weight_versions": [{"version": 7, "start": 2, "end": 3}],
                            "span_ids": ["s1"],
                        }
                    ],
                    "rewards": [{"reward_id": "w1", "name": "reward", "value": 1.0}],
                }
            ),
        ),
        (
            topics.TRAJECTORIES,
            "g",
            Trajectory(
                rollout_id="r2",
                status="failed",
                partial="no_calls",
                left_out=[LeftOutCall(reason="unfinished", agent="judge")],
                **identity,
            ),
        ),
        (topics.RESOURCES, "policy", ResourceVersion(resource="policy", version=8, uri="file:///x", sha256=SHA)),
        (topics.TRAINING, "run", RunStarted(run_id="run", resource="policy", version=7, config={"lr": 1})),
        (
            topics.TRAINING,
            "run",
            TrainingStep(
                run_id="run",
                step=1,
                resource="policy",
                version_in=7,
                version_out=8,
                rollout_ids=["r1"],
                dropped=[DroppedRollout(rollout_id="r2", reason="failed")],
                metrics={"kl": 0.5},
                offsets={"0": 3},
            ),
        ),
        (
            topics.TRAINING,
            "run",
            VersionApplied(run_id="run", resource="policy", version=8, server="http://x", seconds={"load": 0.5}),
        ),
        (
            topics.TRAINING,
            "run",
            RunFinished(
                run_id="run",
                step=1,
                resource="policy",
                version=8,
                dropped=[DroppedRollout(rollout_id="r3", reason="run_ended")],
            ),
        ),
        (topics.WORKERS, "w", WorkerHeartbeat(worker_id="w", running=["r1-1"], capacity=4, stats={"cpu": 0.5})),
    ]
    letter = DeadLetter(kafka.topic(topics.SPANS), 1, 17, "assembler", "late", "too late", b"r9", b"\xff\x00 bytes", 3)
    async with producer(settings) as client, materialiser(settings):
        for topic, key, event in records:
            await client.send_and_wait(kafka.topic(topic), encode(event), key=key.encode())
        await client.send_and_wait(
            kafka.topic(topics.DEAD_LETTERS), letter.value, key=letter.key, headers=letter.headers()
        )
        await until(settings, "SELECT sum(rows + dead) FROM reconciliation", lambda rows: rows == [(len(records) + 1,)])
    assert ask(settings, "SELECT sum(duplicates), sum(gaps) FROM reconciliation") == [(0, 0)]
    assert ask(
        settings,
        "SELECT topic, partition, offset, line, stage, reason, message, hex(key), hex(value), _index FROM dead_letters",
    ) == [
        (letter.topic, 1, 17, 3, "assembler", "late", "too late", b"r9".hex().upper(), letter.value.hex().upper(), 0)  # type: ignore[union-attr]
    ]
    assert ask(
        settings, "SELECT status, mode, attempt_id, attempts, JSONExtractString(input, 'question') FROM rollouts"
    ) == [("succeeded", "val", "r1-1", 1, "1+1")]
    assert ask(settings, "SELECT attempt_id, sequence_id, status, worker_id FROM attempts") == [
        ("r1-1", 1, "succeeded", "w")
    ]
    assert ask(
        settings, "SELECT rollout_id, reward, min_version, max_version, llm_calls, tool_calls FROM rollout_rewards"
    ) == [("r1", 1.0, 7, 8, 1, 1)]
    assert ask(settings, "SELECT prompt_token_ids, response_token_ids, logprobs FROM llm_calls") == [
        ([1, 2], [3, 4], [-0.5, -0.25])
    ]
    assert ask(settings, "SELECT attributes['n'], state['k'], name FROM spans WHERE span_id = 's1'") == [
        ("1", "[1]", "chat")
    ]
    assert ask(settings, "SELECT run_id, mode, version, n, mean FROM reward_by_version") == [("run", "val", 7, 1, 1.0)]
    assert ask(
        settings, "SELECT tokens, sampled_tokens, sequences.token_ids FROM trajectories WHERE rollout_id = 'r1'"
    ) == [(4, 2, [[1, 2, 3, 4]])]
    assert ask(settings, "SELECT rollout_id, left_out FROM trajectories ORDER BY rollout_id") == [
        ("r1", []), ("r2", [{"reason": "unfinished", "agent": "judge", "resource": ""}])
    ]  # fmt: skip
    assert ask(settings, "SELECT rollout_id, outcome, reason, step, times_trained FROM ledger ORDER BY rollout_id") == [
        ("r1", "trained", "", 1, 1), ("r2", "dropped", "failed", 1, 0), ("r3", "dropped", "run_ended", 1, 0)
    ]  # fmt: skip
    assert ask(settings, "SELECT step, metrics['kl'], rollouts, offsets['0'] FROM steps") == [(1, 0.5, 1, 3)]
    assert ask(settings, "SELECT event FROM run_events") == [("run_started",), ("run_finished",)]
    assert ask(settings, "SELECT version, ok, seconds['load'] FROM versions_applied") == [(8, True, 0.5)]
    assert ask(settings, "SELECT rollout_id, value FROM unknown_rewards") == [("ghost", 0.25)]
    assert ask(settings, "SELECT worker_id, running FROM workers") == [("w", ["r1-1"])]
    assert ask(
        settings,
        "SELECT SpanName, Duration, SpanAttributes['fulgurite.rollout_id'] FROM otel_traces WHERE SpanId = 's1'",
    ) == [("chat", 5, "r1")]
    assert ask(settings, "SELECT reason, rollouts FROM why_dropped ORDER BY reason") == [
        ("failed", 1),
        ("run_ended", 1),
    ]


def _span(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"rollout_id": "r", "span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2, **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


POISON: list[tuple[bytes | None, str, str]] = [
    (b"not json", "not_json", "not JSON"),
    (b"\xff\xfe", "not_json", "not JSON"),
    (b'{"rollout_id":"r"} trailing', "not_json", "not JSON"),
    (b"", "empty", "no value"),
    (None, "empty", "no value"),
    (b"[1, 2]", "bad_field", "an object"),
    (b"null", "bad_field", "an object"),
    (_span(span_id=...), "bad_field", "span_id: required"),
    (_span(span_id=""), "bad_field", "span_id: must not be empty"),
    (_span(name=5), "bad_field", "name: wrong type"),
    (_span(start_ns="1x"), "bad_field", "start_ns: required, an integer"),
    (_span(start_ns=1.5), "bad_field", "start_ns: wrong type"),
    (_span(sequence_id="one"), "bad_field", "sequence_id, input_tokens, output_tokens: must be integers"),
    (_span(sequence_id=-1), "bad_field", "sequence_id, input_tokens, output_tokens: must be integers"),
    (_span(output_tokens="-1"), "bad_field", "sequence_id, input_tokens, output_tokens: must be integers"),
    (_span(rollout_id=7), "bad_field", "rollout_id: wrong type"),
    (_span(input={"a": 1}), "bad_field", "input: wrong type"),
    (_span(agent=True), "bad_field", "agent: wrong type"),
    (_span(start_ns=-1), "bad_field", "start_ns: must not be negative"),
    (_span(start_ns=2**63), "bad_field", "start_ns"),
    (_span(start_ns=3), "bad_field", "end_ns: is before start_ns"),
    (_span(attributes=[]), "bad_field", "attributes: wrong type"),
    (_span(logprobs="x"), "bad_field", "logprobs: wrong type"),
    (_span(response_token_ids=[1, "x"]), "bad_field", "response_token_ids: every element"),
    (_span(response_token_ids=[1], logprobs=[0.5, 0.5]), "bad_field", "logprobs: must be as many"),
    (_span(response_token_ids=[1, 2], weight_versions=[{"version": 1, "start": 0, "end": 1}]), "bad_field", "cover"),
    (_span(response_token_ids=["a"]), "bad_field", "response_token_ids, logprobs, weight_versions"),
    (_span(events=["a"]), "bad_field", "events, links: elements of a wrong type"),
    (_span(response_token_ids=[1], logprobs=["nan"]), "bad_field", "logprobs: every element must be a finite number"),
    (_span(kind="sideways"), "bad_field", "kind: must be one of"),
]  # fmt: skip


async def test_poison_becomes_dead_letters_and_the_stream_goes_on(settings: Settings) -> None:
    name = settings.kafka.topic(topics.SPANS)
    async with producer(settings) as client, materialiser(settings):
        for value, _, _ in POISON:
            await client.send_and_wait(name, value, key=b"r", partition=0, headers=[("odd", b"\xff")])
        huge = _span(input="x" * 7_000_000)
        await client.send_and_wait(name, huge, partition=0)
        await client.send_and_wait(name, _span(span_id="last"), partition=0)
        await until(settings, "SELECT count() FROM spans", lambda rows: rows == [(2,)])
        rows = await until(
            settings,
            "SELECT offset, reason, message, hex(value), stage, topic FROM dead_letters ORDER BY offset",
            lambda rows: len(rows) == len(POISON),
        )
    for offset, ((value, reason, words), row) in enumerate(zip(POISON, rows, strict=True)):
        assert row[:2] == (offset, reason), row
        assert words in row[2], row
        assert row[3:] == ((value or b"").hex().upper(), "materialiser", name)
    assert ask(settings, "SELECT max(length(input)) FROM spans") == [(7_000_000,)]


async def test_a_record_of_lines_is_a_row_a_line_and_a_bad_line_does_not_spoil_the_others(settings: Settings) -> None:
    name = settings.kafka.topic(topics.SPANS)
    spread = json.dumps(json.loads(_span(span_id="spread")), indent=1).encode()
    lines = [
        _span(span_id="a"),
        b"",
        _span(span_id="b", start_ns="1"),
        b"not json",
        _span(span_id="c", name=5),
        b"  \r",
    ]
    async with producer(settings) as client, materialiser(settings):
        await client.send_and_wait(name, b"\n".join(lines), key=b"r", partition=0)
        await client.send_and_wait(name, spread, key=b"r", partition=0)
        await client.send_and_wait(name, b"\n\n", key=b"r", partition=0)
        rows = await until(
            settings, "SELECT span_id, _offset, _index FROM spans ORDER BY span_id", lambda r: len(r) == 3
        )
        dead = await until(
            settings,
            "SELECT offset, _index, reason, value FROM dead_letters ORDER BY offset, _index",
            lambda rows: len(rows) == 3,
        )
    assert rows == [("a", 0, 0), ("b", 0, 2), ("spread", 1, 0)]
    assert dead == [(0, 3, "not_json", "not json"), (0, 4, "bad_field", lines[4].decode()), (2, 0, "not_json", "\n\n")]
    assert ask(settings, "SELECT rows, dead, duplicates, gaps FROM reconciliation") == [(3, 3, 0, 0)]


async def test_unknown_fields_are_kept(settings: Settings) -> None:
    name = settings.kafka.topic(topics.SPANS)
    async with producer(settings) as client, materialiser(settings):
        await client.send_and_wait(name, _span(new_field={"a": [1, 2]}, other="x"))
        rows = await until(settings, "SELECT extra FROM spans", lambda rows: len(rows) == 1)
    assert {key: json.loads(value) for key, value in rows[0][0].items()} == {"new_field": {"a": [1, 2]}, "other": "x"}


def test_a_rollout_that_is_queued_again_goes_on(migrated_settings: ClickHouseSettings) -> None:
    events = [
        (RolloutQueued(rollout_id="r", run_id="first"), "queuing"),
        (AttemptStarted(rollout_id="r", attempt_id="a", sequence_id=1), "running"),
        (RolloutQueued(rollout_id="r", run_id="again"), "running"),
        (RolloutRequeued(rollout_id="r"), "requeuing"),
        (RolloutQueued(rollout_id="r", run_id="again"), "requeuing"),
        (RolloutFinished(rollout_id="r", attempt_id="a", status="succeeded"), "succeeded"),
    ]
    with clickhouse_connect.get_client(
        **connection_options(migrated_settings), database=migrated_settings.database
    ) as client:
        for offset, (event, status) in enumerate(events):
            row = {"raw": encode(event).decode(), "_topic": "rollouts", "_offset": offset}
            client.insert("in_rollouts", [list(row.values())], column_names=list(row))
            assert client.query("SELECT status, run_id FROM rollouts").result_rows == [(status, "first")]


async def test_what_a_producer_sent_twice_counts_once(settings: Settings) -> None:
    kafka = settings.kafka
    reward = Reward(reward_id="w", rollout_id="r", attempt_id="r-1", value=0.5)
    async with producer(settings) as client, materialiser(settings):
        await client.send_and_wait(
            kafka.topic(topics.ROLLOUTS), encode(RolloutQueued(rollout_id="r", run_id="x")), key=b"r"
        )
        await client.send_and_wait(
            kafka.topic(topics.ROLLOUTS),
            encode(RolloutFinished(rollout_id="r", attempt_id="r-1", status="succeeded")),
            key=b"r",
        )
        for _ in range(3):
            await client.send_and_wait(kafka.topic(topics.REWARDS), encode(reward), key=b"r")
            await client.send_and_wait(kafka.topic(topics.SPANS), encode(call("r", "s")), key=b"r")
        await until(settings, "SELECT count() FROM spans", lambda rows: rows == [(3,)])
        await until(settings, "SELECT count() FROM rewards", lambda rows: rows == [(3,)])
    assert ask(settings, "SELECT count(), sum(reward), sum(llm_calls) FROM rollout_rewards") == [(1, 0.5, 1)]
    assert ask(settings, "SELECT count() FROM llm_calls") == [(1,)]
    assert ask(settings, "SELECT count() FROM otel_traces") == [(1,)]
