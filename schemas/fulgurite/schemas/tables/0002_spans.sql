-- spans: one row for every record of the topic `spans`: what agents did; an LLM call also has its tokens, logprobs, versions.
--
-- Columns are the fields of fulgurite.schemas.spans.Span, and:
--   start_time, end_time     the *_ns columns as DateTime64(9); duration_ns their difference
--   min_version, max_version oldest and newest policy version that sampled a token of this call; NULL where none is known
--   extra                    fields this version does not know: name -> its JSON, as it came
--   _topic … _ingested       where the record lay in Kafka, its Kafka time, and when it came here
-- Append-only. A producer that sends a span twice makes two rows; the views (llm_calls, …) count it once.
-- Ordered by rollout, because that is how trajectories are read. No TTL: how long to keep traces is yours to say,
-- for example ALTER TABLE spans MODIFY TTL toDateTime(_ts) + INTERVAL 90 DAY.
--
-- in_spans: where the materialiser writes the raw records. It stores nothing (ENGINE = Null); the views below parse.

CREATE TABLE IF NOT EXISTS in_spans
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

CREATE TABLE IF NOT EXISTS spans
(
    rollout_id String CODEC(ZSTD(1)),
    attempt_id String CODEC(ZSTD(1)),
    sequence_id UInt64 CODEC(T64, ZSTD(1)),
    trace_id String CODEC(ZSTD(1)),
    span_id String CODEC(ZSTD(1)),
    parent_span_id String CODEC(ZSTD(1)),
    name LowCardinality(String),
    kind LowCardinality(String),
    status LowCardinality(String),
    status_message String CODEC(ZSTD(1)),
    start_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    end_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    service LowCardinality(String),
    agent LowCardinality(String),
    operation LowCardinality(String),
    resource LowCardinality(String),
    model LowCardinality(String),
    endpoint LowCardinality(String),
    prompt_token_ids Array(UInt32) CODEC(ZSTD(1)),
    response_token_ids Array(UInt32) CODEC(ZSTD(1)),
    logprobs Array(Float64) CODEC(ZSTD(1)),
    weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)) CODEC(ZSTD(1)),
    finish_reason LowCardinality(String),
    input String CODEC(ZSTD(3)),
    output String CODEC(ZSTD(3)),
    input_tokens UInt64 CODEC(T64, ZSTD(1)),
    output_tokens UInt64 CODEC(T64, ZSTD(1)),
    attributes Map(LowCardinality(String), String),
    resource_attributes Map(LowCardinality(String), String),
    events Array(Tuple(name String, time_ns Int64, attributes Map(String, String))) CODEC(ZSTD(1)),
    links Array(Tuple(trace_id String, span_id String, attributes Map(String, String))) CODEC(ZSTD(1)),
    state Map(String, String) CODEC(ZSTD(1)),
    min_version Nullable(UInt64) CODEC(ZSTD(1)),
    max_version Nullable(UInt64) CODEC(ZSTD(1)),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    start_time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(start_ns, 'UTC'),
    end_time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(end_ns, 'UTC'),
    duration_ns Int64 ALIAS end_ns - start_ns,
    INDEX offsets _offset TYPE minmax GRANULARITY 1,
    INDEX traces trace_id TYPE bloom_filter(0.001) GRANULARITY 1,
    INDEX starts start_ns TYPE minmax GRANULARITY 1,
    INDEX attribute_names mapKeys(attributes) TYPE bloom_filter(0.01) GRANULARITY 1
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(_ts)
ORDER BY (rollout_id, attempt_id, start_ns, span_id)
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_spans: every record once, parsed once, with what is wrong with it; feeds spans and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_spans
(
    raw String,
    key String,
    _reason LowCardinality(String),
    _message String,
    rollout_id String,
    attempt_id String,
    sequence_id UInt64,
    trace_id String,
    span_id String,
    parent_span_id String,
    name LowCardinality(String),
    kind LowCardinality(String),
    status LowCardinality(String),
    status_message String,
    start_ns Int64,
    end_ns Int64,
    service LowCardinality(String),
    agent LowCardinality(String),
    operation LowCardinality(String),
    resource LowCardinality(String),
    model LowCardinality(String),
    endpoint LowCardinality(String),
    prompt_token_ids Array(UInt32),
    response_token_ids Array(UInt32),
    logprobs Array(Float64),
    weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)),
    finish_reason LowCardinality(String),
    input String,
    output String,
    input_tokens UInt64,
    output_tokens UInt64,
    attributes Map(LowCardinality(String), String),
    resource_attributes Map(LowCardinality(String), String),
    events Array(Tuple(name String, time_ns Int64, attributes Map(String, String))),
    links Array(Tuple(trace_id String, span_id String, attributes Map(String, String))),
    state Map(String, String),
    min_version Nullable(UInt64),
    max_version Nullable(UInt64),
    extra Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

-- An insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements. `odd` are the top-level fields whose (name, kind of JSON) is not listed: mistyped, or unknown and kept.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_spans TO parsed_spans AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['span_id', 'name', 'start_ns', 'end_ns']), concat(arrayFirst(n -> NOT has(names, n), ['span_id', 'name', 'start_ns', 'end_ns']), ': required and missing'),
        f.span_id = '',
            'span_id: must not be empty',
        f.end_ns < f.start_ns,
            'end_ns: is before start_ns',
        NOT has(['', 'internal', 'client', 'server', 'producer', 'consumer'], f.kind),
            'kind: must be one of internal, client, server, producer, consumer',
        NOT has(['', 'unset', 'ok', 'error'], f.status),
            'status: must be one of unset, ok, error',
        has(f.prompt_token_ids, NULL),
            'prompt_token_ids: every element must be an integer from 0 to 4294967295',
        has(f.response_token_ids, NULL),
            'response_token_ids: every element must be an integer from 0 to 4294967295',
        has(f.logprobs, NULL),
            'logprobs: every element must be a finite number',
        notEmpty(f.logprobs) AND length(f.logprobs) != length(f.response_token_ids),
            'logprobs: must be as many as response_token_ids',
        notEmpty(f.weight_versions)
            AND arrayPushBack(f.weight_versions.start, length(f.response_token_ids)) != arrayPushFront(f.weight_versions.end, 0),
            'weight_versions: must cover response_token_ids without gap or overlap',
        '') AS _message,
    f.rollout_id AS rollout_id,
    f.attempt_id AS attempt_id,
    f.sequence_id AS sequence_id,
    f.trace_id AS trace_id,
    f.span_id AS span_id,
    f.parent_span_id AS parent_span_id,
    f.name AS name,
    if(f.kind = '', 'internal', f.kind) AS kind,
    if(f.status = '', 'unset', f.status) AS status,
    f.status_message AS status_message,
    f.start_ns AS start_ns,
    f.end_ns AS end_ns,
    f.service AS service,
    f.agent AS agent,
    f.operation AS operation,
    f.resource AS resource,
    f.model AS model,
    f.endpoint AS endpoint,
    arrayMap(x -> ifNull(x, 0), f.prompt_token_ids) AS prompt_token_ids,
    arrayMap(x -> ifNull(x, 0), f.response_token_ids) AS response_token_ids,
    arrayMap(x -> ifNull(x, 0), f.logprobs) AS logprobs,
    f.weight_versions AS weight_versions,
    f.finish_reason AS finish_reason,
    f.input AS input,
    f.output AS output,
    f.input_tokens AS input_tokens,
    f.output_tokens AS output_tokens,
    f.attributes AS attributes,
    f.resource_attributes AS resource_attributes,
    f.events AS events,
    f.links AS links,
    f.state AS state,
    if(empty(f.weight_versions), NULL, arrayMin(f.weight_versions.version)) AS min_version,
    if(empty(f.weight_versions), NULL, arrayMax(f.weight_versions.version)) AS max_version,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'rollout_id', 'attempt_id', 'sequence_id', 'trace_id', 'span_id', 'parent_span_id', 'name', 'kind',
            'status', 'status_message', 'start_ns', 'end_ns', 'service', 'agent', 'operation', 'resource',
            'model', 'endpoint', 'prompt_token_ids', 'response_token_ids', 'logprobs', 'weight_versions',
            'finish_reason', 'input', 'output', 'input_tokens', 'output_tokens', 'attributes',
            'resource_attributes', 'events', 'links', 'state'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'rollout_id "', 'attempt_id "', 'sequence_id 1', 'trace_id "', 'span_id "', 'parent_span_id "',
                'name "', 'kind "', 'status "', 'status_message "', 'start_ns 1', 'end_ns 1', 'service "',
                'agent "', 'operation "', 'resource "', 'model "', 'endpoint "', 'prompt_token_ids [',
                'response_token_ids [', 'logprobs [', 'weight_versions [', 'finish_reason "', 'input "',
                'output "', 'input_tokens 1', 'output_tokens 1', 'attributes {', 'resource_attributes {',
                'events [', 'links [', 'state {'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    rollout_id String, attempt_id String, sequence_id UInt64, trace_id String, span_id String,
                    parent_span_id String, name String, kind String, status String, status_message String,
                    start_ns Int64, end_ns Int64, service String, agent String, operation String,
                    resource String, model String, endpoint String, prompt_token_ids Array(Nullable(UInt32)),
                    response_token_ids Array(Nullable(UInt32)), logprobs Array(Nullable(Float64)),
                    weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)),
                    finish_reason String, input String, output String, input_tokens UInt64,
                    output_tokens UInt64, attributes Map(String, String),
                    resource_attributes Map(String, String),
                    events Array(Tuple(name String, time_ns Int64, attributes Map(String, String))),
                    links Array(Tuple(trace_id String, span_id String, attributes Map(String, String))),
                    state Map(String, String))') AS f
            FROM in_spans
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS spans_mv TO spans AS
SELECT
    rollout_id, attempt_id, sequence_id, trace_id, span_id, parent_span_id, name, kind, status, status_message,
    start_ns, end_ns, service, agent, operation, resource, model, endpoint, prompt_token_ids,
    response_token_ids, logprobs, weight_versions, finish_reason, input, output, input_tokens, output_tokens,
    attributes, resource_attributes, events, links, state, min_version, max_version, extra, _topic, _partition,
    _offset, _ts
FROM parsed_spans
WHERE _reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS spans_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _topic, _partition, _offset, _ts
FROM parsed_spans
WHERE _reason != '';
