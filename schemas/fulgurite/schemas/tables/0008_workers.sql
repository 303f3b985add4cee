-- worker_heartbeats: one row for every record of the topic `workers`. Kept for a week; only the newest matter.
-- workers: one row for every worker, as it was last heard of.
--
-- Columns are the fields of fulgurite.schemas.workers.WorkerHeartbeat; stats is JSON text; time is time_ns as DateTime64(9);
-- extra, _topic … as in spans.

CREATE TABLE IF NOT EXISTS in_workers
(
    raw String,
    key String,
    headers Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

CREATE TABLE IF NOT EXISTS worker_heartbeats
(
    worker_id String CODEC(ZSTD(1)),
    time_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    status LowCardinality(String),
    running Array(String) CODEC(ZSTD(1)),
    capacity UInt64 CODEC(T64, ZSTD(1)),
    stats String CODEC(ZSTD(1)),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(time_ns, 'UTC')
)
ENGINE = MergeTree
ORDER BY (worker_id, _offset)
TTL toDateTime(_ingested) + INTERVAL 7 DAY
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_workers: every record once, parsed once, with what is wrong with it; feeds worker_heartbeats and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_workers
(
    raw String,
    key String,
    _reason LowCardinality(String),
    _message String,
    worker_id String,
    time_ns Int64,
    status LowCardinality(String),
    running Array(String),
    capacity UInt64,
    stats String,
    extra Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

-- An insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements. `odd` are the top-level fields whose (name, kind of JSON) is not listed: mistyped, or unknown and kept.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_workers TO parsed_workers AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['worker_id']), concat(arrayFirst(n -> NOT has(names, n), ['worker_id']), ': required and missing'),
        f.worker_id = '',
            'worker_id: must not be empty',
        NOT has(['', 'idle', 'busy', 'stopped'], f.status),
            'status: must be one of idle, busy, stopped',
        '') AS _message,
    f.worker_id AS worker_id,
    if(has(names, 'time_ns'), f.time_ns, toUnixTimestamp64Milli(_ts) * 1000000) AS time_ns,
    if(f.status = '', 'idle', f.status) AS status,
    f.running AS running,
    f.capacity AS capacity,
    f.stats AS stats,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'worker_id', 'time_ns', 'status', 'running', 'capacity', 'stats'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'worker_id "', 'time_ns 1', 'status "', 'running [', 'capacity 1', 'stats {'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    worker_id String, time_ns Int64, status String, running Array(String), capacity UInt64,
                    stats String)') AS f
            FROM in_workers
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS worker_heartbeats_mv TO worker_heartbeats AS
SELECT
    worker_id, time_ns, status, running, capacity, stats, extra, _topic, _partition, _offset, _ts
FROM parsed_workers
WHERE _reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS worker_heartbeats_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _topic, _partition, _offset, _ts
FROM parsed_workers
WHERE _reason != '';

CREATE VIEW IF NOT EXISTS workers AS
SELECT worker_id, status, running, capacity, stats, time_ns, time, _offset
FROM worker_heartbeats
ORDER BY worker_id, _offset DESC
LIMIT 1 BY worker_id;
