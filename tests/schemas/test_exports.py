"""Exported JSON Schemas: valid, stable, and they accept what the models write and refuse what the models refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from fulgurite.schemas import topics
from fulgurite.schemas.algorithms import AlgorithmState
from fulgurite.schemas.codec import encode
from fulgurite.schemas.exports import EVENTS, export_json_schemas, json_schema
from fulgurite.schemas.resources import ResourceVersion, prompt_version
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import RolloutFinished, RolloutQueued
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.training import RunStarted, TrainingStep
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.schemas.workers import WorkerHeartbeat

EXAMPLES: list[tuple[Topic, BaseModel]] = [
    (topics.ROLLOUTS, RolloutQueued(rollout_id="r", input={"question": "1+1"})),
    (topics.ROLLOUTS, RolloutFinished(rollout_id="r", status="succeeded")),
    (topics.SPANS, Span(rollout_id="r", span_id="s", name="chat", start_ns=1, end_ns=2, response_token_ids=[1])),
    (topics.REWARDS, Reward(rollout_id="r", value=0.5)),
    (topics.TRAJECTORIES, Trajectory(rollout_id="r", status="failed", reward=None)),
    (topics.RESOURCES, ResourceVersion(resource="policy", version=1, uri="file:///x", sha256="0" * 64)),
    (topics.TRAINING, RunStarted(run_id="a", resource="policy", version=0)),
    (topics.TRAINING, TrainingStep(run_id="a", step=1, resource="policy", version_in=0, version_out=1)),
    (topics.WORKERS, WorkerHeartbeat(worker_id="w")),
    (topics.ATTEMPTS, FinishedAttempt(rollout_id="r", status="succeeded", reward=0.5)),
    (topics.ALGORITHM_STATE, AlgorithmState(algorithm="best", name="g1", value={"members": [[0, 7]]})),
    (topics.RESOURCES, prompt_version("support", 1, "Answer {question}")),
]

REFUSED: list[tuple[Topic, dict[str, Any]]] = [
    (topics.ROLLOUTS, {"event": "queued"}),
    (topics.ROLLOUTS, {"event": "exploded", "rollout_id": "r"}),
    (topics.SPANS, {"span_id": "s", "name": "n", "start_ns": "yesterday", "end_ns": 2}),
    (topics.REWARDS, {"rollout_id": "r"}),
    (topics.REWARDS, {"rollout_id": "spaces are not an id", "value": 1}),
    (topics.TRAJECTORIES, {"rollout_id": "r", "status": "maybe"}),
    (topics.RESOURCES, {"resource": "p", "version": 1, "uri": "x", "sha256": "short"}),
    (topics.TRAINING, {"event": "step", "run_id": "a", "resource": "p", "version_in": 0, "version_out": 1}),
    (topics.WORKERS, {"worker_id": ""}),
    (topics.ATTEMPTS, {"rollout_id": "r", "status": "succeeded", "spans": [{}]}),
    (topics.ALGORITHM_STATE, {"algorithm": "best", "name": ""}),
]


def test_one_file_a_topic_and_stable(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in export_json_schemas(tmp_path / "a" / "b")}
    second = {path.name: path.read_bytes() for path in export_json_schemas(tmp_path / "c")}
    assert first == second
    without = {topics.DEAD_LETTERS, topics.OTLP_SPANS}
    assert set(first) == {f"{topic.name}.json" for topic in topics.TOPICS if topic not in without}
    for data in first.values():
        Draft202012Validator.check_schema(json.loads(data))


@pytest.mark.parametrize(("topic", "event"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_what_the_models_write_is_accepted(topic: Topic, event: BaseModel) -> None:
    Draft202012Validator(json_schema(topic)).validate(json.loads(encode(event)))


@pytest.mark.parametrize(("topic", "value"), REFUSED)
def test_what_the_models_refuse_is_refused(topic: Topic, value: dict[str, Any]) -> None:
    assert not Draft202012Validator(json_schema(topic)).is_valid(value)
    with pytest.raises(ValidationError):
        EVENTS[topic].validate_python(value)


def test_unknown_fields_are_allowed() -> None:
    value = {"rollout_id": "r", "value": 1.0, "next_years_field": [1]}
    Draft202012Validator(json_schema(topics.REWARDS)).validate(value)
