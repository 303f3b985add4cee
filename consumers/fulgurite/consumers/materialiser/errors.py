"""What an error of ClickHouse means to the materialiser: never these records, not yours, too large or slow, try again.

Pure; knows the engine's codes and nothing of what was sent.
"""

from __future__ import annotations

from typing import Final

import aiohttp
from clickhouse_connect.driver.exceptions import Error

from fulgurite.consumers.materialiser.fences import REFUSAL, REFUSAL_CODE, WENT_BACK


class Unavailable(Exception):
    """ClickHouse could not be asked, or did not say how it went."""


class Fenced(Unavailable):
    """A partition of the insert is somebody else's, or ours by a newer fence, or the database is an older copy of what
    it was: nothing was inserted."""


class OtherLog(Exception):
    """What Kafka has of a partition are not the records that the tables have. Says what to do."""


class TooLarge(Unavailable):
    """The insert needs more memory than the server has to give; some tables may have their part."""


class TooSlow(Unavailable):
    """The insert takes longer than it may; it may have happened, or will."""


class NotUnderstood(Unavailable):
    """The server will never take what Fulgurite asks it: a defect. It says so, and is tried on, for servers are
    exchanged."""


class Rejected(Exception):
    """ClickHouse will not take these records, however often it is asked."""


# Errors about the data itself. Everything else (memory, disk, too many parts, a missing table, network) is retried:
# taking a broken server for broken records would turn a whole topic into dead letters.
REJECTED_CODES: Final = frozenset(
    {
        6,  # CANNOT_PARSE_TEXT
        26,  # CANNOT_PARSE_QUOTED_STRING
        27,  # CANNOT_PARSE_INPUT_ASSERTION_FAILED
        38,  # CANNOT_PARSE_DATE
        41,  # CANNOT_PARSE_DATETIME
        53,  # TYPE_MISMATCH
        69,  # ARGUMENT_OUT_OF_BOUND
        70,  # CANNOT_CONVERT_TYPE
        72,  # CANNOT_PARSE_NUMBER
        117,  # INCORRECT_DATA
        128,  # TOO_LARGE_ARRAY_SIZE
        131,  # TOO_LARGE_STRING_SIZE
        190,  # SIZES_OF_ARRAYS_DONT_MATCH
        321,  # VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE
        349,  # CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN
        395,  # FUNCTION_THROW_IF_VALUE_IS_NON_ZERO
        407,  # DECIMAL_OVERFLOW
        469,  # VIOLATED_CONSTRAINT
    }
)


_TOO_SLOW_CODES: Final = frozenset({159, 160})  # TIMEOUT_EXCEEDED, TOO_SLOW
_NO_MEMORY_CODES: Final = frozenset({241, 173})  # MEMORY_LIMIT_EXCEEDED, CANNOT_ALLOCATE_MEMORY


_NOT_UNDERSTOOD_CODES: Final = frozenset(
    {
        42,  # NUMBER_OF_ARGUMENTS_DOESNT_MATCH
        43,  # ILLEGAL_TYPE_OF_ARGUMENT
        46,  # UNKNOWN_FUNCTION
        62,  # SYNTAX_ERROR, also of a text that is too long
        115,  # UNKNOWN_SETTING
        167,  # TOO_DEEP_AST
        168,  # TOO_BIG_AST
    }
)


def meaning(error: Exception, refusals: frozenset[int]) -> Exception:
    """Of an insert's error, in the materialiser's terms."""
    text = first_line(error)
    code = error.code if isinstance(error, Error) else None
    if code == REFUSAL_CODE and (REFUSAL in text or WENT_BACK in text):
        return Fenced(text)
    if code in _NO_MEMORY_CODES:
        return TooLarge(text)
    if code in _TOO_SLOW_CODES or _timed_out(error):
        return TooSlow(text)
    return Rejected(text) if code in refusals else _in_vain_or_not(code, text)


def of_a_question(error: Exception) -> Unavailable:
    """Of what is not an insert of records."""
    return _in_vain_or_not(error.code if isinstance(error, Error) else None, first_line(error))


def _in_vain_or_not(code: int | None, text: str) -> Unavailable:
    if code not in _NOT_UNDERSTOOD_CODES:
        return Unavailable(text)
    return NotUnderstood(
        "ClickHouse does not understand what it is asked, and trying again will not help: its version is not one that "
        f"Fulgurite knows, or this is a defect of Fulgurite; report it: {text}"
    )


def _timed_out(error: BaseException | None) -> bool:
    """Whether the server took the insert and did not answer in time, whatever the client made of that."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return not isinstance(error, aiohttp.ConnectionTimeoutError)
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:1_000]
