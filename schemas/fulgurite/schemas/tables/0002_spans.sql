-- spans: one row for every span of the topics `spans` and `otlp_spans`: what agents did; an LLM call also has its tokens, logprobs, versions.
--
-- Columns are the fields of fulgurite.schemas.spans.Span, and:
--   start_time, end_time     the *_ns columns as DateTime64(9); duration_ns their difference
--   min_version, max_version oldest and newest policy version that sampled a token of this call; NULL where none is known
--   extra                    fields this version does not know: name -> its JSON, as it came
--   _topic … _ingested       where the record lay in Kafka, its Kafka time, and when it came here
--   _index                   which line (or which span of an OTLP record) it was, from 0
-- Append-only. A producer that sends a span twice makes two rows; the views (llm_calls, …) count it once.
-- Ordered by rollout, because that is how trajectories are read. No TTL: how long to keep traces is yours to say,
-- for example ALTER TABLE spans MODIFY TTL toDateTime(_ts) + INTERVAL 90 DAY.
--
-- in_spans: where the materialiser writes the raw lines of records. It stores nothing (ENGINE = Null); the views below parse.
-- `_into` says which tables may take the line: 1 spans, 2 dead_letters, 3 both; less than 3 when a broken insert is mended.

CREATE TABLE IF NOT EXISTS in_spans
(
    raw String,
    key LowCardinality(String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _index UInt32,
    _ts DateTime64(3, 'UTC'),
    _into UInt8
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
    _index UInt32 CODEC(T64, ZSTD(1)),
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
-- A part of one insert is one file (compact) and not one for each of 50 columns, whose creation costs as much as the rows.
SETTINGS non_replicated_deduplication_window = 10000, min_bytes_for_wide_part = 268435456;

-- parsed_spans: every line once, parsed once, with what is wrong with it; feeds spans and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_spans
(
    raw String,
    key LowCardinality(String),
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
    _index UInt32,
    _ts DateTime64(3, 'UTC'),
    _into UInt8
)
ENGINE = Null;

-- Most lines are parsed three times at most, all of them by simdjson: counted, read for the fields that nearly every span
-- has (c), and, if it has others, for those (r). A line is `tidy` when each of its top-level fields was found with its own
-- type: their number says that nothing unknown and nothing mistyped is left. JSONExtract is lenient (a string takes any
-- value), so texts that look like another kind of JSON do not count as tidy. Integers may come in quotes, since JavaScript
-- has no others of this size. Only an untidy line pays for the exact look at every field (`odd`: those whose (name, kind of
-- JSON) is not listed: mistyped, or unknown and kept). `rest` is '' where there is nothing more, which costs nothing to parse.
--
-- Every insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_spans TO parsed_spans AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT tidy AND NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        c.span_id IS NULL, 'span_id: required and missing',
        c.name IS NULL, 'name: required and missing',
        start IS NULL, 'start_ns: required, an integer from 0 to 9223372036854775807',
        end IS NULL, 'end_ns: required, an integer from 0 to 9223372036854775807',
        span_id = '', 'span_id: must not be empty',
        start_ns < 0, 'start_ns: must not be negative',
        end_ns < start_ns, 'end_ns: is before start_ns',
        kind NOT IN ('internal', 'client', 'server', 'producer', 'consumer'),
            'kind: must be one of internal, client, server, producer, consumer',
        status NOT IN ('unset', 'ok', 'error'), 'status: must be one of unset, ok, error',
        has([isNull(r.sequence_id), isNull(r.input_tokens), isNull(r.output_tokens)], 0) AND has([
            r.sequence_id IS NOT NULL AND sequence IS NULL, r.input_tokens IS NOT NULL AND tokens_in IS NULL,
            r.output_tokens IS NOT NULL AND tokens_out IS NULL], 1),
            'sequence_id, input_tokens, output_tokens: must be integers from 0 on',
        has(r.prompt_token_ids, NULL),
            'prompt_token_ids: every element must be an integer from 0 to 4294967295',
        has(r.response_token_ids, NULL),
            'response_token_ids: every element must be an integer from 0 to 4294967295',
        has(r.logprobs, NULL),
            'logprobs: every element must be a finite number',
        notEmpty(r.logprobs) AND length(r.logprobs) != length(r.response_token_ids),
            'logprobs: must be as many as response_token_ids',
        notEmpty(r.weight_versions)
            AND arrayPushBack(r.weight_versions.start, length(r.response_token_ids)) != arrayPushFront(r.weight_versions.end, 0),
            'weight_versions: must cover response_token_ids without gap or overlap',
        '') AS _message,
    assumeNotNull(c.rollout_id) AS rollout_id,
    assumeNotNull(c.attempt_id) AS attempt_id,
    ifNull(sequence, 0) AS sequence_id,
    assumeNotNull(c.trace_id) AS trace_id,
    assumeNotNull(c.span_id) AS span_id,
    assumeNotNull(c.parent_span_id) AS parent_span_id,
    assumeNotNull(c.name) AS name,
    if(ifNull(c.kind, '') = '', 'internal', assumeNotNull(c.kind)) AS kind,
    if(ifNull(c.status, '') = '', 'unset', assumeNotNull(c.status)) AS status,
    assumeNotNull(r.status_message) AS status_message,
    ifNull(start, 0) AS start_ns,
    ifNull(end, 0) AS end_ns,
    assumeNotNull(c.service) AS service,
    assumeNotNull(r.agent) AS agent,
    assumeNotNull(c.operation) AS operation,
    assumeNotNull(r.resource) AS resource,
    assumeNotNull(r.model) AS model,
    assumeNotNull(r.endpoint) AS endpoint,
    arrayMap(x -> ifNull(x, 0), r.prompt_token_ids) AS prompt_token_ids,
    arrayMap(x -> ifNull(x, 0), r.response_token_ids) AS response_token_ids,
    arrayMap(x -> ifNull(x, 0), r.logprobs) AS logprobs,
    r.weight_versions AS weight_versions,
    assumeNotNull(r.finish_reason) AS finish_reason,
    assumeNotNull(r.input) AS input,
    assumeNotNull(r.output) AS output,
    ifNull(tokens_in, 0) AS input_tokens,
    ifNull(tokens_out, 0) AS output_tokens,
    c.attributes AS attributes,
    r.resource_attributes AS resource_attributes,
    r.events AS events,
    r.links AS links,
    r.state AS state,
    if(empty(r.weight_versions), NULL, arrayMin(r.weight_versions.version)) AS min_version,
    if(empty(r.weight_versions), NULL, arrayMax(r.weight_versions.version)) AS max_version,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _index, _ts, _into
FROM
(
    SELECT
        *,
        isValidJSON(if(tidy, '{}', raw)) AS is_json,
        arrayFilter(x -> concat(x.1, ' ', multiIf(
            toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
            'rollout_id "', 'attempt_id "', 'sequence_id 1', 'sequence_id "', 'trace_id "', 'span_id "',
            'parent_span_id "', 'name "', 'kind "', 'status "', 'status_message "', 'start_ns 1', 'start_ns "',
            'end_ns 1', 'end_ns "', 'service "', 'agent "', 'operation "', 'resource "', 'model "', 'endpoint "',
            'prompt_token_ids [', 'response_token_ids [', 'logprobs [', 'weight_versions [', 'finish_reason "',
            'input "', 'output "', 'input_tokens 1', 'input_tokens "', 'output_tokens 1', 'output_tokens "',
            'attributes {', 'resource_attributes {', 'events [', 'links [', 'state {'
        ), JSONExtractKeysAndValuesRaw(if(tidy, '', raw))) AS odd,
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
            toInt64OrNull(r.sequence_id) AS sequence,
            toInt64OrNull(r.input_tokens) AS tokens_in,
            toInt64OrNull(r.output_tokens) AS tokens_out,
            startsWith(raw, '{') AND fields > 0
            AND fields = common
                + notEmpty(r.prompt_token_ids) + notEmpty(r.response_token_ids) + notEmpty(r.logprobs)
                + notEmpty(r.weight_versions) + notEmpty(r.resource_attributes) + notEmpty(r.events)
                + notEmpty(r.links) + notEmpty(r.state) + isNotNull(sequence) + isNotNull(tokens_in) + isNotNull(tokens_out)
                + isNotNull(r.status_message) + isNotNull(r.agent) + isNotNull(r.resource) + isNotNull(r.model)
                + isNotNull(r.endpoint) + isNotNull(r.finish_reason) + isNotNull(r.input) + isNotNull(r.output)
            AND NOT match(concatWithSeparator('\0',
                ifNull(c.rollout_id, ''), ifNull(c.attempt_id, ''), ifNull(c.trace_id, ''), ifNull(c.span_id, ''),
                ifNull(c.parent_span_id, ''), ifNull(c.name, ''), ifNull(c.service, ''), ifNull(c.operation, ''), ifNull(r.status_message, ''),
                ifNull(r.agent, ''), ifNull(r.resource, ''), ifNull(r.model, ''), ifNull(r.endpoint, ''),
                ifNull(r.finish_reason, ''), left(ifNull(r.input, ''), 32), left(ifNull(r.output, ''), 32)),
                '(^|\\x00)(-?[0-9][0-9.eE+-]*(\\x00|$)|true(\\x00|$)|false(\\x00|$)|[\\[{])')
            AS tidy
        FROM
        (
            SELECT * EXCEPT (r), untuple(r) AS r
            FROM
            (
                SELECT
                    * EXCEPT (rest),
                    JSONExtract(rest, 'Tuple(
                        sequence_id Nullable(String), status_message Nullable(String), agent Nullable(String),
                        resource Nullable(String), model Nullable(String), endpoint Nullable(String),
                        prompt_token_ids Array(Nullable(UInt32)), response_token_ids Array(Nullable(UInt32)),
                        logprobs Array(Nullable(Float64)),
                        weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)),
                        finish_reason Nullable(String), input Nullable(String), output Nullable(String),
                        input_tokens Nullable(String), output_tokens Nullable(String),
                        resource_attributes Map(String, String),
                        events Array(Tuple(name String, time_ns Int64, attributes Map(String, String))),
                        links Array(Tuple(trace_id String, span_id String, attributes Map(String, String))),
                        state Map(String, String))') AS r
                FROM
                (
                    SELECT
                        *,
                        toInt64OrNull(c.start_ns) AS start,
                        toInt64OrNull(c.end_ns) AS end,
                        notEmpty(c.attributes)
                            + isNotNull(c.rollout_id) + isNotNull(c.attempt_id) + isNotNull(c.trace_id)
                            + isNotNull(c.span_id) + isNotNull(c.parent_span_id) + isNotNull(c.name)
                            + isNotNull(c.kind) + isNotNull(c.status) + isNotNull(start) + isNotNull(end)
                            + isNotNull(c.service) + isNotNull(c.operation) AS common,
                        if(fields = common, '', raw) AS rest
                    FROM
                    (
                        SELECT * EXCEPT (c), untuple(c) AS c
                        FROM
                        (
                            SELECT
                                *,
                                JSONLength(raw) AS fields,
                                JSONExtract(raw, 'Tuple(
                                    rollout_id Nullable(String), attempt_id Nullable(String), trace_id Nullable(String),
                                    span_id Nullable(String), parent_span_id Nullable(String), name Nullable(String),
                                    kind Nullable(String), status Nullable(String), start_ns Nullable(String),
                                    end_ns Nullable(String), service Nullable(String), operation Nullable(String),
                                    attributes Map(String, String))') AS c
                            FROM in_spans
                        )
                    )
                )
            )
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS spans_mv TO spans AS
SELECT
    rollout_id, attempt_id, sequence_id, trace_id, span_id, parent_span_id, name, kind, status, status_message,
    start_ns, end_ns, service, agent, operation, resource, model, endpoint, prompt_token_ids,
    response_token_ids, logprobs, weight_versions, finish_reason, input, output, input_tokens, output_tokens,
    attributes, resource_attributes, events, links, state, min_version, max_version, extra,
    _topic, _partition, _offset, _index, _ts
FROM parsed_spans
WHERE _reason = '' AND bitTest(_into, 0);

CREATE MATERIALIZED VIEW IF NOT EXISTS spans_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _index, _topic, _partition, _offset, _ts
FROM parsed_spans
WHERE _reason != '' AND bitTest(_into, 1);
