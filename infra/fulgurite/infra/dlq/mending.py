"""Mends a dead letter's bytes and says what is still wrong with them.

An expression is Python over the decoded record: `r["name"] = str(r["name"])` changes it, `{**r, "kind": "internal"}`
gives another. Not jq: its numbers are doubles, and would move every nanosecond time stamp by up to 128 ns unasked.
The expression is the operator's own and runs with the operator's rights; the record is only data to it.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from pydantic import TypeAdapter

from fulgurite.consumers.materialiser.blocks import LINE_TOPICS, MAX_LINES
from fulgurite.infra.dlq.letters import topic_named
from fulgurite.infra.dlq.otlp import checked_spans
from fulgurite.schemas.codec import decode_union, split_lines
from fulgurite.schemas.errors import FulguriteError, InvalidEvent, RecordTooLarge, SettingsError
from fulgurite.schemas.exports import EVENTS
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import OTLP_SPANS, Topic

_MAX_DIFF_CHARS = 4_000
_NO_JSON = (ValueError, RecursionError)

Mending = Callable[[bytes], bytes]
"""Old bytes -> new bytes. Raises MendError."""


class MendError(FulguriteError):
    """The mend could not be carried out, or its result is not what the topic holds."""


def by_expression(source: str) -> Mending:
    """Python over `r` (the record; None where the bytes are no JSON, or too deep) and `text` (the bytes as text).

    Raises SettingsError where it is not Python.
    """
    try:
        code, is_expression = _compiled(source)
    except SyntaxError as error:
        raise SettingsError(f"--with {source}: {error.msg} (a Python expression or statements over r)") from None

    def mend(data: bytes) -> bytes:
        names: dict[str, Any] = {
            "r": _decoded(data),
            "text": data.decode(errors="replace"),
            "json": json,
            "re": re,
            "math": math,
            "datetime": datetime,
        }
        try:
            result = eval(code, names)
        except Exception as error:  # the expression is anybody's
            raise MendError(f"{source}: {type(error).__name__}: {error}") from None
        return _encoded(result if is_expression else names["r"], source)

    return mend


def by_fields(assignments: Sequence[str]) -> Mending:
    """`field=value`, `outer.inner=value`; the value as JSON, or as text where it is none. Raises SettingsError."""
    parsed: list[tuple[list[str], Any]] = []
    for text in assignments:
        path, separator, value = text.partition("=")
        if not separator or not all(path.split(".")):
            raise SettingsError(f"--set {text}: must be FIELD=VALUE, for example --set name=chat")
        try:
            parsed.append((path.split("."), json.loads(value)))
        except _NO_JSON:
            parsed.append((path.split("."), value))

    def mend(data: bytes) -> bytes:
        record = _decoded(data)
        for path, value in parsed:
            at = record
            for part in path[:-1]:
                at = at.setdefault(part, {}) if isinstance(at, dict) else None
            if not isinstance(at, dict):
                raise MendError(f"{'.'.join(path)}: there is no object to set it in; use --with or --edit-file")
            at[path[-1]] = value
        return _encoded(record, "--set")

    return mend


def validate(settings: KafkaSettings, topic_name: str, data: bytes, *, is_record: bool = False) -> Any:
    """The event these bytes are, where somebody here can check them, else None. Of OTLP its spans, of a whole record
    (`is_record`) of several lines the events. Raises InvalidEvent."""
    if len(data) > settings.max_record_bytes:
        raise RecordTooLarge(f"{len(data)} bytes; kafka.max_record_bytes allows {settings.max_record_bytes}")
    topic = topic_named(settings, topic_name)
    if topic is OTLP_SPANS:
        return checked_spans(data)
    adapter = EVENTS.get(topic) if topic else None
    if topic is None or adapter is None:
        return None
    if topic in LINE_TOPICS:
        return _validate_lines(adapter, topic, data, is_record=is_record)
    return _validate(adapter, topic, data)


def _validate_lines(adapter: TypeAdapter[Any], topic: Topic, data: bytes, *, is_record: bool) -> Any:
    if (feeds := data.count(b"\n")) > MAX_LINES:
        raise InvalidEvent("rejected", f"{topic.name}: {feeds + 1:,} lines, of at most {MAX_LINES:,} a record")
    numbers, lines = split_lines(data)
    if len(lines) == 1:
        return _validate(adapter, topic, lines[0])
    if not is_record:
        raise InvalidEvent("not_json", f"{topic.name}: {len(lines)} lines; this dead letter is one event")
    found: list[Any] = []
    for number, line in zip(numbers, lines, strict=True):
        try:
            found.append(_validate(adapter, topic, line))
        except InvalidEvent as error:
            raise InvalidEvent(error.reason, f"line {number}: {error}") from None
    return found


def _validate(adapter: TypeAdapter[Any], topic: Topic, data: bytes) -> Any:
    event = decode_union(adapter, topic.name, data)
    try:  # pydantic reads NaN where JSON has none; the tables do not
        record = json.loads(data, parse_constant=_no_constant)
    except ValueError as error:
        raise InvalidEvent("not_json", f"{topic.name}: {error}") from None
    for name in type(event).model_fields:  # nor integers of any length
        if isinstance(number := record.get(name), int) and not -(2**63) <= number < 2**64:
            raise InvalidEvent("bad_field", f"{topic.name}: {name}: has more than 64 bits: write it with an exponent")
    return event


def difference(before: bytes, after: bytes) -> list[str]:
    """Lines of a unified diff, readable: JSON with a field a line."""
    lines = difflib.unified_diff(readable(before).splitlines(), readable(after).splitlines(), lineterm="", n=1)
    shown: list[str] = []
    size = 0
    for line in list(lines)[2:]:
        size += len(line)
        if size > _MAX_DIFF_CHARS:
            return [*shown, "… (more)"]
        shown.append(line)
    return shown


def readable(data: bytes) -> str:
    """Indented JSON, else text, else a hex dump."""
    record = _decoded(data)
    if record is not None:
        with contextlib.suppress(RecursionError):  # writing indented JSON goes less deep than reading
            return json.dumps(record, indent=1, ensure_ascii=False)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _hex(data)
    return text if text.isprintable() or "\n" in text else _hex(data)


def _hex(data: bytes) -> str:
    rows = (data[start : start + 16] for start in range(0, len(data), 16))
    return "\n".join(
        f"{16 * number:08x}  {row.hex(' '):<47}  {''.join(chr(c) if 32 <= c < 127 else '.' for c in row)}"
        for number, row in enumerate(rows)
    )


def _compiled(source: str) -> tuple[CodeType, bool]:
    try:
        return compile(source, "--with", "eval"), True
    except SyntaxError:
        return compile(source, "--with", "exec"), False


def _decoded(data: bytes) -> Any:
    """None where it is not JSON in UTF-8, or is nested deeper than Python reads. Numbers stay what they are."""
    try:
        return json.loads(data, parse_constant=_no_constant)
    except _NO_JSON:
        return None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _encoded(record: Any, how: str) -> bytes:
    if isinstance(record, bytes):
        return record
    if isinstance(record, str):
        return record.encode()
    if record is None:
        raise MendError(f"{how}: gives no record; where the bytes are not JSON, r is None and text has them")
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, *_NO_JSON) as error:
        raise MendError(f"{how}: the result is no JSON: {error}") from None
