-- A span that was sent again counts once, also where its producer stamped its times anew.
--
-- distinct_spans     spans, of those that were sent twice the first in the log. It is one span where rollout, attempt, trace and
--                    id are the same, whatever else differs
-- llm_calls          as in 0035_views.sql, of these
-- otel_traces        as in 0014_otlp.sql, of these
--
-- A span is left out where an earlier one is there. So a filter on any column reaches the table on the one side of the join; on
-- the other one those on rollout, attempt, trace and id do, and without such a filter it reads these of all spans. LIMIT BY
-- would hand on filters on its own columns only, and with the start among these, a span that was stamped anew is another one.
-- The side that is kept is the right one: it is what is held in memory.
--
-- place              what is in the table twice has the same place in the log, as while it is made anew: the older row counts
CREATE OR REPLACE VIEW distinct_spans AS
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
        rollout_id AS of_rollout, attempt_id AS of_attempt, trace_id AS of_trace, span_id AS of_span,
        (_offset, _index, _partition, _topic, _ingested) AS place
    FROM spans
) AS earlier
RIGHT ANTI JOIN spans AS s ON earlier.of_rollout = s.rollout_id AND earlier.of_attempt = s.attempt_id
    AND earlier.of_trace = s.trace_id AND earlier.of_span = s.span_id
    AND earlier.place < (s._offset, s._index, s._partition, s._topic, s._ingested);

CREATE OR REPLACE VIEW llm_calls AS
SELECT
    rollout_id, attempt_id, span_id, sequence_id, trace_id, parent_span_id, name, status, service, agent, operation, resource,
    model, prompt_token_ids, response_token_ids, logprobs, weight_versions, min_version, max_version, finish_reason,
    input, output, input_tokens, output_tokens, start_ns, end_ns, start_time, end_time
FROM distinct_spans
WHERE notEmpty(response_token_ids) OR operation IN ('chat', 'text_completion', 'generate_content')
    OR (operation = '' AND model != '' AND output_tokens > 0);

CREATE OR REPLACE VIEW otel_traces AS
SELECT
    start_time AS Timestamp,
    trace_id AS TraceId,
    span_id AS SpanId,
    parent_span_id AS ParentSpanId,
    extra['trace_state'] AS TraceState,
    name AS SpanName,
    transform(kind, ['internal', 'client', 'server', 'producer', 'consumer'],
        ['Internal', 'Client', 'Server', 'Producer', 'Consumer'], 'Unspecified')::LowCardinality(String) AS SpanKind,
    service AS ServiceName,
    resource_attributes AS ResourceAttributes,
    attributes['otel.scope.name'] AS ScopeName,
    attributes['otel.scope.version'] AS ScopeVersion,
    mapUpdate(
        mapFilter((k, v) -> v != '', map('fulgurite.rollout_id', rollout_id, 'fulgurite.attempt_id', attempt_id,
            'gen_ai.operation.name', toString(operation), 'gen_ai.request.model', toString(model))),
        mapFilter((k, v) -> k NOT IN ('otel.scope.name', 'otel.scope.version'), attributes)
    )::Map(LowCardinality(String), String) AS SpanAttributes,
    toUInt64(end_ns - start_ns) AS Duration,
    transform(status, ['ok', 'error'], ['Ok', 'Error'], 'Unset')::LowCardinality(String) AS StatusCode,
    status_message AS StatusMessage,
    arrayMap(e -> fromUnixTimestamp64Nano(e.time_ns, 'UTC'), events) AS `Events.Timestamp`,
    arrayMap(e -> e.name, events)::Array(LowCardinality(String)) AS `Events.Name`,
    arrayMap(e -> e.attributes, events)::Array(Map(LowCardinality(String), String)) AS `Events.Attributes`,
    arrayMap(l -> l.trace_id, links) AS `Links.TraceId`,
    arrayMap(l -> l.span_id, links) AS `Links.SpanId`,
    arrayMap(l -> '', links) AS `Links.TraceState`,
    arrayMap(l -> l.attributes, links)::Array(Map(LowCardinality(String), String)) AS `Links.Attributes`
FROM distinct_spans;
