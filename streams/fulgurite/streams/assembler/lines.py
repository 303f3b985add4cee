"""Whose the lines of a record are: all that must be known of spans and rewards before their rollout ends. Pure.

A line is read for its two ids only; the rest of it is read once, when its rollout has ended (join.py).
"""

from __future__ import annotations

from pydantic import BaseModel, TypeAdapter, ValidationError

from fulgurite.schemas.codec import split_lines
from fulgurite.schemas.ids import OptionalId


class Identity(BaseModel):
    """What a line says of whose it is."""

    rollout_id: OptionalId = ""
    attempt_id: OptionalId = ""


_IDENTITY = TypeAdapter(Identity)


def attempts_of(value: bytes) -> tuple[dict[str, str], int]:
    """Rollout -> attempt, of a record's lines ("" where they name several), and how many lines are no event."""
    attempts: dict[str, str] = {}
    invalid = 0
    for line in split_lines(value)[1]:
        found = _identity(line)
        if found is None:
            invalid += 1
        elif found.rollout_id:
            same = attempts.setdefault(found.rollout_id, found.attempt_id) == found.attempt_id
            attempts[found.rollout_id] = found.attempt_id if same else ""
    return attempts, invalid


def lines_of(rollout_id: str, value: bytes) -> list[tuple[int, bytes]]:
    """Which lines of a record are this rollout's, with their numbers; the only line of a record whatever it says."""
    numbered = list(zip(*split_lines(value), strict=True))
    if len(numbered) == 1:
        return numbered
    return [(at, line) for at, line in numbered if (found := _identity(line)) and found.rollout_id == rollout_id]


def _identity(line: bytes) -> Identity | None:
    try:
        return _IDENTITY.validate_json(line, strict=True)
    except ValidationError:
        return None
