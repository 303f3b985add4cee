-- Views that a filter goes through, down to the index of the table: what is asked for is read, and not everything.
--
-- llm_calls          as in 0009_views.sql. A span that was sent twice counts once; it is one span where rollout, attempt, id,
--                    trace, start and versions are the same. These are columns a filter on which reaches the table, as is
--                    start_time.
-- rollout_versions   as in 0009_views.sql; of a rollout that is there twice, all columns are of the first in the log.
-- spans.start_times  an index: without it a filter on start_time, or otel_traces.Timestamp, reads all spans (start_ns has one
--                    of its own, but ClickHouse does not know that the one grows with the other)
ALTER TABLE spans ADD INDEX IF NOT EXISTS start_times fromUnixTimestamp64Nano(start_ns, 'UTC') TYPE minmax GRANULARITY 1;

-- For the spans of before: runs in the background and rewrites no column.
ALTER TABLE spans MATERIALIZE INDEX start_times;

-- Times are computed outside: a filter on them goes through LIMIT BY as one on start_ns, which is among its columns.
CREATE OR REPLACE VIEW llm_calls AS
SELECT
    rollout_id, attempt_id, span_id, sequence_id, trace_id, parent_span_id, name, status, agent, resource, model,
    prompt_token_ids, response_token_ids, logprobs, weight_versions, min_version, max_version, finish_reason,
    input, output, start_ns, end_ns,
    fromUnixTimestamp64Nano(start_ns, 'UTC') AS start_time,
    fromUnixTimestamp64Nano(end_ns, 'UTC') AS end_time
FROM
(
    SELECT
        rollout_id, attempt_id, span_id, sequence_id, trace_id, parent_span_id, name, status, agent, resource, model,
        prompt_token_ids, response_token_ids, logprobs, weight_versions, min_version, max_version, finish_reason,
        input, output, start_ns, end_ns
    FROM spans
    WHERE notEmpty(response_token_ids)
    LIMIT 1 BY rollout_id, attempt_id, start_ns, span_id, trace_id, min_version, max_version
);

-- The table lies in this order: nothing is sorted, and no aggregate keeps fourteen columns of every rollout.
CREATE OR REPLACE VIEW rollout_versions AS
SELECT
    rollout_id, run_id, mode, metadata['sampling'] AS sampling, group_id, agent, status, partial, reward,
    min_version, max_version, calls, tokens, sampled_tokens, finished_ns,
    fromUnixTimestamp64Nano(finished_ns, 'UTC') AS finished_time
FROM trajectories
ORDER BY rollout_id, _offset
LIMIT 1 BY rollout_id;
