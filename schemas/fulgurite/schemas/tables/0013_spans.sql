-- spans, cheaper: what is stored is as before.
--
-- merge_selector_base   Merging is most of what a span costs the engine. Parts are merged when about sixteen of a size have come
--                       together, not five: half as often, for some dozens of parts more, of which a question about a
--                       rollout reads one granule each.
-- parse_spans           as in 0002_spans.sql, in two thirds of the time that each insert takes to analyse it: an alias that stands
--                       twice is analysed twice, and nested queries cost by their columns. Texts are kept as arrays, to be
--                       counted and looked at together. `mistyped` is no column of parsed_spans and goes no further.
-- _reason               follows from _message: the default of the column, where a view does not give it. Readers of parsed_spans
--                       stay as they are: some may redact, and are changed by nobody but apply_redaction.
ALTER TABLE spans MODIFY SETTING merge_selector_base = 16;

ALTER TABLE parsed_spans MODIFY COLUMN _reason LowCardinality(String) DEFAULT multiIf(
    _message = '', '', raw = '', 'empty', _message = 'the record is not JSON in UTF-8', 'not_json', 'bad_field');

ALTER TABLE parse_spans MODIFY QUERY
SELECT
    raw,
    key,
    arrayFirst(n -> n IN (
            'rollout_id', 'attempt_id', 'sequence_id', 'trace_id', 'span_id', 'parent_span_id', 'name', 'kind',
            'status', 'status_message', 'start_ns', 'end_ns', 'service', 'agent', 'operation', 'resource',
            'model', 'endpoint', 'prompt_token_ids', 'response_token_ids', 'logprobs', 'weight_versions',
            'finish_reason', 'input', 'output', 'input_tokens', 'output_tokens', 'attributes',
            'resource_attributes', 'events', 'links', 'state'
    ), odd.1) AS mistyped,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT tidy AND NOT match(raw, '^[ \\t\\r\\n]*\\{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        c.span_id IS NULL, 'span_id: required and missing',
        c.name IS NULL, 'name: required and missing',
        start IS NULL, 'start_ns: required, an integer from 0 to 9223372036854775807',
        end IS NULL, 'end_ns: required, an integer from 0 to 9223372036854775807',
        c.span_id = '', 'span_id: must not be empty',
        start < 0, 'start_ns: must not be negative',
        end < start, 'end_ns: is before start_ns',
        c.kind NOT IN ('', 'internal', 'client', 'server', 'producer', 'consumer'),
            'kind: must be one of internal, client, server, producer, consumer',
        c.status NOT IN ('', 'unset', 'ok', 'error'), 'status: must be one of unset, ok, error',
        arrayExists((text, number) -> isNotNull(text) AND ifNull(number, -1) < 0, [r.sequence_id, r.input_tokens, r.output_tokens],
            [sequence, tokens_in, tokens_out]), 'sequence_id, input_tokens, output_tokens: must be integers from 0 on',
        has(r.prompt_token_ids, NULL),
            'prompt_token_ids: every element must be an integer from 0 to 4294967295',
        has(r.response_token_ids, NULL),
            'response_token_ids: every element must be an integer from 0 to 4294967295',
        has(r.logprobs, NULL) OR arrayExists(x -> NOT isFinite(ifNull(x, 0)), r.logprobs),
            'logprobs: every element must be a finite number',
        NOT tidy AND arrayExists((name, found) -> JSONLength(if(tidy, '', raw), name) != found,
            ['prompt_token_ids', 'response_token_ids', 'logprobs', 'weight_versions', 'events', 'links'],
            [length(r.prompt_token_ids), length(r.response_token_ids), length(r.logprobs), length(r.weight_versions),
            length(r.events), length(r.links)]),
            'prompt_token_ids, response_token_ids, logprobs, weight_versions, events, links: elements of a wrong type',
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
            ), JSONExtractKeysAndValuesRaw(if(tidy, '', raw))) AS odd
    FROM
    (
        SELECT
            *,
            toInt64OrNull(r.sequence_id) AS sequence,
            toInt64OrNull(r.input_tokens) AS tokens_in,
            toInt64OrNull(r.output_tokens) AS tokens_out,
            [r.status_message, r.agent, r.resource, r.model, r.endpoint, r.finish_reason, left(r.input, 32), left(r.output, 32)] AS more_texts,
            startsWith(raw, '{') AND fields > 0
                AND fields = common + arrayCount(x -> isNotNull(x), more_texts) + arraySum([
                    notEmpty(r.prompt_token_ids), notEmpty(r.response_token_ids), notEmpty(r.logprobs), notEmpty(r.weight_versions),
                    notEmpty(r.resource_attributes), notEmpty(r.events), notEmpty(r.links), notEmpty(r.state),
                    isNotNull(sequence), isNotNull(tokens_in), isNotNull(tokens_out)])
                AND NOT match(concat(arrayStringConcat(texts, '\0'), '\0', arrayStringConcat(more_texts, '\0')),
                    '(^|\\x00)(-?[0-9][0-9.eE+-]*(\\x00|$)|true(\\x00|$)|false(\\x00|$)|[\\[{])')
            AS tidy
        FROM
        (
            SELECT * EXCEPT (r), untuple(r) AS r
            FROM
            (
                SELECT *, JSONExtract(if(fields = common, '', raw), 'Tuple(
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
                        [c.rollout_id, c.attempt_id, c.trace_id, c.span_id, c.parent_span_id, c.name, c.kind, c.status, c.service, c.operation] AS texts,
                        arrayCount(x -> isNotNull(x), texts) + notEmpty(c.attributes) + isNotNull(start) + isNotNull(end) AS common
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
