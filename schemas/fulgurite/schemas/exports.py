"""JSON Schemas (2020-12) of the events, one file a topic, for whoever writes them in another language.

Promises: the same code gives the same bytes. A schema describes what is accepted, so fields with a default are optional
and unknown fields are allowed. Topics whose values are not ours to define (dead_letters, otlp_spans) have none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fulgurite.schemas import topics
from fulgurite.schemas.algorithms import AlgorithmState
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import ROLLOUT_EVENT
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.training import TRAINING_EVENT
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.schemas.workers import WorkerHeartbeat

DIALECT = "https://json-schema.org/draft/2020-12/schema"

EVENTS: dict[Topic, TypeAdapter[Any]] = {
    topics.ROLLOUTS: ROLLOUT_EVENT,
    topics.SPANS: TypeAdapter(Span),
    topics.REWARDS: TypeAdapter(Reward),
    topics.ATTEMPTS: TypeAdapter(FinishedAttempt),
    topics.TRAJECTORIES: TypeAdapter(Trajectory),
    topics.RESOURCES: TypeAdapter(ResourceVersion),
    topics.TRAINING: TRAINING_EVENT,
    topics.WORKERS: TypeAdapter(WorkerHeartbeat),
    topics.ALGORITHM_STATE: TypeAdapter(AlgorithmState),
}
"""What the value of a record of each topic must be."""


def json_schema(topic: Topic) -> dict[str, Any]:
    """The schema of one topic's values."""
    schema = EVENTS[topic].json_schema(mode="validation")
    described = {
        "$schema": DIALECT,
        "$id": f"urn:fulgurite:topic:{topic.name}",
        "title": topic.name,
        "description": f"Value of a record of the topic `{topic.name}` (key: {topic.key}): {topic.holds}.",
    }
    return {**schema, **described}


def export_json_schemas(folder: Path) -> list[Path]:
    """Writes <topic>.json for every topic that has a schema into the folder, made if need be; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for topic in EVENTS:
        path = folder / f"{topic.name}.json"
        path.write_text(json.dumps(json_schema(topic), indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        written.append(path)
    return written
