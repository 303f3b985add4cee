-- rollouts.status: a `queued` that is sent again says nothing of a rollout that has gone on since: the first one counts. What
-- came last of all else decides; nothing else: it is queuing. Otherwise as in 0004_rollouts.sql.
CREATE OR REPLACE VIEW rollouts AS
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
        transform(argMaxIf(e.event, e._offset, e.event != 'queued'), ['', 'requeued'], ['queuing', 'requeuing'],
            'running')) AS status,
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
