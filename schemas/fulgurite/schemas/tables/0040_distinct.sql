-- A span that was sent again counts once, in little memory: what is held is a number for each span, and of those that were
-- sent again the ids.
--
-- distinct_spans     as in 0037_distinct.sql. llm_calls and otel_traces read it
--
-- numbers            of each trace, a hash of every span's id: which are there twice
-- again              the rows of these, all of them; what shares a hash and no id leaves nobody out
--
-- Each join holds its right side, which is small, and the left one streams: of the spans that are asked for nothing is held. A
-- filter on rollout, attempt, trace or id goes to all three readings of the table. Any other one goes to the first, which is the
-- only one of more than ids: the second then reads the ids of all spans, the third the granules with spans that were sent again.
-- Filters that leave fewer spans than were sent again make the planner turn the first join around, with the settings of
-- 0037_distinct.sql: then they narrow the others, too.
CREATE OR REPLACE VIEW distinct_spans AS
SELECT
    rollout_id, attempt_id, sequence_id, trace_id, span_id, parent_span_id, name, kind, status, status_message, start_ns,
    end_ns, service, agent, operation, resource, model, endpoint, prompt_token_ids, response_token_ids, logprobs,
    weight_versions, finish_reason, input, output, input_tokens, output_tokens, attributes, resource_attributes, events,
    links, state, min_version, max_version, extra, _topic, _partition, _offset, _index, _ts, _ingested,
    fromUnixTimestamp64Nano(start_ns, 'UTC') AS start_time,
    fromUnixTimestamp64Nano(end_ns, 'UTC') AS end_time,
    end_ns - start_ns AS duration_ns
FROM spans AS s
LEFT ANTI JOIN
(
    SELECT
        one.rollout_id AS of_rollout, one.attempt_id AS of_attempt, one.trace_id AS of_trace, one.span_id AS of_span,
        (one._offset, one._index, one._partition, one._topic, one._ingested) AS place
    FROM spans AS one
    LEFT SEMI JOIN
    (
        SELECT
            rollout_id, attempt_id, trace_id,
            arrayJoin(arrayDistinct(arrayFilter((x, next) -> x = next, arrayPopBack(numbers), arrayPopFront(numbers)))) AS number
        FROM
        (
            SELECT rollout_id, attempt_id, trace_id, arraySort(groupArray(cityHash64(span_id))) AS numbers
            FROM spans
            GROUP BY rollout_id, attempt_id, trace_id
        )
    ) AS twice ON one.rollout_id = twice.rollout_id AND one.attempt_id = twice.attempt_id
        AND one.trace_id = twice.trace_id AND cityHash64(one.span_id) = twice.number
) AS again ON s.rollout_id = again.of_rollout AND s.attempt_id = again.of_attempt
    AND s.trace_id = again.of_trace AND s.span_id = again.of_span
    AND again.place < (s._offset, s._index, s._partition, s._topic, s._ingested);
