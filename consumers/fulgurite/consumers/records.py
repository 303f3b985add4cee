"""What consumers need of aiokafka's ConsumerRecord, so that their pure parts take any record, a test's too."""

from __future__ import annotations

from typing import Protocol


class LogRecord(Protocol):
    """One record of a partition; `timestamp` in milliseconds."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
