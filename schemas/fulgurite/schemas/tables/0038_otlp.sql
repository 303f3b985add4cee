-- A span of OTLP with an event whose time is 2^63 or later is refused and kept whole, as a native one is: its time was a
-- negative one in the table.
--
-- explode_otlp, parse_otlp   as in 0034_otlp.sql, with it
ALTER TABLE explode_otlp MODIFY QUERY
WITH
    leaf -> multiIf(
        leaf.kind = 'string_value', toJSONString(leaf.string_value),
        leaf.kind = 'int_value', toString(leaf.int_value),
        leaf.kind = 'double_value', toJSONString(leaf.double_value),
        leaf.kind = 'bool_value', toString(leaf.bool_value),
        leaf.kind = 'none', 'null',
        toJSONString(base64Encode(concat(leaf.bytes_value, leaf.array_value, leaf.kvlist_value)))) AS leaf_json,
    element -> multiIf(
        element.kind = 'string_value', toJSONString(element.string_value),
        element.kind = 'int_value', toString(element.int_value),
        element.kind = 'double_value', toJSONString(element.double_value),
        element.kind = 'bool_value', toString(element.bool_value),
        element.kind = 'none', 'null',
        element.kind = 'array_value', concat('[', arrayStringConcat(arrayMap(x -> leaf_json(x), element.array_value.values), ','), ']'),
        element.kind = 'kvlist_value', concat('{', arrayStringConcat(arrayMap(x -> concat(toJSONString(x.key), ':', leaf_json(x.value)), element.kvlist_value.values), ','), '}'),
        toJSONString(base64Encode(element.bytes_value))) AS element_json,
    v -> multiIf(
        v.kind = 'string_value', v.string_value,
        v.kind = 'int_value', toString(v.int_value),
        v.kind = 'double_value', toString(v.double_value),
        v.kind = 'bool_value', toString(v.bool_value),
        v.kind = 'none', '',
        v.kind = 'array_value', concat('[', arrayStringConcat(arrayMap(x -> element_json(x), v.array_value.values), ','), ']'),
        v.kind = 'kvlist_value', concat('{', arrayStringConcat(arrayMap(x -> concat(toJSONString(x.key), ':', element_json(x.value)), v.kvlist_value.values), ','), '}'),
        base64Encode(v.bytes_value)) AS text,
    e -> if(e.kind = 'string_value', e.string_value, if(e.kind = 'none', '', element_json(e))) AS element_text,
    attributes -> mapFromArrays(attributes.key, arrayMap(e -> element_text(e), attributes.value)) AS text_map,
    s -> replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(replaceRegexpAll(s,
        '\\{"kind":"none","string_value":"","bool_value":false,"int_value":"?0"?,"double_value":0,"bytes_value":"","array_value":(?:"(?:NONE)?"|\\{"values":\\[\\]\\}),"kvlist_value":(?:"(?:NONE)?"|\\{"values":\\[\\]\\})\\}', '{}'),
        '\\{"kind":"string_value","string_value":', '{"stringValue":'),
        '\\{"kind":"bool_value","string_value":"","bool_value":', '{"boolValue":'),
        '\\{"kind":"int_value","string_value":"","bool_value":false,"int_value":', '{"intValue":'),
        '\\{"kind":"double_value","string_value":"","bool_value":false,"int_value":"?0"?,"double_value":', '{"doubleValue":'),
        '\\{"kind":"bytes_value","string_value":"","bool_value":false,"int_value":"?0"?,"double_value":0,"bytes_value":', '{"bytesValue":'),
        '\\{"kind":"array_value","string_value":"","bool_value":false,"int_value":"?0"?,"double_value":0,"bytes_value":"","array_value":', '{"arrayValue":'),
        '\\{"kind":"kvlist_value","string_value":"","bool_value":false,"int_value":"?0"?,"double_value":0,"bytes_value":"","array_value":(?:"(?:NONE)?"|\\{"values":\\[\\]\\}),"kvlist_value":', '{"kvlistValue":'),
        '\\{"time":', '{"timeUnixNano":') AS heads,
    literal -> base64Encode(arrayStringConcat(arrayMap(x -> multiIf(
        x = '\\u2028', '\xE2\x80\xA8', x = '\\u2029', '\xE2\x80\xA9', startsWith(x, '\\u'), unhex(substring(x, 5)),
        startsWith(x, '\\'), transform(substring(x, 2), ['b', 'f', 'n', 'r', 't'], ['\b', '\f', '\n', '\r', '\t'], substring(x, 2)), x),
        extractAll(literal, '\\\\u[0-9a-fA-F]{4}|\\\\.|\\C')))) AS bytes_of,
    s -> arrayStringConcat(arrayMap((p, n) -> if(n = 1, p, concat(
        bytes_of(left(p, position(p, '","array_value":') - 1)), substring(p, position(p, '","array_value":')))),
        splitByString('{"bytesValue":"', s), arrayEnumerate(splitByString('{"bytesValue":"', s))), '{"bytesValue":"') AS with_bytes,
    s -> replaceRegexpAll(with_bytes(heads(s)),
        '(?:(?:(?:(?:(?:,"bool_value":false)?,"int_value":"?0"?)?,"double_value":0)?,"bytes_value":"")?,"array_value":(?:"(?:NONE)?"|\\{"values":\\[\\]\\}))?,"kvlist_value":(?:"(?:NONE)?"|\\{"values":\\[\\]\\})\\}', '}') AS as_otlp
SELECT
    _topic, _partition, _offset, toUInt32(first + number - 1) AS _index, _ts, key, _into,
    trace, id, trace_state, parent, name, kind, status.code AS code, status.message AS message, begin, end,
    attributes.key AS names,
    arrayMap(v -> text(v), attributes.value) AS texts,
    arrayMap(k -> transform(
        k,
        [
            'fulgurite.rollout_id', 'agentlightning.rollout_id',  -- 0..1 rollout_id
            'baggage.fulgurite.rollout_id', 'baggage.agentlightning.rollout_id',  -- 2..3 rollout_id from baggage
            'fulgurite.attempt_id', 'agentlightning.attempt_id',  -- 4..5 attempt_id
            'baggage.fulgurite.attempt_id', 'baggage.agentlightning.attempt_id',  -- 6..7 attempt_id from baggage
            'fulgurite.sequence_id', 'agentlightning.span_sequence_id',  -- 8..9 sequence_id
            'gen_ai.agent.name', 'agent.name',  -- 10..11 agent
            'gen_ai.operation.name',  -- 12..12 operation
            'openinference.span.kind', 'traceloop.span.kind', 'agentops.span.kind', 'llm.request.type',  -- 13..16 operation by kind
            'gen_ai.response.model', 'gen_ai.request.model', 'llm.model_name', 'embedding.model_name',  -- 17..20 model
            'server.address', 'gen_ai.openai.api_base', 'url.full',  -- 21..23 endpoint
            'gen_ai.response.finish_reasons', 'gen_ai.response.finish_reason', 'gen_ai.completion.0.finish_reason', 'llm.finish_reason',  -- 24..27 finish_reason
            'gen_ai.input.messages', 'gen_ai.prompt', 'gen_ai.tool.call.arguments', 'input.value', 'traceloop.entity.input', 'agentlightning.operation.input', 'agentops.entity.input',  -- 28..34 input
            'gen_ai.output.messages', 'gen_ai.completion', 'gen_ai.tool.call.result', 'output.value', 'traceloop.entity.output', 'agentlightning.operation.output', 'agentops.entity.output',  -- 35..41 output
            'gen_ai.usage.input_tokens', 'gen_ai.usage.prompt_tokens', 'llm.token_count.prompt',  -- 42..44 input_tokens
            'gen_ai.usage.output_tokens', 'gen_ai.usage.completion_tokens', 'llm.token_count.completion',  -- 45..47 output_tokens
            'fulgurite.resource',  -- 48..48 resource
            'fulgurite.prompt_token_ids', 'prompt_token_ids', 'llm.hosted_vllm.prompt_token_ids',  -- 49..51 prompt_token_ids
            'fulgurite.response_token_ids', 'response_token_ids', 'llm.hosted_vllm.response_token_ids',  -- 52..54 response_token_ids
            'fulgurite.logprobs', 'logprobs.content',  -- 55..56 logprobs
            'fulgurite.weight_versions',  -- 57..57 weight_versions
            'llm.response.model_name', 'llm.request.model_name',  -- 58..59 model
            'gen_ai.retrieval.query.text',  -- 60..60 input
            'gen_ai.retrieval.documents',  -- 61..61 output
            'reranker.model_name', 'reranker.query',  -- a reranker's, in place of 20 and 60, which it has not
            'gen_ai.prompt.0.role', 'gen_ai.prompt.0.content', 'gen_ai.completion.0.role', 'gen_ai.completion.0.content'  -- 62..62 numbered messages
        ],
        arrayMap(i -> bitShiftLeft(toUInt64(1), i), arrayConcat(range(62), [20, 60, 62, 62, 62, 62])),
        bitShiftLeft(toUInt64(1), 63)), attributes.key) AS bits,
    arrayReduce('groupBitOr', bits) AS mask,
    resource_attributes,
    scope_names,
    scope_texts,
    arrayMap(e -> (e.name, toInt64(e.time), text_map(e.attributes)), span_events) AS events,
    arrayMap(l -> (lower(hex(l.trace)), lower(hex(l.span)), text_map(l.attributes)), span_links) AS links,
    lost_attributes, lost_events, lost_links,
    if(around != '' AND (id = '' OR end < begin OR greatest(begin, end) >= 9223372036854775808
        OR arrayExists(e -> e.time >= 9223372036854775808, span_events)), as_otlp(concat(
        '{"resourceSpans":[', around, '{"traceId":"', lower(hex(trace)), '","spanId":"', lower(hex(id)),
        '","traceState":', toJSONString(trace_state), ',"parentSpanId":"', lower(hex(parent)),
        '","name":', toJSONString(toString(name)), ',"kind":', toString(kind), ',"startTimeUnixNano":"', toString(begin),
        '","endTimeUnixNano":"', toString(end), '","attributes":', toJSONString(attributes),
        ',"droppedAttributesCount":', toString(lost_attributes), ',"events":', toJSONString(span_events),
        ',"droppedEventsCount":', toString(lost_events), ',"links":[', arrayStringConcat(arrayMap(l -> concat(
            '{"traceId":"', lower(hex(l.trace)), '","spanId":"', lower(hex(l.span)), '","attributes":',
            toJSONString(l.attributes), '}'), span_links), ','),
        '],"droppedLinksCount":', toString(lost_links), ',"status":{"message":', toJSONString(status.message),
        ',"code":', toString(status.code), '}}]}]}]}')), '') AS whole
FROM
(
    SELECT
        _topic, _partition, _offset, _ts, key, _into, first,
        if(arrayExists((i, b, e, x) -> i = '' OR e < b OR greatest(b, e) >= 9223372036854775808
                OR arrayExists(one -> one.time >= 9223372036854775808, x),
            part.spans.id, part.spans.begin, part.spans.end, part.spans.events), concat(
            '{"resource":{"attributes":', toJSONString(resource.attributes), '},"scopeSpans":[{"scope":{"name":',
            toJSONString(part.scope.name), ',"version":', toJSONString(part.scope.version), '},"spans":['), '') AS around,
        text_map(resource.attributes) AS resource_attributes,
        arrayFilter((n, t) -> t != '', ['otel.scope.name', 'otel.scope.version'], [part.scope.name, part.scope.version])
            AS scope_names,
        arrayFilter(t -> t != '', [part.scope.name, part.scope.version]) AS scope_texts,
        part.spans.trace AS all_trace,
        part.spans.id AS all_id,
        part.spans.trace_state AS all_trace_state,
        part.spans.parent AS all_parent,
        part.spans.name AS all_name,
        part.spans.kind AS all_kind,
        part.spans.begin AS all_begin,
        part.spans.end AS all_end,
        part.spans.attributes AS all_attributes,
        part.spans.events AS all_events,
        part.spans.links AS all_links,
        part.spans.status AS all_status,
        part.spans.lost_attributes AS all_lost_attributes,
        part.spans.lost_events AS all_lost_events,
        part.spans.lost_links AS all_lost_links
    FROM in_otlp_spans
)
ARRAY JOIN
    all_trace AS trace,
    all_id AS id,
    all_trace_state AS trace_state,
    all_parent AS parent,
    all_name AS name,
    all_kind AS kind,
    all_begin AS begin,
    all_end AS end,
    all_attributes AS attributes,
    all_events AS span_events,
    all_links AS span_links,
    all_status AS status,
    all_lost_attributes AS lost_attributes,
    all_lost_events AS lost_events,
    all_lost_links AS lost_links,
    arrayEnumerate(all_id) AS number;

ALTER TABLE parse_otlp MODIFY QUERY
WITH
    bitAnd(mask, 287667426198290432) != 0 AS has_lists,
    m -> texts[indexOf(bits, bitAnd(bitAnd(mask, m), bitNot(bitAnd(mask, m)) + 1))] AS pick,
    mapFromArrays(arrayConcat(names, scope_names), arrayConcat(texts, scope_texts)) AS own,
    -- Older instrumentation of LLM calls spreads messages over attributes with numbers in their names.
    if(bitAnd(mask, 1152921538698149888) = 0 AND bitAnd(mask, 4611686018427510784) != 0,
        toJSONString(mapFilter((k, v) -> match(k, '^(gen_ai\\.prompt|llm\\.input_messages|llm\\.prompts)\\.[0-9]'), own)), pick(1152921538698149888)) AS input_text,
    if(bitAnd(mask, 2305847372900466688) = 0 AND bitAnd(mask, 4611686018427510784) != 0,
        toJSONString(mapFilter((k, v) -> match(k, '^(gen_ai\\.completion|llm\\.output_messages|llm\\.choices)\\.[0-9]'), own)), pick(2305847372900466688)) AS output_text,
    id = '' AND code = -2147483648 AS broken,
    if(has_lists, arrayMap(x -> if(startsWith(x, '{'), JSONExtractFloat(x, 'logprob'), toFloat64OrZero(x)),
        JSONExtractArrayRaw(pick(108086391056891904))), []) AS all_logprobs,
    if(has_lists, JSONExtract(pick(144115188075855872), 'Array(Tuple(version UInt64, start UInt64, end UInt64))'), [])
        AS all_versions
SELECT
    if(broken, trace_state, whole) AS raw,
    key,
    if(_message = '', '', 'bad_field') AS _reason,
    multiIf(
        broken, message,
        id = '', 'span_id: must not be empty',
        greatest(begin, end) >= 9223372036854775808, 'start_time_unix_nano, end_time_unix_nano: must be below 2^63',
        end < begin, 'end_time_unix_nano: is before start_time_unix_nano',
        arrayExists(e -> e.2 < 0, events), 'events: time_unix_nano: must be below 2^63',
        '') AS _message,
    multiIf(
        bitAnd(mask, 3) != 0, pick(3),
        resource_attributes['fulgurite.rollout_id'] != '', resource_attributes['fulgurite.rollout_id'],
        resource_attributes['agentlightning.rollout_id'] != '', resource_attributes['agentlightning.rollout_id'],
        bitAnd(mask, 12) != 0, pick(12),
        arrayFirst(l -> l.attributes['fulgurite.rollout_id'] != '', links).attributes['fulgurite.rollout_id']) AS rollout_id,
    multiIf(
        bitAnd(mask, 48) != 0, pick(48),
        resource_attributes['fulgurite.attempt_id'] != '', resource_attributes['fulgurite.attempt_id'],
        resource_attributes['agentlightning.attempt_id'] != '', resource_attributes['agentlightning.attempt_id'],
        bitAnd(mask, 192) != 0, pick(192),
        arrayFirst(l -> l.attributes['fulgurite.attempt_id'] != '', links).attributes['fulgurite.attempt_id']) AS attempt_id,
    toUInt64OrZero(multiIf(
        bitAnd(mask, 768) != 0, pick(768),
        resource_attributes['fulgurite.sequence_id'] != '', resource_attributes['fulgurite.sequence_id'],
        resource_attributes['agentlightning.span_sequence_id'])) AS sequence_id,
    lower(hex(trace)) AS trace_id,
    lower(hex(id)) AS span_id,
    lower(hex(parent)) AS parent_span_id,
    name,
    transform(o.kind, [2, 3, 4, 5], ['server', 'client', 'producer', 'consumer'], 'internal') AS kind,
    transform(code, [1, 2], ['ok', 'error'], 'unset') AS status,
    message AS status_message,
    toInt64(begin) AS start_ns,
    toInt64(end) AS end_ns,
    resource_attributes['service.name'] AS service,
    pick(3072) AS agent,
    if(bitAnd(mask, 4096) != 0, pick(4096), transform(
        lower(pick(122880)),
        ['llm', 'tool', 'agent', 'embedding', 'retriever', 'workflow', 'completion'],
        ['chat', 'execute_tool', 'invoke_agent', 'embeddings', 'retrieval', 'invoke_workflow', 'text_completion'],
        lower(pick(122880)))) AS operation,
    pick(281474976710656) AS resource,
    pick(864691128457101312) AS model,
    pick(14680064) AS endpoint,
    if(has_lists, JSONExtract(pick(3940649673949184), 'Array(UInt32)'), []) AS prompt_token_ids,
    if(has_lists, JSONExtract(replaceRegexpOne(pick(31525197391593472), '^\\[(\\[[^\\]]*\\]).*', '\\1'), 'Array(UInt32)'), [])
        AS response_token_ids,
    if(length(all_logprobs) = length(response_token_ids), all_logprobs, []) AS logprobs,
    if(arrayPushBack(all_versions.start, length(response_token_ids)) = arrayPushFront(all_versions.end, 0), all_versions, [])
        AS weight_versions,
    if(match(pick(251658240), '^\\["[^"]*"\\]$'), JSONExtractString(pick(251658240), 1),
        pick(251658240)) AS finish_reason,
    if(input_text = '{}', '', input_text) AS input,
    if(output_text = '{}', '', output_text) AS output,
    toUInt64OrZero(pick(30786325577728)) AS input_tokens,
    toUInt64OrZero(pick(246290604621824)) AS output_tokens,
    if(has_lists, mapFilter((k, v) -> NOT match(k, '^(fulgurite\\.|llm\\.hosted_vllm\\.)?(prompt_token_ids|response_token_ids)$|^fulgurite\\.(logprobs|weight_versions)$|^logprobs\\.content$'), own), own)
        AS attributes,
    resource_attributes,
    events,
    links,
    map() AS state,
    if(empty(weight_versions), NULL, arrayMin(weight_versions.version)) AS min_version,
    if(empty(weight_versions), NULL, arrayMax(weight_versions.version)) AS max_version,
    mapFilter((k, v) -> v NOT IN ('', '0'), map(
        'trace_state', trace_state, 'span_kind', if(o.kind BETWEEN 0 AND 5, '', toString(o.kind)),
        'status_code', if(code BETWEEN 0 AND 2, '', toString(code)),
        'dropped_attributes_count', toString(lost_attributes), 'dropped_events_count', toString(lost_events),
        'dropped_links_count', toString(lost_links))) AS extra,
    _topic, _partition, _offset, _index, fromUnixTimestamp64Milli(_ts, 'UTC') AS _ts, _into
FROM otlp_rows AS o;
