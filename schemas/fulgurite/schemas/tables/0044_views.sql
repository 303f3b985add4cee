-- Views with an outer join, for readers whose profile says join_use_nulls = 1: they would have other types than their columns
-- and fail. Otherwise as in 0031_violations.sql and 0036_skipped.sql.
CREATE OR REPLACE VIEW violations AS
SELECT
    w.rollout_id AS rollout_id,
    w.attempt_id AS attempt_id,
    w.span_id AS span_id,
    w.metadata['rule'] AS rule,
    w.metadata['rules_version'] AS rules_version,
    w.metadata['field'] AS field,
    toUInt64OrZero(w.metadata['start']) AS start,
    toUInt64OrZero(w.metadata['end']) AS end,
    w.metadata['text'] AS text,
    -w.value AS cost,
    t.run_id AS run_id,
    t.agent AS agent,
    t.min_version AS version,
    fromUnixTimestamp64Nano(w.time_ns, 'UTC') AS time
FROM
(
    SELECT rollout_id, attempt_id, span_id, metadata, value, time_ns
    FROM rewards
    WHERE source = 'compliance' AND name = 'compliance'
    ORDER BY _offset, _index
    LIMIT 1 BY reward_id
) AS w
LEFT JOIN rollout_versions AS t ON t.rollout_id = w.rollout_id
SETTINGS join_use_nulls = 0;

CREATE OR REPLACE VIEW violations_by_rule AS
SELECT
    v.rule AS rule,
    v.rules_version AS rules_version,
    v.run_id AS run_id,
    v.version AS version,
    count() AS violations,
    uniqExact(v.rollout_id) AS rollouts,
    any(t.rollouts) AS of_rollouts,
    sum(v.cost) AS cost
FROM violations AS v
LEFT JOIN
(
    SELECT run_id, min_version, count() AS rollouts
    FROM rollout_versions
    GROUP BY run_id, min_version
) AS t ON t.run_id = v.run_id AND t.min_version IS NOT DISTINCT FROM v.version
GROUP BY rule, rules_version, run_id, version
ORDER BY rule, rules_version, run_id, version
SETTINGS join_use_nulls = 0;

CREATE OR REPLACE VIEW reconciliation AS
SELECT
    t.topic AS topic,
    t.partition AS partition,
    any(t.rows) AS rows,
    any(t.dead) AS dead,
    any(t.duplicates) AS duplicates,
    any(t.records) AS records,
    any(t.lowest) AS lowest,
    any(t.highest) AS highest,
    highest - lowest + 1 - records - skipped AS gaps,
    sumIf(s.fresh, s.lo > t.lowest AND s.hi < t.highest) AS skipped
FROM
(
    SELECT
        _topic AS topic,
        _partition AS partition,
        countIf(refused = 0) AS rows,
        countIf(refused = 1) AS dead,
        count() - uniqExact(_offset, _index) AS duplicates,
        uniqExact(_offset) AS records,
        min(_offset) AS lowest,
        max(_offset) AS highest
    FROM
    (
        SELECT _topic, _partition, _offset, _index, 0 AS refused FROM spans
        UNION ALL SELECT _topic, _partition, _offset, _index, 0 FROM rewards
        UNION ALL SELECT _topic, _partition, _offset, 0, 0 FROM rollout_events
        UNION ALL SELECT _topic, _partition, _offset, 0, 0 FROM trajectories
        UNION ALL SELECT _topic, _partition, _offset, 0, 0 FROM resources
        UNION ALL SELECT _topic, _partition, _offset, 0, 0 FROM training_events
        UNION ALL SELECT _topic, _partition, _offset, 0, 0 FROM worker_heartbeats
        UNION ALL SELECT _topic, _partition, _offset, _index, 1 FROM dead_letters
    )
    GROUP BY topic, partition
) AS t
LEFT JOIN
(
    -- A range may be there more than once, and overlap another: what was read again is logged again.
    SELECT
        topic, partition, lo, hi,
        toInt64(hi + 1) - toInt64(greatest(lo, least(hi + 1, max(hi + 1) OVER (
            PARTITION BY topic, partition ORDER BY lo, hi ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)))) AS fresh
    FROM (SELECT _topic AS topic, _partition AS partition, s.lo AS lo, s.hi AS hi FROM ingest_log ARRAY JOIN skipped AS s)
) AS s ON s.topic = t.topic AND s.partition = t.partition
GROUP BY topic, partition
ORDER BY topic, partition
SETTINGS join_use_nulls = 0;
