"""The AsyncAPI document: what AsyncAPI's own schema wants, whole, and the one that docs/ has."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from fulgurite.schemas import topics
from fulgurite.schemas.asyncapi import ANYBODY, VALUES, asyncapi_document, export_asyncapi
from fulgurite.schemas.exports import EVENTS

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = "@asyncapi/specs@6.11.1"


def test_the_committed_one_is_what_the_code_says(tmp_path: Path) -> None:
    export_asyncapi(tmp_path / "folder" / "asyncapi.json")
    rendered = (tmp_path / "folder" / "asyncapi.json").read_text()
    committed = (ROOT / "docs" / "asyncapi.json").read_text()
    assert committed == rendered, "run `make docs`, or `fulgurite schemas asyncapi docs/asyncapi.json`"


def test_it_is_valid_for_asyncapis_own_schema(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not on this machine: AsyncAPI's JSON Schema is an npm package")
    packed = subprocess.run(
        ["npm", "pack", "--silent", "--prefer-offline", OFFICIAL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if packed.returncode != 0:
        pytest.skip(f"npm cannot get {OFFICIAL} here: {packed.stderr[-300:]}")
    with tarfile.open(tmp_path / packed.stdout.strip()) as package:
        file = package.extractfile("package/schemas/3.0.0.json")
        assert file is not None
        official = Draft7Validator(json.load(file))
    official.validate(asyncapi_document())
    wrong = asyncapi_document()
    wrong["operations"]["send_spans"]["action"] = "emit"
    assert not official.is_valid(wrong)


def test_every_reference_leads_somewhere() -> None:
    document = asyncapi_document()
    for reference in set(references(document)):
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        assert found, reference


def references(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for name, child in value.items():
                if name == "$ref":
                    yield child
                else:
                    yield from references(child)
        case list():
            for child in value:
                yield from references(child)
        case _:
            pass


def test_every_topic_is_there_with_its_key_its_messages_and_who_writes_them() -> None:
    document = asyncapi_document()
    assert set(document["channels"]) == {topic.name for topic in topics.TOPICS}
    assert set(VALUES) == set(EVENTS), "a topic has a JSON Schema and no message here, or the other way round"
    for topic in topics.TOPICS:
        channel = document["channels"][topic.name]
        assert channel["address"] == ("{topic_prefix}" if topic.prefixed else "") + topic.name
        for name in channel["messages"]:
            message = document["components"]["messages"][name]
            assert topic.key in message["bindings"]["kafka"]["key"]["description"]
            assert message["headers"]["type"] == "object"
    received = {name for name in document["operations"] if name.startswith("receive_")}
    assert received == {f"receive_{topic.name}" for topic in ANYBODY}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ("Span", {"span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2}, {"span_id": "s", "name": "n"}),
        ("Reward", {"rollout_id": "r", "value": 1.5}, {"rollout_id": "r", "value": "1.5"}),
        ("RolloutQueued", {"rollout_id": "r", "input": [1]}, {"rollout_id": "r", "config": {"max_attempts": 0}}),
    ],
)
def test_the_schemas_in_it_work(schema: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    validator = Draft7Validator({"$ref": f"#/components/schemas/{schema}", **asyncapi_document()})
    assert validator.is_valid(good)
    assert not validator.is_valid(bad)


def test_fields_are_explained() -> None:
    span = asyncapi_document()["components"]["schemas"]["Span"]["properties"]
    assert "same length as response_token_ids" in span["logprobs"]["description"]
