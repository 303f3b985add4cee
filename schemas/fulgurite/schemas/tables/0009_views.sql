-- Views to ask: none needs FINAL, and what a producer sent twice counts once in each of them.
--
-- llm_calls           spans with sampled tokens: one row for every LLM call, with tokens, logprobs, versions
-- rollout_rewards     one row for every rollout: mode, run, status, its reward, versions, LLM calls, tool calls
-- reward_by_version   (run_id, mode, sampling, version) -> n, mean, standard error; version: the oldest that sampled
--                     one of its tokens; sampling: what metadata['sampling'] says (evaluations: sampled or greedy)
-- rollout_versions    one row for every rollout that was assembled: reward, versions, how many tokens; the base of the above
-- why_dropped         (run_id, reason) -> how many rollouts were not trained on
-- unknown_rewards     rewards of rollouts nobody announced
-- reconciliation      for every partition: rows + dead letters against offsets; `duplicates` must be 0
-- otel_traces         spans under the column names of the OpenTelemetry Collector's ClickHouse exporter, for Grafana
CREATE VIEW IF NOT EXISTS llm_calls AS
SELECT
    s.rollout_id AS rollout_id,
    s.attempt_id AS attempt_id,
    s.span_id AS span_id,
    any(s.sequence_id) AS sequence_id,
    any(s.trace_id) AS trace_id,
    any(s.parent_span_id) AS parent_span_id,
    any(s.name) AS name,
    any(s.status) AS status,
    any(s.agent) AS agent,
    any(s.resource) AS resource,
    any(s.model) AS model,
    any(s.prompt_token_ids) AS prompt_token_ids,
    any(s.response_token_ids) AS response_token_ids,
    any(s.logprobs) AS logprobs,
    any(s.weight_versions) AS weight_versions,
    any(s.min_version) AS min_version,
    any(s.max_version) AS max_version,
    any(s.finish_reason) AS finish_reason,
    any(s.input) AS input,
    any(s.output) AS output,
    any(s.start_ns) AS start_ns,
    any(s.end_ns) AS end_ns,
    fromUnixTimestamp64Nano(start_ns, 'UTC') AS start_time,
    fromUnixTimestamp64Nano(end_ns, 'UTC') AS end_time
FROM spans AS s
WHERE notEmpty(s.response_token_ids)
GROUP BY s.rollout_id, s.attempt_id, s.span_id;

CREATE VIEW IF NOT EXISTS rollout_rewards AS
SELECT
    r.rollout_id AS rollout_id,
    r.run_id AS run_id,
    r.task_id AS task_id,
    r.group_id AS group_id,
    r.mode AS mode,
    r.agent AS agent,
    r.status AS status,
    r.attempt_id AS attempt_id,
    w.reward AS reward,
    s.min_version AS min_version,
    s.max_version AS max_version,
    s.llm_calls AS llm_calls,
    s.tool_calls AS tool_calls,
    s.tool_calls > 0 AS used_tool,
    r.queued_time AS queued_time,
    r.finished_time AS finished_time
FROM rollouts AS r
LEFT JOIN
(
    -- Of several rewards named `reward` of an attempt the last in the log counts; one of no attempt counts for each.
    -- One that was sent again counts where it came first, as it does for the assembler.
    SELECT e.rollout_id AS rollout_id, argMaxOrNull(w.value, w.place) AS reward
    FROM
    (
        SELECT o.rollout_id AS rollout_id, o.attempt_id AS attempt_id, argMin(o.value, (o._offset, o._index)) AS value,
            min((o._offset, o._index)) AS place
        FROM rewards AS o
        WHERE o.name = 'reward'
        GROUP BY o.rollout_id, o.attempt_id, o.reward_id
    ) AS w
    INNER JOIN (SELECT rollout_id, attempt_id FROM rollouts) AS e ON e.rollout_id = w.rollout_id
    WHERE w.attempt_id = '' OR w.attempt_id = e.attempt_id
    GROUP BY e.rollout_id
) AS w ON w.rollout_id = r.rollout_id
LEFT JOIN
(
    SELECT
        c.rollout_id AS rollout_id,
        c.attempt_id AS attempt_id,
        min(c.min_version) AS min_version,
        max(c.max_version) AS max_version,
        uniqExactIf(c.span_id, notEmpty(c.response_token_ids)) AS llm_calls,
        uniqExactIf(c.span_id, c.operation = 'execute_tool') AS tool_calls
    FROM spans AS c
    GROUP BY c.rollout_id, c.attempt_id
) AS s ON s.rollout_id = r.rollout_id AND s.attempt_id = r.attempt_id
SETTINGS join_use_nulls = 1;

CREATE VIEW IF NOT EXISTS rollout_versions AS
SELECT
    rollout_id,
    any(t.run_id) AS run_id,
    any(t.mode) AS mode,
    any(t.metadata['sampling']) AS sampling,
    any(t.group_id) AS group_id,
    any(t.agent) AS agent,
    any(t.status) AS status,
    any(t.partial) AS partial,
    any(tuple(t.reward)).1 AS reward,
    any(t.min_version) AS min_version,
    any(t.max_version) AS max_version,
    any(t.calls) AS calls,
    any(t.tokens) AS tokens,
    any(t.sampled_tokens) AS sampled_tokens,
    any(t.finished_ns) AS finished_ns,
    fromUnixTimestamp64Nano(finished_ns, 'UTC') AS finished_time
FROM trajectories AS t
GROUP BY rollout_id;

CREATE VIEW IF NOT EXISTS reward_by_version AS
SELECT
    run_id,
    mode,
    sampling,
    version,
    sum(rewards) AS n,
    sum(total) / n AS mean,
    -- Of the mean. The rollouts of a group share a task, so groups, not rollouts, are the independent samples
    -- (ratio estimator over clusters). Not a number where there is one.
    sqrt(arraySum(g -> pow(g.1 - g.2 * mean, 2), groupArray((total, rewards))) * count() / (count() - 1)) / n
        AS standard_error
FROM
(
    SELECT
        run_id, mode, sampling, assumeNotNull(min_version) AS version,
        sum(assumeNotNull(reward)) AS total, count() AS rewards
    FROM rollout_versions
    WHERE reward IS NOT NULL AND min_version IS NOT NULL
    GROUP BY run_id, mode, sampling, version, if(group_id = '', rollout_id, group_id)
)
GROUP BY run_id, mode, sampling, version
ORDER BY run_id, mode, sampling, version;

CREATE VIEW IF NOT EXISTS why_dropped AS
SELECT run_id, reason, count() AS rollouts
FROM ledger
WHERE outcome = 'dropped'
GROUP BY run_id, reason
ORDER BY run_id, rollouts DESC;

CREATE VIEW IF NOT EXISTS unknown_rewards AS
SELECT rollout_id, reward_id, any(w.attempt_id) AS attempt_id, any(w.name) AS name, any(w.value) AS value,
    any(w.source) AS source, min(w.time_ns) AS time_ns, fromUnixTimestamp64Nano(time_ns, 'UTC') AS time
FROM rewards AS w
WHERE rollout_id NOT IN (SELECT rollout_id FROM rollout_events)
GROUP BY rollout_id, reward_id;

-- Offsets that are neither rows nor dead letters (`gaps`) are markers of transactions and what compaction removed: normal
-- in transactional and compacted topics, 0 in `spans` and `rewards`. A row is a line of a record; none may be there twice.
CREATE VIEW IF NOT EXISTS reconciliation AS
SELECT
    _topic AS topic,
    _partition AS partition,
    countIf(refused = 0) AS rows,
    countIf(refused = 1) AS dead,
    count() - uniqExact(_offset, _index) AS duplicates,
    uniqExact(_offset) AS records,
    min(_offset) AS lowest,
    max(_offset) AS highest,
    highest - lowest + 1 - records AS gaps
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
ORDER BY topic, partition;

CREATE VIEW IF NOT EXISTS otel_traces AS
SELECT
    start_time AS Timestamp,
    trace_id AS TraceId,
    span_id AS SpanId,
    parent_span_id AS ParentSpanId,
    '' AS TraceState,
    name AS SpanName,
    transform(kind, ['internal', 'client', 'server', 'producer', 'consumer'],
        ['Internal', 'Client', 'Server', 'Producer', 'Consumer'], 'Unspecified') AS SpanKind,
    service AS ServiceName,
    resource_attributes AS ResourceAttributes,
    '' AS ScopeName,
    '' AS ScopeVersion,
    mapUpdate(attributes, mapFilter((k, v) -> v != '', map(
        'fulgurite.rollout_id', rollout_id, 'fulgurite.attempt_id', attempt_id,
        'gen_ai.operation.name', toString(operation), 'gen_ai.request.model', toString(model)))) AS SpanAttributes,
    toUInt64(end_ns - start_ns) AS Duration,
    transform(status, ['ok', 'error'], ['Ok', 'Error'], 'Unset') AS StatusCode,
    status_message AS StatusMessage,
    arrayMap(e -> fromUnixTimestamp64Nano(e.time_ns, 'UTC'), events) AS `Events.Timestamp`,
    arrayMap(e -> e.name, events) AS `Events.Name`,
    arrayMap(e -> e.attributes, events) AS `Events.Attributes`,
    arrayMap(l -> l.trace_id, links) AS `Links.TraceId`,
    arrayMap(l -> l.span_id, links) AS `Links.SpanId`,
    arrayMap(l -> '', links) AS `Links.TraceState`,
    arrayMap(l -> l.attributes, links) AS `Links.Attributes`
FROM spans
LIMIT 1 BY trace_id, span_id, rollout_id, attempt_id;
