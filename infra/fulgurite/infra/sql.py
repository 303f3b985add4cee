"""Questions to ClickHouse from the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from fulgurite.infra.cli_common import console, say
from fulgurite.schemas.errors import FulguriteError, StartError
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import ClickHouseSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

MAX_TABLE_ROWS = 1_000
"""More is not for reading; --format json gives all."""

MAX_CELL_CHARS = 200


class SqlError(FulguriteError):
    """ClickHouse refused a statement; the message is its own."""


@contextlib.contextmanager
def clickhouse_errors(settings: ClickHouseSettings) -> Generator[None]:
    """The client library's errors as ours: StartError when nobody answers, SqlError when the statement is refused."""
    from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, OperationalError

    try:
        yield
    except OperationalError as error:
        raise StartError(
            f"no ClickHouse answers at {settings.url} (clickhouse.url): {_why(error)}; `fulgurite up` starts one"
        ) from error
    except (DatabaseError, ClickHouseError) as error:
        raise SqlError(_first_line(error)) from error


@contextlib.contextmanager
def connect(settings: ClickHouseSettings) -> Generator[Client]:
    """A client in our database."""
    import clickhouse_connect

    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        yield client


def run_sql(settings: ClickHouseSettings, statement: str, *, as_json: bool) -> int:
    """Prints the answer as a table or as JSON lines."""
    with clickhouse_errors(settings), connect(settings) as client:
        if as_json:
            text = client.raw_query(statement.rstrip().rstrip(";"), fmt="JSONEachRow").decode(errors="replace")
            console.out(text, end="")
            return 0
        result = client.query(statement.rstrip().rstrip(";"))
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
