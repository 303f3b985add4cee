"""What all events share: they keep fields they do not know, and their bounds are stated once, here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StringConstraints

MAX_TEXT_CHARS = 4_000_000
"""Prompts and answers of very long contexts fit; a whole record is bounded by kafka.max_record_bytes anyway."""

MAX_TOKENS = 1_048_576
"""Tokens of one sequence: above the longest contexts served today."""

MAX_ATTRIBUTES = 1_024
"""Attributes of one span. OpenTelemetry's own default is 128; agents' frameworks exceed it."""


def _unquoted(value: object) -> object:
    """An integer written in quotes, or as 1.0: in JavaScript there is no other way to write nanoseconds exactly."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
ShortText = Annotated[str, StringConstraints(max_length=4_096)]
Name = Annotated[str, StringConstraints(max_length=512)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(max_length=MAX_TOKENS)]
Logprobs = Annotated[list[FiniteFloat], Field(max_length=MAX_TOKENS)]
TimeNs = Annotated[int, Field(ge=0, lt=2**63)]
Unquoted = BeforeValidator(
    _unquoted, json_schema_input_type=TimeNs | Annotated[str, StringConstraints(pattern=r"^[0-9]{1,19}$")]
)
"""For the integers of spans from 0 to 2^63-1, as the table's view reads them."""
Version = Annotated[int, Field(ge=0, lt=2**63)]
Attributes = Annotated[dict[str, Any], Field(max_length=MAX_ATTRIBUTES)]
Labels = Annotated[dict[str, ShortText], Field(max_length=MAX_ATTRIBUTES)]


class Event(BaseModel):
    """Base of every event. Evolution is additive: an unknown field is kept and written out again, not dropped."""

    model_config = ConfigDict(
        extra="allow", validate_default=False, ser_json_inf_nan="strings", use_attribute_docstrings=True
    )


class VersionSpan(BaseModel):
    """Tokens start (inclusive) to end (exclusive) were sampled by this version of the policy."""

    version: Version
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]
