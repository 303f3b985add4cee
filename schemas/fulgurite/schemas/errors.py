"""The one error tree.

FulguriteError
├── SettingsError        a setting is missing, unknown or wrong: says which, from where, what is allowed (exit 2)
├── StartError           a part could not start: port taken, disk full, download refused, wrong data folder (exit 3)
├── InvalidEvent         bytes that are not the event they should be: becomes a dead letter, never stops a stream
│   └── RecordTooLarge   an event over the size bound, refused before it is sent
├── BufferFull           a publisher's buffer stayed full for longer than the caller was ready to wait
├── Undelivered          a publisher was closed with records the broker had not acknowledged
├── CoordinatorError     the coordinator refused a request: carries its HTTP status
├── ChecksumMismatch     a policy version's files are not the ones that were announced
├── LogprobMismatch      trainer and sampler disagree about the same version's probabilities
└── Fenced               another process took over this process's transactional id: stop, it owns the work now

Rule: catch only to retry, to dead-letter or to shut down. Everything else travels up and ends the process, whose
supervisor restarts it.
"""

from __future__ import annotations


class FulguriteError(Exception):
    """Base of all errors of this project. `exit_code` is what a command ends with when it lets the error out."""

    exit_code = 1


class SettingsError(FulguriteError):
    exit_code = 2


class StartError(FulguriteError):
    exit_code = 3


class InvalidEvent(FulguriteError):
    """`reason` is a short constant to group by (`not_json`, `bad_field`, …); the message says what and where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RecordTooLarge(InvalidEvent):
    def __init__(self, message: str) -> None:
        super().__init__("too_large", message)


class BufferFull(FulguriteError):
    pass


class Undelivered(FulguriteError):
    """`records` counts what may not have reached the broker; `first_error` is the first reason seen."""

    def __init__(self, records: int, first_error: BaseException | None) -> None:
        super().__init__(f"{records} records were not acknowledged by the broker (first error: {first_error!r})")
        self.records = records
        self.first_error = first_error


class CoordinatorError(FulguriteError):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"coordinator answered {status}: {message}")
        self.status = status


class ChecksumMismatch(FulguriteError):
    pass


class LogprobMismatch(FulguriteError):
    exit_code = 4


class Fenced(FulguriteError):
    exit_code = 5
