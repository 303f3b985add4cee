"""What judges said: an SQLite file, or memory, of answers by question. The newest `limit` are kept.

Promises: an answer that was put is found until it is among the oldest beyond the limit; a file that several processes
share stays whole. Losing it costs questions asked again, nothing else, so writes are not synced to disk.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from pathlib import Path

from fulgurite.schemas.errors import StartError

logger = logging.getLogger(__name__)

_TRIM_EVERY = 1_000
_BUSY_SECONDS = 5.0


class Verdicts:
    """Used from one thread."""

    def __init__(self, path: Path | None, limit: int) -> None:
        self._limit = limit
        self._puts = 0
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=_BUSY_SECONDS)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = OFF")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (id INTEGER PRIMARY KEY, question BLOB UNIQUE, answer TEXT)"
            )
        except (OSError, sqlite3.Error) as error:
            raise StartError(f"aggregator.cache = {path}: cannot be used: {error}") from error

    def get(self, question: str) -> str | None:
        found = self._execute("SELECT answer FROM verdicts WHERE question = ?", _digest(question))
        return str(found[0][0]) if found else None

    def put(self, question: str, answer: str) -> None:
        self._execute("INSERT OR REPLACE INTO verdicts (question, answer) VALUES (?, ?)", _digest(question), answer)
        self._puts += 1
        if self._puts % min(_TRIM_EVERY, self._limit) == 0:
            newest = "SELECT id FROM verdicts ORDER BY id DESC LIMIT 1 OFFSET ?"
            self._execute(f"DELETE FROM verdicts WHERE id <= ({newest})", self._limit)

    def _execute(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        try:
            return self._file.execute(sql, values).fetchall()
        except sqlite3.Error as error:  # a full disk, another process that holds it: scoring goes on without
            logger.warning("verdicts are not kept or found: %s", error)
            return []

    def close(self) -> None:
        self._file.close()


def _digest(question: str) -> bytes:
    return hashlib.sha256(question.encode()).digest()
