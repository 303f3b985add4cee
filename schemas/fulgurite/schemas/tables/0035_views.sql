-- What was sent twice counts once: spans and rewards row by row, and every LLM call.
--
-- distinct_spans     spans, of those that were sent twice the first in the log. It is one span where rollout, attempt, id,
--                    trace and start are the same: columns a filter on which reaches the table, as is start_time
-- distinct_rewards   rewards, of those that were sent twice the first in the log. It is one reward where rollout, attempt and
--                    id are the same
-- llm_calls          as in 0016_views.sql, and calls of which no token ids are known: spans whose operation is chat,
--                    text_completion or generate_content; or none, with a model and output_tokens. Their lists are empty.
--                    With service, operation, input_tokens, output_tokens. A call that the gateway and the agent's own
--                    instrumentation recorded is two spans, and two rows. Embeddings are no LLM call
--
-- Columns are named one by one, so that a view stays what it is when the table gets more.
CREATE VIEW IF NOT EXISTS distinct_spans AS
SELECT
    rollout_id, attempt_id, sequence_id, trace_id, span_id, parent_span_id, name, kind, status, status_message, start_ns,
    end_ns, service, agent, operation, resource, model, endpoint, prompt_token_ids, response_token_ids, logprobs,
    weight_versions, finish_reason, input, output, input_tokens, output_tokens, attributes, resource_attributes, events,
    links, state, min_version, max_version, extra, _topic, _partition, _offset, _index, _ts, _ingested,
    fromUnixTimestamp64Nano(start_ns, 'UTC') AS start_time,
    fromUnixTimestamp64Nano(end_ns, 'UTC') AS end_time,
    end_ns - start_ns AS duration_ns
FROM
(
    SELECT
        rollout_id, attempt_id, sequence_id, trace_id, span_id, parent_span_id, name, kind, status, status_message, start_ns,
        end_ns, service, agent, operation, resource, model, endpoint, prompt_token_ids, response_token_ids, logprobs,
        weight_versions, finish_reason, input, output, input_tokens, output_tokens, attributes, resource_attributes, events,
        links, state, min_version, max_version, extra, _topic, _partition, _offset, _index, _ts, _ingested
    FROM spans
    -- The table lies in the order of the first four: only copies are sorted.
    ORDER BY rollout_id, attempt_id, start_ns, span_id, _offset, _index
    LIMIT 1 BY rollout_id, attempt_id, start_ns, span_id, trace_id
);

CREATE VIEW IF NOT EXISTS distinct_rewards AS
SELECT
    reward_id, rollout_id, attempt_id, span_id, name, value, dimensions, source, time_ns, metadata, extra,
    _topic, _partition, _offset, _index, _ts, _ingested,
    fromUnixTimestamp64Nano(time_ns, 'UTC') AS time
FROM
(
    SELECT
        reward_id, rollout_id, attempt_id, span_id, name, value, dimensions, source, time_ns, metadata, extra,
        _topic, _partition, _offset, _index, _ts, _ingested
    FROM rewards
    ORDER BY rollout_id, attempt_id, _offset, _index
    LIMIT 1 BY rollout_id, attempt_id, reward_id
);

CREATE OR REPLACE VIEW llm_calls AS
SELECT
    rollout_id, attempt_id, span_id, sequence_id, trace_id, parent_span_id, name, status, service, agent, operation, resource,
    model, prompt_token_ids, response_token_ids, logprobs, weight_versions, min_version, max_version, finish_reason,
    input, output, input_tokens, output_tokens, start_ns, end_ns,
    fromUnixTimestamp64Nano(start_ns, 'UTC') AS start_time,
    fromUnixTimestamp64Nano(end_ns, 'UTC') AS end_time
FROM
(
    SELECT
        rollout_id, attempt_id, span_id, sequence_id, trace_id, parent_span_id, name, status, service, agent, operation,
        resource, model, prompt_token_ids, response_token_ids, logprobs, weight_versions, min_version, max_version,
        finish_reason, input, output, input_tokens, output_tokens, start_ns, end_ns
    FROM spans
    WHERE notEmpty(response_token_ids) OR operation IN ('chat', 'text_completion', 'generate_content')
        OR (operation = '' AND model != '' AND output_tokens > 0)
    LIMIT 1 BY rollout_id, attempt_id, start_ns, span_id, trace_id, min_version, max_version
);
