"""Bytes <-> events. The only place that knows that values are JSON and keys are UTF-8.

Strict, as the tables' views are: "1.5" or true is no number. What one reader trained on and another one refused would
make two truths of one record.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from fulgurite.schemas.errors import InvalidEvent, RecordTooLarge

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

MAX_RECORD_BYTES = 8 * 1024 * 1024
"""Default bound of one record: a 32k-token span with logprobs is about 1 MB of JSON."""

MAX_DEPTH = 200
"""Lists and objects within each other that `decode` takes: the bound of pydantic's parser."""


def encode(event: BaseModel, max_record_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The event as JSON. Raises RecordTooLarge with its size and the bound."""
    data = event.model_dump_json(exclude_unset=False).encode()
    if len(data) > max_record_bytes:
        raise RecordTooLarge(
            f"{type(event).__name__} is {len(data)} bytes as JSON; kafka.max_record_bytes allows {max_record_bytes}"
        )
    return data


def split_lines(value: bytes) -> tuple[Sequence[int], list[bytes]]:
    """The numbers, from 0, and the bytes of a record's lines that are not empty: one event each.

    An object spread over lines is one event: its first line begins it, does not end it, and no other line begins one.
    """
    if b"\n" not in value:
        return (0,), [value]
    lines = value.split(b"\n")
    filled = [number for number, line in enumerate(lines) if line and not line.isspace()]
    if not filled or _spread([lines[number] for number in filled]):
        return (0,), [value]
    if len(filled) == len(lines):
        return range(len(lines)), lines
    return filled, [lines[number] for number in filled]


def _spread(lines: Sequence[bytes]) -> bool:
    first = lines[0]
    if first.rstrip().endswith(b"}") or not first.startswith(b"{"):
        return False
    return not any(line.startswith(b"{") for line in lines[1:])


def encode_key(key: str) -> bytes | None:
    """Kafka's murmur2 over these bytes chooses the partition; no key where there is no id."""
    return key.encode() or None


def decode(model: type[M], data: bytes | None) -> M:
    """The event these bytes hold. Raises InvalidEvent with reason `empty`, `not_json` or `bad_field`."""
    return _validate(_adapter(model), model.__name__, data)


def decode_union(adapter: TypeAdapter[T], name: str, data: bytes | None) -> T:
    """The same for a discriminated union such as ROLLOUT_EVENT."""
    return _validate(adapter, name, data)


@cache
def _adapter(model: type[BaseModel]) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _validate(adapter: TypeAdapter[T], name: str, data: bytes | None) -> T:
    if not data:
        raise InvalidEvent("empty", f"{name}: the record has no value")
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the record"
        reason = "not_json" if first["type"] == "json_invalid" else "bad_field"
        raise InvalidEvent(reason, f"{name}: {where}: {first['msg']} ({error.error_count()} errors)") from None
