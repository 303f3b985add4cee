-- rollout_events: one row for every record of the topic `rollouts`: the life of every rollout and attempt, append-only.
--
-- Columns are the fields of all events in fulgurite.schemas.rollouts (empty where an event has no such field);
-- input and config are JSON text; time is time_ns as DateTime64(9); extra, _topic … as in spans.
--
-- rollouts: one row for every rollout, as it stands now. attempts: one row for every attempt, as it stands now.
-- Both are views over rollout_events, grouped in its order: an event read twice, or late, cannot make them wrong, and a
-- column that is not asked for is not computed. Of several `queued` the first counts, of several `finished` the first.

CREATE TABLE IF NOT EXISTS in_rollouts
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

CREATE TABLE IF NOT EXISTS rollout_events
(
    event LowCardinality(String),
    event_id String CODEC(ZSTD(1)),
    rollout_id String CODEC(ZSTD(1)),
    time_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    run_id LowCardinality(String),
    task_id String CODEC(ZSTD(1)),
    group_id String CODEC(ZSTD(1)),
    group_size UInt64 CODEC(T64, ZSTD(1)),
    mode LowCardinality(String),
    agent LowCardinality(String),
    input String CODEC(ZSTD(3)),
    config String CODEC(ZSTD(1)),
    metadata Map(LowCardinality(String), String),
    attempt_id String CODEC(ZSTD(1)),
    sequence_id UInt64 CODEC(T64, ZSTD(1)),
    worker_id LowCardinality(String),
    status LowCardinality(String),
    attempt_status LowCardinality(String),
    attempts UInt64 CODEC(T64, ZSTD(1)),
    error String CODEC(ZSTD(1)),
    reason String CODEC(ZSTD(1)),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(time_ns, 'UTC'),
    INDEX offsets _offset TYPE minmax GRANULARITY 1
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(_ts)
ORDER BY (rollout_id, _offset)
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_rollouts: every record once, parsed once, with what is wrong with it; feeds rollout_events and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_rollouts
(
    raw String,
    key String,
    _reason LowCardinality(String),
    _message String,
    event LowCardinality(String),
    event_id String,
    rollout_id String,
    time_ns Int64,
    run_id LowCardinality(String),
    task_id String,
    group_id String,
    group_size UInt64,
    mode LowCardinality(String),
    agent LowCardinality(String),
    input String,
    config String,
    metadata Map(LowCardinality(String), String),
    attempt_id String,
    sequence_id UInt64,
    worker_id LowCardinality(String),
    status LowCardinality(String),
    attempt_status LowCardinality(String),
    attempts UInt64,
    error String,
    reason String,
    extra Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

-- An insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements. `odd` are the top-level fields whose (name, kind of JSON) is not listed: mistyped, or unknown and kept.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_rollouts TO parsed_rollouts AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['event', 'rollout_id']), concat(arrayFirst(n -> NOT has(names, n), ['event', 'rollout_id']), ': required and missing'),
        f.rollout_id = '',
            'rollout_id: must not be empty',
        NOT has(['queued', 'attempt_started', 'heartbeat', 'attempt_finished', 'requeued', 'cancelled', 'finished'], f.event),
            'event: must be one of queued, attempt_started, heartbeat, attempt_finished, requeued, cancelled, finished',
        NOT has(['', 'train', 'val', 'test'], f.mode),
            'mode: must be one of train, val, test',
        f.attempt_id = '' AND has(['attempt_started', 'heartbeat', 'attempt_finished'], f.event),
            concat('attempt_id: required for ', f.event),
        f.event = 'attempt_started' AND f.sequence_id = 0,
            'sequence_id: an integer from 1 is required for attempt_started',
        f.event = 'attempt_finished' AND NOT has(['succeeded', 'failed', 'timeout', 'unresponsive', 'cancelled'], f.status),
            'status: must be one of succeeded, failed, timeout, unresponsive, cancelled',
        f.event = 'finished' AND NOT has(['succeeded', 'failed', 'cancelled'], f.status),
            'status: must be one of succeeded, failed, cancelled',
        '') AS _message,
    f.event AS event,
    f.event_id AS event_id,
    f.rollout_id AS rollout_id,
    if(has(names, 'time_ns'), f.time_ns, toUnixTimestamp64Milli(_ts) * 1000000) AS time_ns,
    f.run_id AS run_id,
    f.task_id AS task_id,
    f.group_id AS group_id,
    if(has(names, 'group_size'), f.group_size, 1) AS group_size,
    if(f.mode = '', 'train', f.mode) AS mode,
    f.agent AS agent,
    fields[indexOf(names, 'input')].2 AS input,
    f.config AS config,
    f.metadata AS metadata,
    f.attempt_id AS attempt_id,
    f.sequence_id AS sequence_id,
    f.worker_id AS worker_id,
    f.status AS status,
    f.attempt_status AS attempt_status,
    f.attempts AS attempts,
    f.error AS error,
    f.reason AS reason,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'event', 'event_id', 'rollout_id', 'time_ns', 'run_id', 'task_id', 'group_id', 'group_size',
            'mode', 'agent', 'input', 'config', 'metadata', 'attempt_id', 'sequence_id', 'worker_id', 'status',
            'attempt_status', 'attempts', 'error', 'reason'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'event "', 'event_id "', 'rollout_id "', 'time_ns 1', 'run_id "', 'task_id "', 'group_id "',
                'group_size 1', 'mode "', 'agent "', 'input 1', 'input .', 'input "', 'input [', 'input {',
                'input t', 'input f', 'input n', 'config {', 'metadata {', 'attempt_id "', 'sequence_id 1',
                'worker_id "', 'status "', 'attempt_status "', 'attempts 1', 'error "', 'reason "'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    event String, event_id String, rollout_id String, time_ns Int64, run_id String,
                    task_id String, group_id String, group_size UInt64, mode String, agent String,
                    config String, metadata Map(String, String), attempt_id String, sequence_id UInt64,
                    worker_id String, status String, attempt_status String, attempts UInt64, error String,
                    reason String)') AS f
            FROM in_rollouts
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS rollout_events_mv TO rollout_events AS
SELECT
    event, event_id, rollout_id, time_ns, run_id, task_id, group_id, group_size, mode, agent, input, config,
    metadata, attempt_id, sequence_id, worker_id, status, attempt_status, attempts, error, reason, extra,
    _topic, _partition, _offset, _ts
FROM parsed_rollouts
WHERE _reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS rollout_events_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _topic, _partition, _offset, _ts
FROM parsed_rollouts
WHERE _reason != '';

CREATE VIEW IF NOT EXISTS rollouts AS
SELECT
    e.rollout_id AS rollout_id,
    argMinIf(e.run_id, e._offset, e.event = 'queued') AS run_id,
    argMinIf(e.task_id, e._offset, e.event = 'queued') AS task_id,
    argMinIf(e.group_id, e._offset, e.event = 'queued') AS group_id,
    argMinIf(e.group_size, e._offset, e.event = 'queued') AS group_size,
    argMinIf(e.mode, e._offset, e.event = 'queued') AS mode,
    argMinIf(e.agent, e._offset, e.event = 'queued') AS agent,
    argMinIf(e.input, e._offset, e.event = 'queued') AS input,
    argMinIf(e.config, e._offset, e.event = 'queued') AS config,
    argMinIf(e.metadata, e._offset, e.event = 'queued') AS metadata,
    if(countIf(e.event = 'finished') > 0,
        argMinIf(e.status, e._offset, e.event = 'finished'),
        transform(argMax(e.event, e._offset), ['queued', 'requeued'], ['queuing', 'requeuing'], 'running')) AS status,
    if(countIf(e.event = 'finished') > 0,
        argMinIf(e.attempt_id, e._offset, e.event = 'finished'),
        argMaxIf(e.attempt_id, e._offset, e.event = 'attempt_started')) AS attempt_id,
    uniqExactIf(e.attempt_id, e.event = 'attempt_started') AS attempts,
    argMinIf(e.error, e._offset, e.event = 'finished') AS error,
    minIf(e.time_ns, e.event = 'queued') AS queued_ns,
    minIf(e.time_ns, e.event = 'attempt_started') AS started_ns,
    minIf(e.time_ns, e.event = 'finished') AS finished_ns,
    fromUnixTimestamp64Nano(queued_ns, 'UTC') AS queued_time,
    fromUnixTimestamp64Nano(started_ns, 'UTC') AS started_time,
    fromUnixTimestamp64Nano(finished_ns, 'UTC') AS finished_time,
    max(e._offset) AS _offset_max
FROM rollout_events AS e
GROUP BY e.rollout_id
SETTINGS optimize_aggregation_in_order = 1;

CREATE VIEW IF NOT EXISTS attempts AS
SELECT
    e.rollout_id AS rollout_id,
    e.attempt_id AS attempt_id,
    max(e.sequence_id) AS sequence_id,
    argMaxIf(e.worker_id, e._offset, e.worker_id != '') AS worker_id,
    if(countIf(e.event = 'attempt_finished') > 0, argMinIf(e.status, e._offset, e.event = 'attempt_finished'), 'running') AS status,
    argMinIf(e.error, e._offset, e.event = 'attempt_finished') AS error,
    minIf(e.time_ns, e.event = 'attempt_started') AS started_ns,
    maxIf(e.time_ns, e.event != 'attempt_finished') AS last_heartbeat_ns,
    minIf(e.time_ns, e.event = 'attempt_finished') AS ended_ns,
    fromUnixTimestamp64Nano(started_ns, 'UTC') AS started_time,
    fromUnixTimestamp64Nano(ended_ns, 'UTC') AS ended_time
FROM rollout_events AS e
WHERE e.event IN ('attempt_started', 'heartbeat', 'attempt_finished')
GROUP BY e.rollout_id, e.attempt_id;
