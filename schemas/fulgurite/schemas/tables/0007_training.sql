-- training_events: one row for every record of the topic `training`: runs, steps, versions applied. Append-only.
--
-- Columns are the fields of all events in fulgurite.schemas.training (empty where an event has no such field);
-- time is time_ns as DateTime64(9), window_start and window_end likewise; extra, _topic … as in spans.
--
-- steps: one row for every optimizer step (the newest record of a (run_id, step)), metrics as a Map.
-- run_events: starts and ends of runs. versions_applied: which server served which version when, and how long it took.
-- ledger: one row for every rollout a run has decided about: `trained` at which step, or `dropped` and why.

CREATE TABLE IF NOT EXISTS in_training
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

CREATE TABLE IF NOT EXISTS training_events
(
    event LowCardinality(String),
    event_id String CODEC(ZSTD(1)),
    run_id LowCardinality(String),
    time_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    step UInt64 CODEC(T64, ZSTD(1)),
    resource LowCardinality(String),
    version UInt64 CODEC(T64, ZSTD(1)),
    version_in UInt64 CODEC(T64, ZSTD(1)),
    version_out UInt64 CODEC(T64, ZSTD(1)),
    steps_total UInt64 CODEC(T64, ZSTD(1)),
    config String CODEC(ZSTD(1)),
    rollout_ids Array(String) CODEC(ZSTD(1)),
    dropped Array(Tuple(rollout_id String, reason String)) CODEC(ZSTD(1)),
    groups UInt64 CODEC(T64, ZSTD(1)),
    tokens UInt64 CODEC(T64, ZSTD(1)),
    reward_mean Float64 CODEC(ZSTD(1)),
    reward_std Float64 CODEC(ZSTD(1)),
    loss Float64 CODEC(ZSTD(1)),
    grad_norm Float64 CODEC(ZSTD(1)),
    staleness_mean Float64 CODEC(ZSTD(1)),
    staleness_max UInt64 CODEC(T64, ZSTD(1)),
    window_start_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    window_end_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    offsets Map(String, Int64) CODEC(ZSTD(1)),
    metrics Map(LowCardinality(String), Float64) CODEC(ZSTD(1)),
    server LowCardinality(String),
    ok Bool CODEC(ZSTD(1)),
    error String CODEC(ZSTD(1)),
    seconds Map(LowCardinality(String), Float64) CODEC(ZSTD(1)),
    reason String CODEC(ZSTD(1)),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(time_ns, 'UTC'),
    window_start DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(window_start_ns, 'UTC'),
    window_end DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(window_end_ns, 'UTC')
)
ENGINE = MergeTree
ORDER BY (run_id, event, step, _offset)
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_training: every record once, parsed once, with what is wrong with it; feeds training_events and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_training
(
    raw String,
    key String,
    _reason LowCardinality(String),
    _message String,
    event LowCardinality(String),
    event_id String,
    run_id LowCardinality(String),
    time_ns Int64,
    step UInt64,
    resource LowCardinality(String),
    version UInt64,
    version_in UInt64,
    version_out UInt64,
    steps_total UInt64,
    config String,
    rollout_ids Array(String),
    dropped Array(Tuple(rollout_id String, reason String)),
    groups UInt64,
    tokens UInt64,
    reward_mean Float64,
    reward_std Float64,
    loss Float64,
    grad_norm Float64,
    staleness_mean Float64,
    staleness_max UInt64,
    window_start_ns Int64,
    window_end_ns Int64,
    offsets Map(String, Int64),
    metrics Map(LowCardinality(String), Float64),
    server LowCardinality(String),
    ok Bool,
    error String,
    seconds Map(LowCardinality(String), Float64),
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
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_training TO parsed_training AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['event', 'run_id']), concat(arrayFirst(n -> NOT has(names, n), ['event', 'run_id']), ': required and missing'),
        f.run_id = '',
            'run_id: must not be empty',
        NOT has(['run_started', 'step', 'version_applied', 'run_finished'], f.event),
            'event: must be one of run_started, step, version_applied, run_finished',
        NOT has(names, 'version') AND has(['run_started', 'version_applied', 'run_finished'], f.event),
            concat('version: required for ', f.event, ' and missing'),
        NOT has(names, 'resource'),
            concat('resource: required for ', f.event, ' and missing'),
        NOT has(names, 'step') AND has(['step'], f.event),
            concat('step: required for ', f.event, ' and missing'),
        NOT has(names, 'version_in') AND has(['step'], f.event),
            concat('version_in: required for ', f.event, ' and missing'),
        NOT has(names, 'version_out') AND has(['step'], f.event),
            concat('version_out: required for ', f.event, ' and missing'),
        NOT has(names, 'server') AND has(['version_applied'], f.event),
            concat('server: required for ', f.event, ' and missing'),
        has(mapValues(f.metrics), NULL),
            'metrics: every value must be a finite number',
        has(mapValues(f.seconds), NULL),
            'seconds: every value must be a finite number',
        '') AS _message,
    f.event AS event,
    f.event_id AS event_id,
    f.run_id AS run_id,
    if(has(names, 'time_ns'), f.time_ns, toUnixTimestamp64Milli(_ts) * 1000000) AS time_ns,
    f.step AS step,
    f.resource AS resource,
    f.version AS version,
    f.version_in AS version_in,
    f.version_out AS version_out,
    f.steps_total AS steps_total,
    f.config AS config,
    f.rollout_ids AS rollout_ids,
    f.dropped AS dropped,
    f.groups AS groups,
    f.tokens AS tokens,
    f.reward_mean AS reward_mean,
    f.reward_std AS reward_std,
    f.loss AS loss,
    f.grad_norm AS grad_norm,
    f.staleness_mean AS staleness_mean,
    f.staleness_max AS staleness_max,
    f.window_start_ns AS window_start_ns,
    f.window_end_ns AS window_end_ns,
    f.offsets AS offsets,
    mapApply((k, v) -> (k, ifNull(v, 0)), f.metrics) AS metrics,
    f.server AS server,
    if(has(names, 'ok'), f.ok, true) AS ok,
    f.error AS error,
    mapApply((k, v) -> (k, ifNull(v, 0)), f.seconds) AS seconds,
    f.reason AS reason,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'event', 'event_id', 'run_id', 'time_ns', 'step', 'resource', 'version', 'version_in',
            'version_out', 'steps_total', 'config', 'rollout_ids', 'dropped', 'groups', 'tokens',
            'reward_mean', 'reward_std', 'loss', 'grad_norm', 'staleness_mean', 'staleness_max',
            'window_start_ns', 'window_end_ns', 'offsets', 'metrics', 'server', 'ok', 'error', 'seconds',
            'reason'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'event "', 'event_id "', 'run_id "', 'time_ns 1', 'step 1', 'resource "', 'version 1',
                'version_in 1', 'version_out 1', 'steps_total 1', 'config {', 'rollout_ids [', 'dropped [',
                'groups 1', 'tokens 1', 'reward_mean 1', 'reward_mean .', 'reward_std 1', 'reward_std .',
                'loss 1', 'loss .', 'grad_norm 1', 'grad_norm .', 'staleness_mean 1', 'staleness_mean .',
                'staleness_max 1', 'window_start_ns 1', 'window_end_ns 1', 'offsets {', 'metrics {',
                'server "', 'ok t', 'ok f', 'error "', 'seconds {', 'reason "'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    event String, event_id String, run_id String, time_ns Int64, step UInt64, resource String,
                    version UInt64, version_in UInt64, version_out UInt64, steps_total UInt64, config String,
                    rollout_ids Array(String), dropped Array(Tuple(rollout_id String, reason String)),
                    groups UInt64, tokens UInt64, reward_mean Float64, reward_std Float64, loss Float64,
                    grad_norm Float64, staleness_mean Float64, staleness_max UInt64, window_start_ns Int64,
                    window_end_ns Int64, offsets Map(String, Int64), metrics Map(String, Nullable(Float64)),
                    server String, ok Bool, error String, seconds Map(String, Nullable(Float64)),
                    reason String)') AS f
            FROM in_training
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS training_events_mv TO training_events AS
SELECT
    event, event_id, run_id, time_ns, step, resource, version, version_in, version_out, steps_total, config,
    rollout_ids, dropped, groups, tokens, reward_mean, reward_std, loss, grad_norm, staleness_mean,
    staleness_max, window_start_ns, window_end_ns, offsets, metrics, server, ok, error, seconds, reason, extra,
    _topic, _partition, _offset, _ts
FROM parsed_training
WHERE _reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS training_events_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _topic, _partition, _offset, _ts
FROM parsed_training
WHERE _reason != '';

CREATE VIEW IF NOT EXISTS steps AS
SELECT
    run_id, step, resource, version_in, version_out, groups, tokens, reward_mean, reward_std, loss, grad_norm,
    staleness_mean, staleness_max, length(rollout_ids) AS rollouts, length(dropped) AS rollouts_dropped,
    rollout_ids, dropped, metrics, offsets, time_ns, time, window_start, window_end, _offset
FROM training_events
WHERE event = 'step'
ORDER BY run_id, step, _offset DESC
LIMIT 1 BY run_id, step;

CREATE VIEW IF NOT EXISTS run_events AS
SELECT run_id, event, step, resource, version, steps_total, config, reason, dropped, time_ns, time, event_id, _offset
FROM training_events
WHERE event IN ('run_started', 'run_finished')
ORDER BY run_id, _offset;

CREATE VIEW IF NOT EXISTS versions_applied AS
SELECT run_id, resource, version, server, ok, error, seconds, time_ns, time, event_id, _offset
FROM training_events
WHERE event = 'version_applied'
ORDER BY resource, version, _offset;

CREATE VIEW IF NOT EXISTS ledger AS
SELECT
    run_id,
    rollout_id,
    -- A rollout that was trained on was trained on, whatever else was said of it. Otherwise the first word counts.
    if(max(trained) = 1, 'trained', 'dropped') AS outcome,
    if(outcome = 'trained', '', argMin(why, _offset)) AS reason,
    argMin(at_step, (1 - trained, _offset)) AS step,
    argMin(at_version_in, (1 - trained, _offset)) AS version_in,
    argMin(at_version_out, (1 - trained, _offset)) AS version_out,
    -- More than 1 would be a rollout that had a gradient twice: it must never be.
    uniqExactIf(at_step, trained = 1) AS times_trained,
    -- How often a record of the run named it, as trained or as dropped: 1, or the trainer contradicts itself.
    count() AS times_named
FROM
(
    SELECT
        run_id, decided.1 AS rollout_id, decided.2 AS trained, decided.3 AS why, step AS at_step,
        if(event = 'step', version_in, version) AS at_version_in,
        if(event = 'step', version_out, version) AS at_version_out, _offset
    FROM training_events
    ARRAY JOIN arrayConcat(
        arrayMap(r -> (r, 1, ''), rollout_ids),
        arrayMap(d -> (d.rollout_id, 0, d.reason), dropped)) AS decided
    WHERE event IN ('step', 'run_finished')
)
GROUP BY run_id, rollout_id;
