"""What an error of ClickHouse means to the materialiser."""

from __future__ import annotations

import aiohttp
import pytest
from clickhouse_connect.driver.exceptions import OperationalError

from fulgurite.consumers.materialiser.errors import TooSlow, Unavailable, meaning


def wrapped(cause: Exception) -> Exception:
    """As the client raises it."""
    try:
        raise OperationalError("Error executing HTTP request") from cause
    except OperationalError as error:
        return error


@pytest.mark.parametrize(
    ("error", "slow"),
    [
        (TimeoutError(), True),
        (wrapped(aiohttp.SocketTimeoutError()), True),
        (wrapped(aiohttp.ConnectionTimeoutError()), False),
        (wrapped(ConnectionRefusedError()), False),
    ],
)
def test_a_server_that_does_not_answer_is_slow_and_one_that_is_not_there_is_none(error: Exception, slow: bool) -> None:
    assert type(meaning(error, frozenset())) is (TooSlow if slow else Unavailable)
