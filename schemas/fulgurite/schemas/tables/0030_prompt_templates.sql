-- resources.content: the text of a version that is one (kind prompt_template); empty where files are meant.
--
-- parse_resources, resources_mv   as in 0006_resources.sql, with it
ALTER TABLE resources ADD COLUMN IF NOT EXISTS content String CODEC(ZSTD(1)) AFTER metadata;

ALTER TABLE parsed_resources ADD COLUMN IF NOT EXISTS content String AFTER metadata;

ALTER TABLE resources_mv MODIFY QUERY
SELECT
    event_id, resource, version, kind, uri, sha256, run_id, step, model, time_ns, metadata, content, extra, _topic,
    _partition, _offset, _ts
FROM parsed_resources
WHERE _reason = '';

ALTER TABLE parse_resources MODIFY QUERY
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['resource', 'version', 'uri', 'sha256']), concat(arrayFirst(n -> NOT has(names, n), ['resource', 'version', 'uri', 'sha256']), ': required and missing'),
        f.resource = '',
            'resource: must not be empty',
        NOT has(['', 'weights', 'lora', 'prompt_template', 'endpoint'], f.kind),
            'kind: must be one of weights, lora, prompt_template, endpoint',
        NOT match(f.sha256, '^[0-9a-f]{64}$'),
            'sha256: 64 hexadecimal digits are required',
        '') AS _message,
    f.event_id AS event_id,
    f.resource AS resource,
    f.version AS version,
    if(f.kind = '', 'weights', f.kind) AS kind,
    f.uri AS uri,
    f.sha256 AS sha256,
    f.run_id AS run_id,
    f.step AS step,
    f.model AS model,
    if(has(names, 'time_ns'), f.time_ns, toUnixTimestamp64Milli(_ts) * 1000000) AS time_ns,
    f.metadata AS metadata,
    f.content AS content,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'event_id', 'resource', 'version', 'kind', 'uri', 'sha256', 'run_id', 'step', 'model', 'time_ns',
            'metadata', 'content'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'event_id "', 'resource "', 'version 1', 'kind "', 'uri "', 'sha256 "', 'run_id "', 'step 1',
                'model "', 'time_ns 1', 'metadata {', 'content "'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    event_id String, resource String, version UInt64, kind String, uri String, sha256 String,
                    run_id String, step UInt64, model String, time_ns Int64, metadata Map(String, String), content String)') AS f
            FROM in_resources
        )
    )
);
