-- Offsets that hold no record: markers of transactions, records of aborted ones, compacted ones.
--
-- ingest_log.skipped    ranges (lo, hi) of such offsets up to this row's hi, as Kafka said when it was asked what lies there.
--                       Empty in rows of before, and in those of an older materialiser
-- reconciliation        as in 0009_views.sql, with them apart: `skipped` of the offsets between the lowest and the highest hold
--                       no record; `gaps` should be a row or a dead letter and are not. A range lies between two records
ALTER TABLE ingest_log ADD COLUMN IF NOT EXISTS skipped Array(Tuple(lo UInt64, hi UInt64)) CODEC(ZSTD(1));

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
ORDER BY topic, partition;
