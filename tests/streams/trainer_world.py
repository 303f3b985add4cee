"""The rest of the world, as the trainer sees it, by hand: whoever reads `queued`, acts with the newest version's real
weights and answers with a trajectory. The task is a bandit: say token 7.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import zlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.checksum import folder_of, folder_sha256
from fulgurite.schemas.codec import decode, decode_union, encode, encode_key
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, RolloutQueued
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import RESOURCES, ROLLOUTS, TRAINING, TRAJECTORIES, Topic
from fulgurite.schemas.training import TRAINING_EVENT, TrainingEvent
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.learners import learner

RESOURCE = "policy"
LIKED = 7
VOCABULARY = 16
RESPONSE = 3

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # a thread's own setting; with two, threads spin while others want the cores

LOADING = threading.Lock()
"""transformers does not load two models at once in one process; for tests with several trainers in one."""


def load_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners, too."""
    load_learner = learner.load_learner

    def load(*arguments: Any) -> learner.Learner:
        with LOADING:
            return load_learner(*arguments)

    monkeypatch.setattr(learner, "load_learner", load)


Alter = Callable[[Trajectory], Trajectory | None]


def unaltered(trajectory: Trajectory) -> Trajectory:
    return trajectory


def build_model(folder: Path, seed: int = 0, *, tie_word_embeddings: bool = True) -> Path:
    """A Llama of a few thousand parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.08,
        tie_word_embeddings=tie_word_embeddings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def bandit(index: int) -> dict[str, int]:
    """The trainer's task function: a prompt of one token."""
    return {"prompt": 1 + index % 4}


def sample(model: Any, prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
    """Response tokens and their log p, each from a full forward pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens, logprobs = list(prompt), [0.0] * len(prompt)
    for _ in range(RESPONSE):
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1].float(), dim=-1)
        chosen = int(torch.multinomial(log_p.exp(), 1, generator=generator))
        tokens.append(chosen)
        logprobs.append(float(log_p[chosen]))
    return tokens, logprobs


class World:
    """Answers every `queued` of mode train, the same one once. `alter` may change an answer or withhold it (None)."""

    def __init__(self, kafka: KafkaSettings, alter: Alter = unaltered) -> None:
        self._kafka = kafka
        self._alter = alter
        self._models: dict[int, Any] = {}
        self._newest: ResourceVersion | None = None
        self._resources: AIOKafkaConsumer | None = None
        self._producer: AIOKafkaProducer | None = None
        self.queued: list[str] = []
        self.versions: list[ResourceVersion] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[World]:
        self._resources = await _consumer(self._kafka, RESOURCES)
        rollouts = await _consumer(self._kafka, ROLLOUTS)
        self._producer = AIOKafkaProducer(**connection_options(self._kafka), acks="all")
        await self._producer.start()
        acting = asyncio.create_task(self._act(rollouts))
        try:
            yield self
        finally:
            acting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await acting
            await rollouts.stop()
            await self._resources.stop()
            await self._producer.stop()

    async def send(self, trajectory: Trajectory) -> None:
        await self.send_bytes(trajectory.group_id, encode(trajectory))

    async def send_bytes(self, key: str, value: bytes) -> None:
        assert self._producer
        await self._producer.send_and_wait(self._kafka.topic(TRAJECTORIES), value, encode_key(key))

    async def uses_partitions(self, count: int) -> None:
        """Until its answers go to so many."""
        assert self._producer
        while len(await self._producer.partitions_for(self._kafka.topic(TRAJECTORIES))) < count:
            await self._producer.client.force_metadata_update()

    async def _act(self, rollouts: AIOKafkaConsumer) -> None:
        while True:
            found = [record for part in (await rollouts.getmany(timeout_ms=100)).values() for record in part]
            if found:
                await self._read_versions()
            for record in found:
                event = decode_union(ROLLOUT_EVENT, "RolloutEvent", record.value)
                if isinstance(event, RolloutQueued) and event.rollout_id not in self.queued:
                    self.queued.append(event.rollout_id)
                    answer = self._alter(self._answer(event))
                    if answer:
                        await self.send(answer)

    async def _read_versions(self) -> None:
        """A `queued` is visible only together with the version it was asked for with."""
        assert self._resources
        partition = TopicPartition(self._kafka.topic(RESOURCES), 0)
        end = (await self._resources.end_offsets([partition]))[partition]
        while await self._resources.position(partition) < end:
            for records in (await self._resources.getmany(timeout_ms=100)).values():
                for record in records:
                    version = decode(ResourceVersion, record.value)
                    self.versions.append(version)
                    if version.resource == RESOURCE:  # others are trained, not served
                        self._newest = version

    def _answer(self, queued: RolloutQueued) -> Trajectory:
        assert self._newest, "queued before a version was announced"
        version = self._newest.version
        if version not in self._models:
            folder = folder_of(self._newest.uri)
            assert folder_sha256(folder) == self._newest.sha256
            with LOADING:
                self._models = {version: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
        prompt = [0, queued.input["prompt"]]
        member = queued.rollout_id.removeprefix(queued.run_id)
        tokens, logprobs = sample(self._models[version], prompt, zlib.crc32(member.encode()))
        reward = tokens[2:].count(LIKED) / RESPONSE
        return answered(queued, tokens, logprobs, version, reward)


def answered(
    queued: RolloutQueued, tokens: list[int], logprobs: list[float], version: int, reward: float
) -> Trajectory:
    sequence = TokenSequence(
        token_ids=tokens,
        loss_mask=[0, 0] + [1] * (len(tokens) - 2),
        logprobs=logprobs,
        weight_versions=[VersionSpan(version=version, start=2, end=len(tokens))],
        resource=RESOURCE,
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


async def read_topic(kafka: KafkaSettings, topic: Topic) -> list[Any]:
    """All committed records of a topic."""
    consumer = await _consumer(kafka, topic)
    try:
        partitions = list(consumer.assignment())
        ends = await consumer.end_offsets(partitions)
        found: list[Any] = []
        while any([await consumer.position(tp) < ends[tp] for tp in partitions]):
            for records in (await consumer.getmany(timeout_ms=200)).values():
                found += records
        return found
    finally:
        await consumer.stop()


async def training_events(kafka: KafkaSettings, run_id: str) -> list[TrainingEvent]:
    records = await read_topic(kafka, TRAINING)
    events = [decode_union(TRAINING_EVENT, "TrainingEvent", record.value) for record in records]
    return [event for event in events if event.run_id == run_id]


def all_once(events: list[TrainingEvent]) -> dict[str, str]:
    """rollout_id -> what became of it; fails where one is named twice."""
    found: dict[str, str] = {}
    for event in events:
        trained: list[str] = getattr(event, "rollout_ids", [])
        dropped: list[BaseModel] = getattr(event, "dropped", [])
        for rollout_id, reason in [(i, "trained") for i in trained] + [(d.rollout_id, d.reason) for d in dropped]:  # pyright: ignore[reportAttributeAccessIssue]
            assert rollout_id not in found, f"{rollout_id}: {found[rollout_id]}, then {reason}"
            found[rollout_id] = reason
    return found


async def _consumer(kafka: KafkaSettings, topic: Topic) -> AIOKafkaConsumer:
    consumer = AIOKafkaConsumer(
        **connection_options(kafka),
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        fetch_max_wait_ms=20,  # a broker answers one connection in order: offsets wait behind a fetch
    )
    await consumer.start()
    count = topic.partitions or kafka.partitions
    consumer.assign([TopicPartition(kafka.topic(topic), number) for number in range(count)])
    return consumer
