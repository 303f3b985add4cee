"""Questions to ClickHouse from the command line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from fulgurite.infra.cli_common import console, say
from fulgurite.schemas.errors import FulguriteError, SettingsError, StartError
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import ClickHouseSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

MAX_TABLE_ROWS = 1_000
"""More is not for reading; --format json gives all."""

MAX_CELL_CHARS = 200

ANSWER_SECONDS = 10.0
"""Longest that a server may take to answer at all; a statement may take longer."""

_FORMAT = re.compile(r"\bFORMAT\s+\w+\s*$", re.IGNORECASE)


class SqlError(FulguriteError):
    """ClickHouse refused a statement; the message is its own."""


@contextlib.contextmanager
def clickhouse_errors(settings: ClickHouseSettings) -> Generator[None]:
    """The client library's errors as ours: StartError when no ClickHouse answers, SettingsError when it does not take
    our login, SqlError when it refuses the statement."""
    from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, OperationalError

    try:
        yield
    except OperationalError as error:
        raise StartError(
            f"no ClickHouse answers at {settings.url} (clickhouse.url): {_why(error)}; `fulgurite up` starts one"
        ) from error
    except (DatabaseError, ClickHouseError) as error:
        text = _first_line(error)
        if "AUTHENTICATION_FAILED" in text or "REQUIRED_PASSWORD" in text:
            raise SettingsError(
                f"ClickHouse at {settings.url} does not take user {settings.user!r} with this password: check "
                "clickhouse.user and clickhouse.password"
            ) from error
        if "HTTP driver received HTTP status" in text:
            raise StartError(
                f"what answers at {settings.url} (clickhouse.url) is no ClickHouse, or a proxy without one: {text}"
            ) from error
        if "UNKNOWN_DATABASE" in text:
            raise SqlError(f"{text}; `fulgurite migrate` makes it") from error
        raise SqlError(text) from error


def require_answer(settings: ClickHouseSettings) -> None:
    """Raises, as the client library does, where nobody answers within ANSWER_SECONDS: it would wait minutes for it."""
    import clickhouse_connect

    options = connection_options(settings)
    options |= {"connect_timeout": ANSWER_SECONDS, "send_receive_timeout": ANSWER_SECONDS, "query_retries": 0}
    clickhouse_connect.get_client(**options).close()


@contextlib.contextmanager
def connect(settings: ClickHouseSettings) -> Generator[Client]:
    """A client in our database."""
    import clickhouse_connect

    require_answer(settings)
    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        yield client


def run_sql(settings: ClickHouseSettings, statement: str, *, as_json: bool) -> int:
    """Prints the answer as a table or as JSON lines."""
    statement = statement.strip().rstrip(";").rstrip()
    if not statement:
        raise SettingsError('the statement is empty: fulgurite sql "SHOW TABLES", for example')
    if found := _FORMAT.search(statement):
        raise SettingsError(f"leave out {found[0]!r}: --format table or --format json says how the answer is printed")
    with clickhouse_errors(settings), connect(settings) as client:
        if as_json:
            text = client.raw_query(statement, fmt="JSONEachRow").decode(errors="replace")
            console.out(text, end="")
            return 0
        result = client.query(statement)
    rows = result.result_rows
    table = Table(*(escape(name) for name in result.column_names))
    for row in rows[:MAX_TABLE_ROWS]:
        table.add_row(*(escape(_cell(value)) for value in row))
    console.print(table)
    more = f", the first {MAX_TABLE_ROWS} shown" if len(rows) > MAX_TABLE_ROWS else ""
    say(f"[dim]{len(rows)} rows{more}[/]")
    return 0


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_CELL_CHARS else text[: MAX_CELL_CHARS - 1] + "…"


def _why(error: Exception) -> str:
    """The client's message repeats its whole stack of libraries around the reason."""
    text = _first_line(error)
    return "connection refused" if "Connection refused" in text else text[:MAX_CELL_CHARS]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
