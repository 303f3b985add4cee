"""What the log costs the trainer: a real run on the embedded broker, whose rollouts are answered at once.

    this process: broker, trainer ── queued ──► answering process ── trajectories ──► trainer ── resources ──► it again

The answering process gives a prepared rollout to each that is asked for, so that a window lies on the log before the
trainer wants it and nothing is measured that waits for agents. Of each step are taken:

- read: from the end of the step before to a full window: fetching, decoding, checking, grouping (timing_s/wait)
- samples: advantages, versions, masks of its rollouts
- pack: micro-batches from samples (timing_s/pack)

streaming_share is their sum over the whole step's time, a transaction included (timing_s/step). publish_seconds is from
the end of the optimizer's update to the arrival of the version's record in the answering process.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.codec import decode, decode_union, encode, encode_key
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, RolloutQueued
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import RESOURCES, ROLLOUTS, TRAINING, TRAJECTORIES, Topic
from fulgurite.schemas.training import TRAINING_EVENT, TrainingStep
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.learners.learner import Learner, StepResult
from fulgurite.streams.trainer import serve, service
from fulgurite.streams.trainer.sample import Sample
from tests.bench.train_batch import GROUP, SIZES, prepare, read_window, settings_for

STEPS: Final = 10
WARM_STEPS: Final = 2
"""Left out: the first windows wait for their rollouts."""
RUN: Final = "bench"

Figures = dict[str, float]


def no_task(index: int) -> dict[str, int]:
    """The trainer's task function."""
    return {"index": index}


def streaming(folder: Path, model: str) -> Figures:
    sizes = SIZES[model]
    prepare(folder, sizes, spread=0.7)
    with EmbeddedKafka(folder / "kafka") as kafka:
        settings = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, partitions=2)
        asyncio.run(create_topics(settings))
        context = multiprocessing.get_context("spawn")
        arrivals = folder / "arrivals.jsonl"
        answering = context.Process(target=answer, args=(settings, folder, arrivals), daemon=True)
        answering.start()
        trainer = settings_for(sizes, folder).model_copy(
            update={
                "run_id": RUN,
                "output": folder / "policy",
                "tasks": f"{__name__}:no_task",
                "steps": STEPS,
                "groups_per_step": sizes.groups,
                "group_size": GROUP,
                "pacing_staleness": 1,
                "max_staleness": 1_000,
                "max_logprob_difference": 1e9,  # the answers' log p are of another model
                "keep_versions": 2,
            }
        )
        try:
            with timers() as timed:
                asyncio.run(serve(Settings(kafka=settings, trainer=trainer), asyncio.Event()))
            steps = asyncio.run(read_steps(settings))
        finally:
            answering.terminate()
            answering.join()
    return _figures(steps, timed, [json.loads(line) for line in arrivals.read_text().splitlines()])


class Timed:
    """What the trainer does not say itself."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.updated_ns: list[int] = []
        """When the step that made version n + 2 was done with the weights."""


@contextmanager
def timers() -> Generator[Timed]:
    """Watches two functions of the trainer while it runs."""
    timed, training_set, step = Timed(), service.training_set, Learner.step

    def timed_training_set(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = training_set(*arguments)
        timed.samples.append(time.perf_counter() - began)
        return found

    def timed_step(
        self: Learner,
        samples: list[Sample],
        version_in: int,
        compared: Sequence[Sample] = (),
        is_mismatched: bool = False,
    ) -> StepResult:
        found = step(self, samples, version_in, compared, is_mismatched)
        timed.updated_ns.append(time.time_ns())
        return found

    service.training_set, Learner.step = timed_training_set, timed_step
    try:
        yield timed
    finally:
        service.training_set, Learner.step = training_set, step


def _figures(steps: list[TrainingStep], timed: Timed, arrivals: list[dict[str, int]]) -> Figures:
    arrived = {each["version"]: each["time_ns"] for each in arrivals}
    rows: list[tuple[float, float, float, float]] = []
    published: list[float] = []
    for number, (step, samples, updated_ns) in enumerate(zip(steps, timed.samples, timed.updated_ns, strict=True)):
        if number < WARM_STEPS:
            continue
        metrics = step.metrics
        total = metrics["timing_s/step"]
        published.append((arrived[step.version_out] - updated_ns) / 1e9)
        rows.append((metrics["timing_s/wait"], samples, metrics["timing_s/pack"], total))
    read, samples, pack, total = (sum(column) for column in zip(*rows, strict=True))
    count = len(rows)
    print(
        f"\nstreaming, {count} steps of {total / count:.2f} s: read {read / count * 1000:.1f} ms, samples "
        f"{samples / count * 1000:.1f} ms, pack {pack / count * 1000:.1f} ms; published after "
        f"{statistics.median(published) * 1000:.0f} ms"
    )
    return {
        "streaming_share": (read + samples + pack) / total,
        "publish_seconds": statistics.median(published),
        "read_ms": read / count * 1000,
        "samples_ms": samples / count * 1000,
        "pack_ms": pack / count * 1000,
        "step_seconds": total / count,
    }


def answer(settings: KafkaSettings, folder: Path, arrivals: Path) -> None:
    """The other process, until it is ended."""
    asyncio.run(_answer(settings, read_window(folder), arrivals))


async def _answer(settings: KafkaSettings, samples: list[Sample], arrivals: Path) -> None:
    consumer = await _consumer(settings, ROLLOUTS, RESOURCES)
    producer = AIOKafkaProducer(**connection_options(settings), acks="all")
    await producer.start()
    version, numbers, asked = 0, itertools.count(), list[RolloutQueued]()
    with arrivals.open("w", buffering=1) as file:
        while True:
            found = await consumer.getmany(timeout_ms=100)
            now = time.time_ns()
            for record in [record for part in found.values() for record in part]:
                if record.topic == settings.topic(RESOURCES):
                    announced = decode(ResourceVersion, record.value)
                    version = version or announced.version
                    file.write(json.dumps({"version": announced.version, "time_ns": now}) + "\n")
                elif isinstance(event := decode_union(ROLLOUT_EVENT, "RolloutEvent", record.value), RolloutQueued):
                    asked.append(event)
            if version:
                for event in asked:
                    number = next(numbers)
                    trajectory = answered(event, samples[number % len(samples)], version, float(number % 2))
                    key = encode_key(trajectory.group_id)
                    await producer.send(settings.topic(TRAJECTORIES), encode(trajectory), key)
                asked.clear()


def answered(queued: RolloutQueued, sample: Sample, version: int, reward: float) -> Trajectory:
    sequence = TokenSequence(
        token_ids=sample.token_ids,
        loss_mask=sample.loss_mask,
        logprobs=sample.behaviour_logprobs,
        weight_versions=spans(sample.loss_mask, version),
        resource="policy",
    )
    return Trajectory(
        rollout_id=queued.rollout_id,
        attempt_id=f"{queued.rollout_id}-a1",
        run_id=queued.run_id,
        task_id=queued.task_id,
        group_id=queued.group_id,
        group_size=queued.group_size,
        mode=queued.mode,
        status="succeeded",
        sequences=[sequence],
        reward=reward,
        calls=1,
        min_version=version,
        max_version=version,
    )


def spans(mask: list[int], version: int) -> list[VersionSpan]:
    """One for each run of sampled tokens."""
    found: list[VersionSpan] = []
    position = 0
    for sampled, run in itertools.groupby(mask):
        length = len(list(run))
        if sampled:
            found.append(VersionSpan(version=version, start=position, end=position + length))
        position += length
    return found


async def read_steps(settings: KafkaSettings) -> list[TrainingStep]:
    consumer = await _consumer(settings, TRAINING)
    try:
        found: list[TrainingStep] = []
        while len(found) < STEPS:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                events = (decode_union(TRAINING_EVENT, "TrainingEvent", record.value) for record in records)
                found += [event for event in events if isinstance(event, TrainingStep)]
        return found
    finally:
        await consumer.stop()


async def _consumer(settings: KafkaSettings, *topics: Topic) -> AIOKafkaConsumer:
    consumer = AIOKafkaConsumer(
        **connection_options(settings), isolation_level="read_committed", auto_offset_reset="earliest"
    )
    await consumer.start()
    partitions = [
        TopicPartition(settings.topic(t), n) for t in topics for n in range(t.partitions or settings.partitions)
    ]
    consumer.assign(partitions)
    return consumer
