"""A dead letter: the original bytes of a record that could not be used, unchanged, with the reason in its headers.

Header names are Kafka Connect's, so that tools which read its dead letter queues read these.
Direction: assembler, gateway, follower, trainer -> materialiser, operator. (What the materialiser itself cannot parse
it writes to the table `dead_letters` in the same insert as the good rows.)
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER_TOPIC = "__connect.errors.topic"
HEADER_PARTITION = "__connect.errors.partition"
HEADER_OFFSET = "__connect.errors.offset"
HEADER_LINE = "__connect.errors.line"
"""Ours, beside Connect's: which line, from 0, of a record that holds several events."""
HEADER_STAGE = "__connect.errors.stage"
HEADER_REASON = "__connect.errors.exception.class.name"
HEADER_MESSAGE = "__connect.errors.exception.message"

MAX_MESSAGE_CHARS = 2_000
MAX_REASON_CHARS = 256

MAX_KEY_BYTES = 4_096
"""No id is as long. A longer key (compressed, a record can have one of any length) would leave no room for the rest."""

HEADER_BYTES = 12 * 1024
"""What the headers take at most."""

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Topic `dead_letters`, key as the original; None where that is longer than MAX_KEY_BYTES."""

    topic: str
    """Full name of the original topic; empty when it never was a record."""
    partition: int
    offset: int
    stage: str
    """Who could not use it: materialiser, assembler, gateway, …"""
    reason: str
    """A short constant to group by: not_json, bad_field, unknown_rollout, late, …"""
    message: str
    """What exactly is wrong, for a person."""
    key: bytes | None
    value: bytes | None
    line: int = 0
    """Which line of the original `value` is, from 0."""

    def __post_init__(self) -> None:
        if len(self.key or b"") > MAX_KEY_BYTES:
            object.__setattr__(self, "key", None)

    def value_within(self, max_record_bytes: int) -> bytes | None:
        """The value, empty where key, headers and it are more than a record may be: where it lies the headers say."""
        room = max_record_bytes - HEADER_BYTES - len(self.key or b"")
        return self.value if len(self.value or b"") <= room else b""

    def headers(self) -> Headers:
        fields = (
            (HEADER_TOPIC, self.topic),
            (HEADER_PARTITION, str(self.partition)),
            (HEADER_OFFSET, str(self.offset)),
            (HEADER_LINE, str(self.line)),
            (HEADER_STAGE, self.stage),
            (HEADER_REASON, self.reason[:MAX_REASON_CHARS]),
            (HEADER_MESSAGE, self.message[:MAX_MESSAGE_CHARS]),
        )
        # A message may quote half a surrogate pair, which has no UTF-8.
        return [(name, value.encode(errors="replace")) for name, value in fields]
