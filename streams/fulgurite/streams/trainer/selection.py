"""A selection: the rollouts that a query of ClickHouse chose for a run to train on, and their order.

    source.sql ─► rollout ids ─► where `trajectories` has them ─► selection-….jsonl ─► group by group, from Kafka

The query is asked once, before the run's first transaction, and its answer kept beside the checkpoints (`kept.py`):
tables may change, the run does not. ClickHouse says which and where; the trajectories themselves are read from Kafka,
so that they are bit for bit what other trainers read. Rollouts of one group_id form a group, at the place of its first
one; what the query leaves out is no member. Staleness is measured within a group, against the newest version in it: how
old rollouts may be is the query's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.streams.trainer.kept import keep, kept
from fulgurite.streams.trainer.plan import Plan

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

logger = logging.getLogger(__name__)

SELECTION = "selection"

MAX_ROLLOUTS = 1_000_000
"""That a query may select: their places are kept in memory and in a file."""

_LOOKED_UP = 2_000
"""Ids of one look for their places."""

PLACES = """
SELECT rollout_id, group_id, _partition, _offset, mode FROM trajectories
WHERE rollout_id IN {rollout_ids:Array(String)} AND _topic = {topic:String} ORDER BY _offset LIMIT 1 BY rollout_id
"""


class SelectedGroup(BaseModel):
    """A line of the selection."""

    group_id: str
    partition: int
    offsets: list[int]
    """Of its rollouts' trajectories, in the order of the query."""


def select(plan: Plan, first_offsets: dict[int, int]) -> str:
    """Asks the query, writes the selection and returns its file's name. Raises SettingsError for a query that does not
    give a selection, or one of rollouts whose trajectories Kafka has forgotten: before a model is loaded."""
    rollout_ids = _asked(plan.settings.clickhouse, plan.source.sql)
    places = _places(plan.settings.clickhouse, rollout_ids, plan.topic)
    groups: dict[tuple[str, int], SelectedGroup] = {}
    missing = forgotten = held_out = 0
    for rollout_id in rollout_ids:
        if rollout_id not in places:
            missing += 1
            continue
        group_id, partition, offset, mode = places[rollout_id]
        held_out += mode != "train"
        forgotten += offset < first_offsets.get(partition, 0)
        # Without a group a rollout is compared with nothing: a group of its own, dropped as too small.
        key = (group_id or rollout_id, partition)
        group = groups.setdefault(key, SelectedGroup(group_id=key[0], partition=partition, offsets=[]))
        group.offsets.append(offset)
    if not groups or forgotten:
        raise SettingsError(
            f"source.sql selects {len(rollout_ids)} rollouts; {missing} have no trajectory of {plan.topic} in the "
            f"table trajectories, {forgotten} have one that Kafka has forgotten: select others, or keep the topic "
            "longer"
        )
    if held_out:
        raise SettingsError(
            f"source.sql selects {held_out} rollouts that were not asked for to be trained on: add mode = 'train'"
        )
    if missing:
        logger.warning("%d of %d selected rollouts have no trajectory: left out", missing, len(rollout_ids))
    name = keep(plan.folder, SELECTION, groups.values())
    logger.info("selected: %d rollouts in %d groups, %s", len(rollout_ids) - missing, len(groups), name)
    return name


def selection(plan: Plan, name: str) -> Iterator[SelectedGroup]:
    """What `select` wrote. `name` is empty in checkpoints of before. Raises StartError."""
    return kept(plan.folder / (name or f"{SELECTION}.jsonl"), SelectedGroup)


def _asked(settings: ClickHouseSettings, sql: str) -> list[str]:
    found = _query(settings, sql, {}, {"max_result_rows": MAX_ROLLOUTS, "result_overflow_mode": "throw", "readonly": 2})
    if "rollout_id" not in found.column_names:
        raise SettingsError(f"source.sql gives {', '.join(found.column_names)}; a column rollout_id is needed")
    column = found.column_names.index("rollout_id")
    # A rollout named twice is one: it is trained on once.
    return list(dict.fromkeys(str(row[column]) for row in found.result_rows))


def _places(settings: ClickHouseSettings, ids: Sequence[str], topic: str) -> dict[str, tuple[str, int, int, str]]:
    found: dict[str, tuple[str, int, int, str]] = {}
    for first in range(0, len(ids), _LOOKED_UP):
        parameters = {"rollout_ids": list(ids[first : first + _LOOKED_UP]), "topic": topic}
        for rollout_id, group_id, partition, offset, mode in _query(settings, PLACES, parameters, {}).result_rows:
            found[rollout_id] = (group_id, int(partition), int(offset), mode)
    return found


def _query(settings: ClickHouseSettings, sql: str, parameters: dict[str, Any], options: dict[str, Any]) -> Any:
    import clickhouse_connect
    from clickhouse_connect.driver.exceptions import ClickHouseError, OperationalError

    try:
        client: Client = clickhouse_connect.get_client(**connection_options(settings), database=settings.database)
    except ClickHouseError as error:
        raise StartError(f"no ClickHouse at {settings.url} (clickhouse.url) for source.sql: {error}") from None
    try:
        return client.query(sql, parameters=parameters, settings=options)
    except OperationalError as error:
        raise StartError(f"ClickHouse at {settings.url} went away during source.sql: {error}") from None
    except ClickHouseError as error:
        raise SettingsError(f"source.sql: {str(error).splitlines()[0]}") from None
    finally:
        client.close()
