"""The tables' migrations: the files of `tables/`, applied in the order of their names and recorded in
`schema_migrations`.

Promises: applying them again changes nothing; a file that was changed after it was applied is refused before anything
is done (write a new file instead); a crash in the middle, or two processes at once, leave a database that applying
again completes, because every statement can be repeated (a test holds the files to it).

Older materialisers go on inserting meanwhile. What a file may do therefore stands in docs/operations.md, and of the
statements that set what a view does, for everybody at once, two kinds are left out here:

- that of a file after which another sets the same view, where the view exists: another process may be further, and its
  view must not be set back;
- that on a view that redacts (its comment says so). Its query without the rules must not be in force for a moment;
  `apply_redaction`, which knows them, puts the new one with them in its place.

Knows nothing of Kafka, nor of the rules of redaction.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import ClickHouseSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

_RECORDS = """
CREATE TABLE IF NOT EXISTS schema_migrations
(name String, sha256 String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3))
ENGINE = MergeTree ORDER BY name
"""

REDACTED = "redaction "
"""The comment of a view begins with it while rules of redaction are in its query, or are being put there."""

_VIEW_QUERY = re.compile(
    r"(?:CREATE MATERIALIZED VIEW IF NOT EXISTS (?P<made>\w+)\s+TO \w+ AS"
    r"|ALTER TABLE (?P<changed>\w+) MODIFY QUERY)\s+(?P<select>.*)",
    re.DOTALL,
)
_VIEW_CHANGE = re.compile(r"(?:ALTER TABLE (?P<altered>\w+) MODIFY QUERY|CREATE OR REPLACE VIEW (?P<replaced>\w+))\s")


def changed_view(statement: str) -> str:
    """The view, there for everybody, whose query the statement sets; "" where it sets none."""
    match = _VIEW_CHANGE.match(statement)
    return (match["altered"] or match["replaced"]) if match else ""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of `tables/`."""

    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def views(self) -> dict[str, str]:
        """The materialized views of which it sets the query, and their SELECT."""
        matches = filter(None, map(_VIEW_QUERY.fullmatch, self.statements))
        return {match["made"] or match["changed"]: match["select"] for match in matches}

    @property
    def statements(self) -> list[str]:
        """Without comments. A statement ends with a semicolon at the end of a line."""
        code = re.sub(r"^\s*--.*\n", "", self.sql, flags=re.MULTILINE)
        return [part.strip() for part in re.split(r";\s*$", code, flags=re.MULTILINE) if part.strip()]


def migrations() -> list[Migration]:
    """All of them, in the order in which they are applied."""
    folder = files("fulgurite.schemas") / "tables"
    found = [Migration(file.name, file.read_text("utf-8")) for file in folder.iterdir() if file.name.endswith(".sql")]
    return sorted(found, key=lambda migration: migration.name)


def connection_options(settings: ClickHouseSettings) -> dict[str, Any]:
    """Keyword arguments for clickhouse_connect's clients, without the database."""
    url = urlparse(settings.url)
    secure = url.scheme == "https"
    options: dict[str, Any] = {
        "host": url.hostname,
        "port": url.port or (8443 if secure else 8123),
        "secure": secure,
        "username": settings.user,
        "password": settings.password.get_secret_value(),
        # One session per client would refuse two queries at once; nothing here needs temporary tables.
        "autogenerate_session_id": False,
    }
    if secure:
        options["verify"] = settings.ssl_verify
        given = {
            "ca_cert": settings.ssl_cafile,
            "client_cert": settings.ssl_certfile,
            "client_cert_key": settings.ssl_keyfile,
        }
        options |= {name: str(path) for name, path in given.items() if path is not None}
        if settings.ssl_certfile is not None:
            # Without a password the certificate itself is who we are; with one it only opens the door.
            options["tls_mode"] = "strict" if settings.password.get_secret_value() else "mutual"
    return options


def apply_migrations(settings: ClickHouseSettings) -> list[str]:
    """Creates the database if need be and applies what is missing; returns the names of the files applied now.

    Raises StartError when a file was changed after it was applied, or when the database has one this version lacks.
    """
    import clickhouse_connect

    options = connection_options(settings)
    database = settings.database
    with clickhouse_connect.get_client(**options) as server:
        # Atomic by name: the embedded engine's default engine would refuse refreshable views.
        server.command(f"CREATE DATABASE IF NOT EXISTS {database} ENGINE = Atomic")
    with clickhouse_connect.get_client(**options, database=database) as client:
        client.command(_RECORDS)
        return _apply(client, settings, migrations())


def _apply(client: Client, settings: ClickHouseSettings, known: list[Migration]) -> list[str]:
    applied = _applied(client)
    _refuse_changed(settings, known, applied)
    last = {changed_view(statement): migration.name for migration in known for statement in migration.statements}
    done: list[str] = []
    for migration in known:
        if migration.name in applied:
            continue
        for statement in migration.statements:
            view = changed_view(statement)
            if not view or not _is_left_out(client, view, superseded=last[view] != migration.name):
                client.command(statement)
        client.insert("schema_migrations", [[migration.name, migration.sha256]], column_names=["name", "sha256"])
        done.append(migration.name)
    return done


def _applied(client: Client) -> Mapping[str, str]:
    rows = client.query("SELECT name, sha256 FROM schema_migrations").result_rows
    return {str(name): str(digest) for name, digest in rows}


def _is_left_out(client: Client, view: str, *, superseded: bool) -> bool:
    rows = client.query(
        "SELECT comment FROM system.tables WHERE database = currentDatabase() AND name = {view:String}",
        parameters={"view": view},
    ).result_rows
    return any(superseded or str(comment).startswith(REDACTED) for (comment,) in rows)


def _refuse_changed(settings: ClickHouseSettings, known: list[Migration], applied: Mapping[str, str]) -> None:
    where = f"database {settings.database} at {settings.url}"
    for migration in known:
        if applied.get(migration.name, migration.sha256) != migration.sha256:
            raise StartError(
                f"the migration {migration.name} was changed after it was applied to the {where}: "
                "restore the file, and put the change into a new one"
            )
    unknown = sorted(applied.keys() - {migration.name for migration in known})
    if unknown:
        raise StartError(
            f"the {where} has migrations this version does not know ({', '.join(unknown)}): "
            "it was made by a newer version; use that one, or another database"
        )
