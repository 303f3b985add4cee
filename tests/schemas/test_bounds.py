"""The models, the contract and the tables agree on which records are refused, and on who keeps sizes."""

from __future__ import annotations

import json
from typing import Any

import clickhouse_connect
from jsonschema import Draft202012Validator

from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.exports import EVENTS, json_schema
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import Topic

SPAN: dict[str, Any] = {"rollout_id": "r", "span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2}
REWARD: dict[str, Any] = {"rollout_id": "r", "reward_id": "w", "value": 1.0}

INTEGRITY: list[tuple[Topic, dict[str, Any], bool]] = [
    (topics.SPANS, {"response_token_ids": [3_000_000_000, 2**32 - 1]}, True),
    (topics.SPANS, {"prompt_token_ids": [2**32]}, False),
    (topics.SPANS, {"response_token_ids": [-1]}, False),
    (topics.SPANS, {"end_ns": 2**63}, False),
    (topics.SPANS, {"start_ns": -1}, False),
    (topics.SPANS, {"input_tokens": -1}, False),
    (topics.SPANS, {"end_ns": 2**63 - 1}, True),
    (topics.SPANS, {"start_ns": "1", "end_ns": "9223372036854775807", "input_tokens": "7"}, True),
    (topics.SPANS, {"events": [{"name": "e", "time_ns": "1795000000000000123"}]}, True),
    (topics.SPANS, {"start_ns": "soon"}, False),
    (topics.REWARDS, {"value": 1e25}, True),
    (topics.REWARDS, {"value": "1.5"}, False),
]
SIZES: list[dict[str, Any]] = [
    {"name": "n" * 5_000},
    {"attributes": {f"k{number}": number for number in range(3_000)}},
    {"span_id": "s" * 500},
]


def _rows(settings: ClickHouseSettings, topic: Topic, raw: str) -> tuple[int, list[str]]:
    """How many rows a line becomes, and the reasons for which it is a dead letter."""
    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        for table in (topic.name, "dead_letters"):
            client.command(f"TRUNCATE TABLE {table}")
        row = {"raw": raw, "key": "r", "_topic": topic.name, "_offset": 0, "_into": 3}
        client.insert(f"in_{topic.name}", [list(row.values())], column_names=list(row))
        (count,) = client.query(f"SELECT count() FROM {topic.name}").result_rows[0]
        return count, [str(reason) for (reason,) in client.query("SELECT reason FROM dead_letters").result_rows]


def _model_takes(topic: Topic, raw: str) -> bool:
    try:
        decode_union(EVENTS[topic], topic.name, raw.encode())
    except InvalidEvent:
        return False
    return True


def test_tables_models_and_schemas_agree(clickhouse_settings: ClickHouseSettings) -> None:
    apply_migrations(clickhouse_settings)
    for topic, changes, good in INTEGRITY:
        raw = json.dumps((SPAN if topic is topics.SPANS else REWARD) | changes)
        assert _rows(clickhouse_settings, topic, raw) == ((1, []) if good else (0, ["bad_field"])), raw
        assert _model_takes(topic, raw) == good, raw
        assert Draft202012Validator(json_schema(topic)).is_valid(json.loads(raw)) == good, raw
    for changes in SIZES:
        raw = json.dumps(SPAN | changes)
        assert _rows(clickhouse_settings, topics.SPANS, raw) == (1, []), "sizes are the producers' to keep"
        assert not _model_takes(topics.SPANS, raw)
    # An integer of more than 64 bits is a number to JSON and to the models, but a text to ClickHouse's parser.
    raw = json.dumps(REWARD | {"value": 10**25})
    assert _rows(clickhouse_settings, topics.REWARDS, raw) == (0, ["bad_field"])
