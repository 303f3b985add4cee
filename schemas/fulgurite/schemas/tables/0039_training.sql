-- What a run decided about rollouts may take more records than one: events `rollouts_decided`.
--
-- parse_training            as in 0007_training.sql, and takes them
-- training_events.part_of   the event_id of the record that had no room for these rollouts; of the record's unknown fields,
--                           where parse_training has put it
-- training_events.lineage   of run_started: the run's offsets' on this log; likewise
-- steps                     rollouts and rollouts_dropped count all of a step's; its lists are those of its own record
-- ledger, window_members    of all records. An event that was sent again counts once
ALTER TABLE training_events ADD COLUMN IF NOT EXISTS part_of String ALIAS JSONExtractString(concat('[', extra['part_of'], ']'), 1);

ALTER TABLE training_events ADD COLUMN IF NOT EXISTS lineage String ALIAS JSONExtractString(concat('[', extra['lineage'], ']'), 1);

ALTER TABLE parse_training MODIFY QUERY
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
        NOT has(['run_started', 'step', 'rollouts_decided', 'version_applied', 'run_finished'], f.event),
            'event: must be one of run_started, step, rollouts_decided, version_applied, run_finished',
        NOT has(names, 'version') AND has(['run_started', 'version_applied', 'run_finished'], f.event),
            concat('version: required for ', f.event, ' and missing'),
        NOT has(names, 'resource'),
            concat('resource: required for ', f.event, ' and missing'),
        NOT has(names, 'step') AND has(['step', 'rollouts_decided'], f.event),
            concat('step: required for ', f.event, ' and missing'),
        NOT has(names, 'version_in') AND has(['step', 'rollouts_decided'], f.event),
            concat('version_in: required for ', f.event, ' and missing'),
        NOT has(names, 'version_out') AND has(['step', 'rollouts_decided'], f.event),
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

CREATE OR REPLACE VIEW steps AS
SELECT
    run_id, step, resource, version_in, version_out, groups, tokens, reward_mean, reward_std, loss, grad_norm,
    staleness_mean, staleness_max,
    greatest(length(rollout_ids), toUInt64(metrics['rollouts/trained'])) AS rollouts,
    greatest(length(dropped), toUInt64(metrics['rollouts/dropped'])) AS rollouts_dropped,
    rollout_ids, dropped, metrics, offsets, time_ns, time, window_start, window_end, _offset
FROM training_events
WHERE event = 'step'
ORDER BY run_id, step, _offset DESC
LIMIT 1 BY run_id, step;

CREATE OR REPLACE VIEW ledger AS
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
        if(event = 'run_finished', version, version_in) AS at_version_in,
        if(event = 'run_finished', version, version_out) AS at_version_out, _offset
    FROM training_events
    ARRAY JOIN arrayConcat(
        arrayMap(r -> (r, 1, ''), rollout_ids),
        arrayMap(d -> (d.rollout_id, 0, d.reason), dropped)) AS decided
    WHERE event IN ('step', 'rollouts_decided', 'run_finished')
)
GROUP BY run_id, rollout_id;

CREATE OR REPLACE VIEW window_members AS
SELECT
    run_id, step, version_in, version_out, member.1 AS rollout_id, member.2 AS is_again
FROM
(
    -- A step is published once, but a record that was sent again counts once.
    SELECT run_id, step, version_in, version_out, rollout_ids, again
    FROM training_events
    WHERE event IN ('step', 'rollouts_decided')
    ORDER BY _offset DESC
    LIMIT 1 BY run_id, step, if(event = 'step', '', event_id)
)
ARRAY JOIN arrayConcat(arrayMap(r -> (r, 0), rollout_ids), arrayMap(r -> (r, 1), again)) AS member;
