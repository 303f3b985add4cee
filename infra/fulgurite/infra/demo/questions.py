"""Every question the demo asks, in SQL: what a user would ask too. Knows ClickHouse's tables, not screens.

{run_id:String} and the like are ClickHouse's own query parameters: values never become part of the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clickhouse_connect.driver import Client

from fulgurite.infra.demo.plots import CurvePoint

LAST_STEPS = """
SELECT step, version_out, reward_mean, staleness_mean, staleness_max
FROM steps WHERE run_id = {run_id:String} ORDER BY step
"""

RATES = """
WITH max(time_ns) AS newest_ns
SELECT if(toUnixTimestamp64Nano(now64(9)) - newest_ns > 8000000000, 0,
          arrayCount(t -> t > newest_ns - 10000000000, groupArray(time_ns)) / 10) AS rollouts_per_second
FROM rollout_events WHERE run_id = {run_id:String} AND mode = {mode:String} AND event = 'finished'
"""

TOOL_USE = """
WITH recent AS (
    SELECT attempt_id, finished_ns FROM trajectories
    WHERE run_id = {run_id:String} AND mode = {mode:String} ORDER BY finished_ns DESC LIMIT 128)
SELECT avg(used) FROM (
    SELECT attempt_id, max(operation = 'execute_tool') AS used FROM spans
    WHERE attempt_id IN (SELECT attempt_id FROM recent) GROUP BY attempt_id)
"""

DEAD_LETTERS = "SELECT count() FROM dead_letters"

SERVED = """
SELECT
    (SELECT argMax(version, time_ns) FROM versions_applied
     WHERE resource = {resource:String} AND ok AND time_ns >= {since_ns:Int64}) AS served,
    (SELECT max(version) FROM resources WHERE resource = {resource:String}) AS newest
"""

CURVE = """
SELECT r.version AS version, r.mode AS mode, r.mean AS reward_mean, r.standard_error AS reward_sem, r.n AS rollouts,
       u.tool_use AS tool_use
FROM reward_by_version AS r
LEFT JOIN (
    SELECT t.min_version AS version, t.mode AS mode, t.metadata['sampling'] AS sampling, avg(s.used_tool) AS tool_use
    FROM trajectories AS t
    INNER JOIN (
        SELECT rollout_id, attempt_id, max(operation = 'execute_tool') AS used_tool FROM spans GROUP BY ALL
    ) AS s ON s.rollout_id = t.rollout_id AND s.attempt_id = t.attempt_id
    WHERE t.run_id = {run_id:String} GROUP BY ALL
) AS u ON u.version = r.version AND u.mode = r.mode AND u.sampling = r.sampling
WHERE r.run_id = {run_id:String} AND r.sampling != 'greedy'
ORDER BY version, mode
"""

EVALUATIONS = """
SELECT
    t.metadata['evaluation'] AS evaluation, t.metadata['sampling'] AS sampling, count() AS rollouts,
    avg(ifNull(t.reward, 0)) AS reward_mean, stddevSamp(ifNull(t.reward, 0)) / sqrt(count()) AS reward_sem,
    avg(s.used_tool) AS tool_use, min(t.min_version) AS min_version, max(t.max_version) AS max_version
FROM trajectories AS t
LEFT JOIN (
    SELECT rollout_id, attempt_id, max(operation = 'execute_tool') AS used_tool FROM spans GROUP BY ALL
) AS s ON s.rollout_id = t.rollout_id AND s.attempt_id = t.attempt_id
WHERE t.run_id = {run_id:String} AND t.mode = 'val'
GROUP BY evaluation, sampling ORDER BY evaluation DESC, sampling DESC
"""

RISE = """
SELECT avg(later.reward - earlier.reward), stddevSamp(later.reward - earlier.reward) / sqrt(count()), count()
FROM (
    SELECT task_id, ifNull(reward, 0) AS reward FROM trajectories WHERE run_id = {run_id:String} AND mode = 'val'
    AND metadata['evaluation'] = 'before' AND metadata['sampling'] = 'sampled'
) AS earlier
INNER JOIN (
    SELECT task_id, ifNull(reward, 0) AS reward FROM trajectories WHERE run_id = {run_id:String} AND mode = 'val'
    AND metadata['evaluation'] = 'after' AND metadata['sampling'] = 'sampled'
) AS later USING task_id
"""

ACCOUNTS = """
SELECT outcome, reason, count() AS rollouts FROM (
    SELECT
        r.rollout_id,
        multiIf(
            r.status NOT IN ('succeeded', 'failed', 'cancelled'), 'open',
            r.mode != 'train', 'evaluated',
            l.times_trained > 1, 'TRAINED TWICE',
            l.times_named > 1, 'NAMED TWICE',
            l.outcome != '', l.outcome,
            'in no step'
        ) AS outcome,
        if(outcome = 'evaluated' AND r.status != 'succeeded', r.status, l.reason) AS reason
    FROM rollouts AS r LEFT JOIN ledger AS l ON l.rollout_id = r.rollout_id AND l.run_id = r.run_id
    WHERE r.run_id = {run_id:String})
GROUP BY ALL ORDER BY outcome, rollouts DESC
"""

A_GOOD_ROLLOUT = """
SELECT rollout_id FROM trajectories
WHERE run_id = {run_id:String} AND mode = {mode:String} AND reward > 0 AND calls >= 2
ORDER BY min_version DESC, rollout_id LIMIT 1
"""

ENDED = """
SELECT count() FROM trajectories WHERE run_id = {run_id:String} AND startsWith(rollout_id, {prefix:String})
"""

TO_TRY = (
    "SELECT version, n, mean, standard_error FROM reward_by_version "
    "WHERE run_id = '{run_id}' AND mode = 'train' ORDER BY version",
    "SELECT outcome, reason, count() FROM ledger WHERE run_id = '{run_id}' GROUP BY ALL",
    "SELECT l.version_in - t.min_version AS staleness, count() AS rollouts, avg(t.reward) FROM ledger AS l "
    "JOIN trajectories AS t USING rollout_id WHERE l.outcome = 'trained' AND l.run_id = '{run_id}' GROUP BY ALL",
)
"""For the user to run; {run_id} is filled in by us, from an id we made."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out tasks, one evaluation, one way of sampling."""

    name: str
    sampling: str
    rollouts: int
    reward_mean: float
    reward_sem: float
    tool_use: float
    versions: str
    """That answered: one, or from-to when a newer one came in the middle."""


def curve(client: Client, run_id: str) -> list[CurvePoint]:
    """Reward by the version that sampled, training and held-out (sampled) rollouts."""
    rows = client.query(CURVE, {"run_id": run_id}).result_rows
    return [
        CurvePoint(int(version), mode, float(mean), _number(sem), int(rollouts), _number(tool_use))
        for version, mode, mean, sem, rollouts, tool_use in rows
    ]


def evaluations(client: Client, run_id: str) -> list[Evaluation]:
    rows = client.query(EVALUATIONS, {"run_id": run_id}).result_rows
    return [
        Evaluation(name, sampling, int(n), float(mean), _number(sem), _number(tool_use), _versions(low, high))
        for name, sampling, n, mean, sem, tool_use, low, high in rows
    ]


def rise(client: Client, run_id: str) -> tuple[float, float, int] | None:
    """Held-out sampled reward after minus before, task by task: mean, its standard error, tasks."""
    mean, error, tasks = client.query(RISE, {"run_id": run_id}).result_rows[0]
    return (float(mean), _number(error), int(tasks)) if tasks else None


def _versions(low: int | None, high: int | None) -> str:
    return "" if low is None or high is None else str(low) if low == high else f"{low}-{high}"


def _number(value: float | None) -> float:
    """ClickHouse gives nan or NULL for the standard error of one rollout: unknown is shown as 0."""
    return 0.0 if value is None or math.isnan(value) else float(value)
