"""Brings the views that fill the tables to the rules of `redaction`: what foreign producers sent is redacted there.

1. Read which rules the view has: its comment holds their fingerprint (none: no rules).
2. Other rules: the comment says that they are changing, so that a crash from here on repeats the steps.
3. The view's query becomes that of its migration with the columns redacted (ALTER … MODIFY QUERY: inserts before it go
   the old way, inserts after it the new way, none neither).
4. The comment becomes the fingerprint.

Promises: after `apply_redaction` everything inserted is stored by these rules; without rules the views are as their
migrations made them. Rows stored before stay as they are. Rules belong to the database: of two processes with
different rules the one that started last wins.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.migrations import REDACTED, migrations
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.redaction_sql import (
    DEAD_LETTER_COLUMNS,
    REWARD_COLUMNS,
    ROLLOUT_COLUMNS,
    SPAN_COLUMNS,
    TRAJECTORY_COLUMNS,
    Kind,
    derived_select,
    redacted_select,
)

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

logger = logging.getLogger(__name__)

VIEWS: Mapping[str, Mapping[str, Kind]] = {
    "spans_mv": SPAN_COLUMNS,
    "rewards_mv": REWARD_COLUMNS,
    "rollout_events_mv": ROLLOUT_COLUMNS,
    "trajectories_mv": TRAJECTORY_COLUMNS,
    "spans_dead_mv": DEAD_LETTER_COLUMNS,
    "rewards_dead_mv": DEAD_LETTER_COLUMNS,
    "rollout_events_dead_mv": DEAD_LETTER_COLUMNS,
    "trajectories_dead_mv": DEAD_LETTER_COLUMNS,
    "resources_dead_mv": DEAD_LETTER_COLUMNS,
    "training_events_dead_mv": DEAD_LETTER_COLUMNS,
    "worker_heartbeats_dead_mv": DEAD_LETTER_COLUMNS,
    "dead_letters_mv": DEAD_LETTER_COLUMNS,
    "rejected_mv": DEAD_LETTER_COLUMNS,
}
"""The views that write into tables what producers sent, and which of their columns hold texts. Every view that writes
dead letters is among them."""
MAX_QUERY_BYTES: Final = 200_000
"""Of a view's query. ClickHouse refuses one of 262,144, and analyses each anew with every insert: at this bound that
takes about a second, with a quarter more text several."""
DERIVING = "parse_otlp"
"""The view that makes columns of attributes: rules of `keys` must come before it."""


def apply_redaction(client: Client, rules: RedactionSettings) -> list[str]:
    """Gives the names of the views that were changed. `client` uses our database, with migrations applied. Raises
    StartError where the rules are too many, and changes nothing then."""
    selects = view_selects()
    queries = {view: _query(view, selects[view], rules) for view in (*VIEWS, DERIVING)}
    rows = client.query(
        "SELECT name, comment FROM system.tables WHERE database = currentDatabase() AND engine = 'MaterializedView'"
    ).result_rows
    comments = {str(name): str(comment) for name, comment in rows}
    changed: list[str] = []
    for view, query in queries.items():
        wanted = "" if query == selects[view] else REDACTED + hashlib.sha256(query.encode()).hexdigest()[:16]
        if comments.get(view, wanted) == wanted:  # 1.
            continue
        client.command(f"ALTER TABLE {view} MODIFY COMMENT '{REDACTED}changing'")  # 2.
        client.command(f"ALTER TABLE {view} MODIFY QUERY {query}")  # 3.
        client.command(f"ALTER TABLE {view} MODIFY COMMENT '{wanted}'")  # 4.
        changed.append(view)
    if changed:
        logger.info("redaction rules changed: %s", ", ".join(changed))
    return changed


def _query(view: str, select: str, rules: RedactionSettings) -> str:
    query = derived_select(rules, select) if view == DERIVING else redacted_select(rules, select, VIEWS[view])
    if query != select and (size := len(query.encode())) > MAX_QUERY_BYTES:
        raise StartError(
            f"redaction: the {len(rules.keys)} keys and {len(rules.values)} values make the view {view} a query of "
            f"{size:,} bytes, of at most {MAX_QUERY_BYTES:,}, and each insert slow: write several rules as one regex "
            "(a|b|c), or shorter ones"
        )
    return query


def view_selects() -> dict[str, str]:
    """Every materialized view's SELECT as the migrations made it last."""
    found: dict[str, str] = {}
    for migration in migrations():
        found |= migration.views
    return found
