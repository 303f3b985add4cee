"""The contract as an AsyncAPI 3.0 document: topics, keys, headers, values and who writes what, from the declarations.

Promises: the same code gives the same bytes; the values' schemas are those of `exports.py`, shared by reference. The
document speaks as AsyncAPI does, from the application's side: Fulgurite `receive`s what anybody may write and `send`s
what only its own services do. Does not know a broker, nor the settings of one installation.

    python -m fulgurite.schemas.asyncapi docs/asyncapi.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from fulgurite.schemas import dead_letters as letters
from fulgurite.schemas import topics
from fulgurite.schemas.algorithms import AlgorithmState
from fulgurite.schemas.ids import MAX_ID_CHARS
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rewards import HEADER_AFTER_END, Reward
from fulgurite.schemas.rollouts import AttemptHeartbeat, RolloutCancelled, RolloutEvent, RolloutQueued
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.training import TrainingEvent
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.schemas.workers import WorkerHeartbeat

CONTRACT_VERSION = "1.0.0"
"""Of the contract, not the package: the second number grows with every addition; a breaking change is a new topic."""

BINDING_VERSION = "0.5.0"
"""Of AsyncAPI's Kafka bindings."""

JSON = "application/json"
JSON_LINES = "application/x-ndjson"
PROTOBUF = "application/x-protobuf"

Object = dict[str, Any]

VALUES: dict[Topic, tuple[type[BaseModel], ...]] = {
    topics.ROLLOUTS: get_args(get_args(RolloutEvent)[0]),
    topics.SPANS: (Span,),
    topics.REWARDS: (Reward,),
    topics.ATTEMPTS: (FinishedAttempt,),
    topics.TRAJECTORIES: (Trajectory,),
    topics.RESOURCES: (ResourceVersion,),
    topics.TRAINING: get_args(get_args(TrainingEvent)[0]),
    topics.WORKERS: (WorkerHeartbeat,),
    topics.ALGORITHM_STATE: (AlgorithmState,),
}
"""What a record of the topic may hold."""

ANYBODY: dict[Topic, tuple[type[BaseModel], ...]] = {
    topics.SPANS: (Span,),
    topics.REWARDS: (Reward,),
    topics.ROLLOUTS: (RolloutQueued, AttemptHeartbeat, RolloutCancelled),
    topics.OTLP_SPANS: (),
}
"""What every program may write; the rest is written by Fulgurite's services, for every program to read."""

LINES = frozenset({topics.SPANS, topics.REWARDS})
"""Topics whose records hold one JSON object or several, one a line."""

KEY_RULE = (
    "The key is the id as UTF-8 bytes; the partition is Kafka's murmur2 over it. Java's clients, franz-go, KafkaJS 2 "
    "and aiokafka do so by default; librdkafka needs partitioner=murmur2_random."
)


def asyncapi_document() -> Object:
    """The whole document."""
    return {
        "asyncapi": "3.0.0",
        "id": "urn:fulgurite:contract",
        "info": {
            "title": "Fulgurite",
            "version": CONTRACT_VERSION,
            "description": "Online reinforcement learning for LLM agents over Kafka. " + KEY_RULE,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON,
        "servers": {
            "kafka": {
                "host": "{bootstrap_servers}",
                "protocol": "kafka",
                "description": "PLAINTEXT, or TLS and SASL as the brokers ask for. Producers: acks=all, idempotent.",
                "variables": {"bootstrap_servers": {"default": KafkaSettings().bootstrap_servers}},
            }
        },
        "channels": {topic.name: _channel(topic) for topic in topics.TOPICS},
        "operations": dict(_operations()),
        "components": {
            "messages": {name: message for topic in topics.TOPICS for name, message in _messages(topic)},
            "schemas": _schemas(),
        },
    }


def export_asyncapi(path: Path) -> None:
    """Writes the document as JSON into the file; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asyncapi_document(), indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def _channel(topic: Topic) -> Object:
    channel: Object = {
        "address": ("{topic_prefix}" if topic.prefixed else "") + topic.name,
        "title": topic.name,
        "description": f"{topic.holds}; key: {topic.key}",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name, _ in _messages(topic)},
        "bindings": {
            "kafka": {
                **({"partitions": topic.partitions} if topic.partitions else {}),
                "topicConfiguration": {
                    "cleanup.policy": topic.cleanup.split(","),
                    "retention.ms": topic.retention_ms,
                    "max.message.bytes": KafkaSettings().max_record_bytes,
                },
                "bindingVersion": BINDING_VERSION,
            }
        },
    }
    if topic.prefixed:
        prefix = {
            "default": KafkaSettings().topic_prefix,
            "description": "The setting kafka.topic_prefix: a namespace.",
        }
        channel["parameters"] = {"topic_prefix": prefix}
    return channel


def _operations() -> Iterator[tuple[str, Object]]:
    for topic in topics.TOPICS:
        if topic in ANYBODY:
            names = [_message_name(topic, value) for value in ANYBODY[topic]] or [_message_name(topic, None)]
            yield _operation("receive", topic, names, "What any program may write.")
        if topic is not topics.OTLP_SPANS:
            names = [name for name, _ in _messages(topic)]
            yield _operation("send", topic, names, "What Fulgurite's services write, and any program may read.")


def _operation(action: str, topic: Topic, messages: list[str], summary: str) -> tuple[str, Object]:
    channel = f"#/channels/{topic.name}"
    return f"{action}_{topic.name}", {
        "action": action,
        "channel": {"$ref": channel},
        "summary": summary,
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in messages],
    }


def _messages(topic: Topic) -> Iterator[tuple[str, Object]]:
    for value in VALUES.get(topic, (None,)):
        name = _message_name(topic, value)
        message: Object = {
            "name": name,
            "title": name,
            "contentType": _content_type(topic),
            "headers": _headers(topic),
            "bindings": {"kafka": {"key": _key(topic), "bindingVersion": BINDING_VERSION}},
        }
        if value is not None:
            message["payload"] = {"$ref": f"#/components/schemas/{value.__name__}"}
        if topic in LINES:
            message["description"] = (
                "The payload's schema is that of one line. A record's value is one JSON object or several, one a line, "
                " all of the rollout that is the record's key; a bad line does not spoil the others."
            )
        yield name, message


def _message_name(topic: Topic, value: type[BaseModel] | None) -> str:
    return topic.name if value is None else value.__name__


def _content_type(topic: Topic) -> str:
    match topic:
        case topics.SPANS | topics.REWARDS:
            return JSON_LINES
        case topics.OTLP_SPANS:
            return PROTOBUF
        case topics.DEAD_LETTERS:
            return "application/octet-stream"
        case _:
            return JSON


def _headers(topic: Topic) -> Object:
    """No header is needed anywhere; those of a dead letter say why it is one."""
    known: dict[str, Object] = {}
    if topic is topics.REWARDS:
        what = "There, whatever its value: given to a trajectory that exists. Assemblers pass over the record."
        known = {HEADER_AFTER_END: {"type": "string", "description": what}}
    if topic is topics.DEAD_LETTERS:
        known = {
            letters.HEADER_TOPIC: {"type": "string", "description": "Full name of the original topic."},
            letters.HEADER_PARTITION: {"type": "string", "description": "Partition of the original, a decimal number."},
            letters.HEADER_OFFSET: {"type": "string", "description": "Offset of the original, a decimal number."},
            letters.HEADER_LINE: {"type": "string", "description": "Line of the original, from 0, a decimal number."},
            letters.HEADER_STAGE: {"type": "string", "description": "Which service could not use it."},
            letters.HEADER_REASON: {"type": "string", "description": "A word to group by: late, bad_field, …"},
            letters.HEADER_MESSAGE: {"type": "string", "description": "What exactly is wrong, for a person."},
        }
    return {"type": "object", "properties": known, "additionalProperties": True}


def _key(topic: Topic) -> Object:
    if topic in (topics.OTLP_SPANS, topics.DEAD_LETTERS):
        return {"description": f"{topic.key}; may be missing"}
    return {"type": "string", "maxLength": MAX_ID_CHARS, "description": f"{topic.key}. {KEY_RULE}"}


def _schemas() -> Object:
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (value, "validation") for values in VALUES.values() for value in values
    ]
    _, found = models_json_schema(models, ref_template="#/components/schemas/{model}")
    return found["$defs"]


if __name__ == "__main__":
    export_asyncapi(Path(sys.argv[1]))
