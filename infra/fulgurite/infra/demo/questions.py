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
SELECT
    countIf(event = 'finished' AND time_ns > now_ns - 10 * 1000000000) / 10 AS rollouts_per_second,
    countIf(event = 'finished') AS finished,
    toUnixTimestamp64Nano(now64(9)) AS now_ns
FROM rollout_events WHERE run_id = {run_id:String} AND mode = {mode:String}
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
    (SELECT argMax(version, time_ns) FROM versions_applied WHERE resource = {resource:String} AND ok) AS served,
    (SELECT max(version) FROM resources WHERE resource = {resource:String}) AS newest
"""

CURVE = """
SELECT
    t.min_version AS version, t.mode AS mode, avg(t.reward) AS reward_mean,
    stddevSamp(t.reward) / sqrt(count()) AS reward_sem, count() AS rollouts, avg(s.used_tool) AS tool_use
FROM trajectories AS t
LEFT JOIN (
    SELECT rollout_id, attempt_id, max(operation = 'execute_tool') AS used_tool FROM spans GROUP BY ALL
) AS s ON s.rollout_id = t.rollout_id AND s.attempt_id = t.attempt_id
INNER JOIN (
    SELECT rollout_id, metadata['sampling'] AS sampling FROM rollout_events WHERE event = 'queued' LIMIT 1 BY rollout_id
) AS r ON r.rollout_id = t.rollout_id
WHERE t.run_id = {run_id:String} AND t.reward IS NOT NULL AND t.min_version IS NOT NULL AND r.sampling != 'greedy'
GROUP BY version, mode ORDER BY version, mode
"""

EVALUATIONS = """
SELECT
    r.metadata['evaluation'] AS evaluation, r.metadata['sampling'] AS sampling, count() AS rollouts,
    avg(ifNull(t.reward, 0)) AS reward_mean, stddevSamp(ifNull(t.reward, 0)) / sqrt(count()) AS reward_sem,
    avg(s.used_tool) AS tool_use, min(t.min_version) AS version
FROM trajectories AS t
INNER JOIN (
    SELECT rollout_id, metadata FROM rollout_events WHERE event = 'queued' LIMIT 1 BY rollout_id
) AS r ON r.rollout_id = t.rollout_id
LEFT JOIN (
    SELECT rollout_id, attempt_id, max(operation = 'execute_tool') AS used_tool FROM spans GROUP BY ALL
) AS s ON s.rollout_id = t.rollout_id AND s.attempt_id = t.attempt_id
WHERE t.run_id = {run_id:String} AND t.mode = 'val'
GROUP BY evaluation, sampling ORDER BY evaluation DESC, sampling DESC
"""

ACCOUNTS = """
SELECT outcome, reason, count() AS rollouts FROM (
    SELECT
        r.rollout_id,
        multiIf(
            r.mode != 'train', 'evaluated', l.times_trained > 1, 'TRAINED TWICE', l.outcome != '', l.outcome, 'open'
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
    version: int


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
        Evaluation(name, sampling, int(n), float(mean), _number(sem), _number(tool_use), int(version or 0))
        for name, sampling, n, mean, sem, tool_use, version in rows
    ]


def _number(value: float | None) -> float:
    """ClickHouse gives nan or NULL for the standard error of one rollout: unknown is shown as 0."""
    return 0.0 if value is None or math.isnan(value) else float(value)
