"""Whether sending a dead letter again makes sense, and what is to be sent.

Pure: it asks nobody. A refusal says why, what would help, and whether --force may override it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fulgurite.infra.dlq.actions import Mend
from fulgurite.infra.dlq.letters import Letter, Place, topic_named
from fulgurite.infra.dlq.mending import validate
from fulgurite.schemas import topics
from fulgurite.schemas.codec import split_lines
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.settings import KafkaSettings

ANYBODYS_EVENTS = ("queued", "cancelled", "heartbeat")
"""What others than the coordinator may say about a rollout."""


@dataclass(frozen=True, slots=True)
class Refusal:
    why: str
    force_helps: bool


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One letter, ready to be sent."""

    letter: Letter
    topic: str
    key: bytes | None
    value: bytes
    mend_id: str
    """Empty: the original bytes."""


def outgoing(
    settings: KafkaSettings, letter: Letter, mend: Mend | None, known_rollouts: Collection[str], *, force: bool
) -> Outgoing | Refusal:
    """What to send for this letter, or why nothing."""
    refusal = _no_way(settings, letter)
    if refusal is not None:
        return refusal
    value = mend.value if mend else letter.value
    try:
        event = validate(settings, letter.original_topic, value, is_record=letter.is_record)
    except InvalidEvent as error:
        event = None
        refusal = Refusal(
            f"it would be a dead letter again: {error.reason}: {error}. Mend it first: fulgurite dlq mend", True
        )
    else:
        is_life = topic_named(settings, letter.original_topic) is topics.ROLLOUTS
        refusal = _useless(letter, event, known_rollouts, is_life=is_life, mended=mend is not None)
    named = _keys_of(event)
    if refusal is None and mend is not None and len(named) > 1:
        refusal = Refusal(
            f"its lines name {', '.join(sorted(key.decode() for key in named))}, and a record has one key: mend it "
            "so that they name one",
            True,
        )
    if refusal is not None and not force:
        return refusal
    key = letter.key or None
    if len(named) == 1 and (mend is not None or key is None):
        # Where the mend corrected the id, the record belongs into that id's partition.
        (key,) = named
    mend_id = mend.mend_id if mend else ""
    return Outgoing(letter, letter.original_topic, key, _with_identity(settings, letter, event, value), mend_id)


def rollouts_of(event: Any) -> set[str]:
    """That it names, or its lines."""
    return {str(getattr(each, "rollout_id", "")) for each in _events(event)} - {""}


def _events(event: Any) -> Sequence[Any]:
    """Of what `validate` found: one, or a whole record's."""
    return event if isinstance(event, list) else [event]


def _no_way(settings: KafkaSettings, letter: Letter) -> Refusal | None:
    """What no --force overrides."""
    if not letter.original_topic:
        return Refusal(f"it never was a record of a topic: the {letter.stage} kept these bytes to be looked at", False)
    topic = topic_named(settings, letter.original_topic)
    if topic is None or topic is topics.DEAD_LETTERS:
        return Refusal(f"{letter.original_topic} is no topic that takes records of this namespace", False)
    if "compact" in topic.cleanup:
        return Refusal(
            f"{letter.original_topic} is compacted: an old record sent again would count as the newest of its key, and "
            "push out the one that is. Publish it anew from where it comes",
            False,
        )
    return None


def _useless(
    letter: Letter, event: Any, known_rollouts: Collection[str], *, is_life: bool, mended: bool
) -> Refusal | None:
    """What would not come to a better end than the last time."""
    if event is None:
        return Refusal("nobody here can check it; once its reader is mended, use --force", True)
    kind = getattr(event, "event", "")
    if is_life and kind not in ANYBODYS_EVENTS:
        return Refusal(f"`{kind}` is for the coordinator alone to say, in its order; it says it again by itself", True)
    reasons = {reason for _, reason, _ in letter.verdicts} or {letter.reason}
    if "late" in reasons and not mended:
        return Refusal(
            f"rollout {_listed(rollouts_of(event))} had ended and its trajectory was emitted: it would come late "
            "again. The tables have it",
            True,
        )
    unknown = rollouts_of(event) - set(known_rollouts)
    if "unknown_rollout" in reasons and kind != "queued" and unknown:
        return Refusal(f"still nobody announced rollout {_listed(unknown)}: queue it first, then replay", True)
    if {"bad_tokens", "wrong_model"} & reasons and not mended:
        return Refusal("the trainer would refuse the same tokens again: mend it first: fulgurite dlq mend", True)
    return None


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def _keys_of(event: Any) -> set[bytes]:
    """Of it, or of its lines that name something."""
    return {key for each in _events(event) if (key := _key_of(each)) is not None}


def _key_of(event: Any) -> bytes | None:
    """The key that producers give such an event."""
    fields = ("run_id",)
    if hasattr(event, "rollout_id"):
        fields = ("group_id", "rollout_id") if hasattr(event, "sequences") else ("rollout_id",)
    return next((str(value).encode() for field in fields if (value := getattr(event, field, ""))), None)


def _with_identity(settings: KafkaSettings, letter: Letter, event: Any, value: bytes) -> bytes:
    """A reward without reward_id is named after its place, as the table names it: however often it is sent, it counts
    once."""
    if topic_named(settings, letter.original_topic) is not topics.REWARDS or event is None:
        return value
    numbers, lines = split_lines(value)
    # One line's name is its own, wherever the mend puts it.
    places = [replace(letter.place, index=number) if letter.is_record else letter.place for number in numbers]
    return b"\n".join(_named(line, place) for line, place in zip(lines, places, strict=True))


def _named(line: bytes, place: Place) -> bytes:
    record = json.loads(line)
    if record.get("reward_id"):
        return line
    name = f"{place.topic}-{place.partition}-{place.offset}" + (f"-{place.index}" if place.index else "")
    return json.dumps({**record, "reward_id": name}, ensure_ascii=False, separators=(",", ":")).encode()
