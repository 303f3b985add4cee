-- resources: one row for every record of the topic `resources`: every version of every policy that was ever announced.
--
-- Columns are the fields of fulgurite.schemas.resources.ResourceVersion; time is time_ns as DateTime64(9); extra, _topic …
-- as in spans. The topic is compacted, this table is not: it keeps the history (of what was read before compaction).

CREATE TABLE IF NOT EXISTS in_resources
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

CREATE TABLE IF NOT EXISTS resources
(
    event_id String CODEC(ZSTD(1)),
    resource LowCardinality(String),
    version UInt64 CODEC(T64, ZSTD(1)),
    kind LowCardinality(String),
    uri String CODEC(ZSTD(1)),
    sha256 String CODEC(ZSTD(1)),
    run_id LowCardinality(String),
    step UInt64 CODEC(T64, ZSTD(1)),
    model LowCardinality(String),
    time_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    metadata Map(LowCardinality(String), String),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(time_ns, 'UTC')
)
ENGINE = MergeTree
ORDER BY (resource, version, _offset)
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_resources: every record once, parsed once, with what is wrong with it; feeds resources and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_resources
(
    raw String,
    key String,
    _reason LowCardinality(String),
    _message String,
    event_id String,
    resource LowCardinality(String),
    version UInt64,
    kind LowCardinality(String),
    uri String,
    sha256 String,
    run_id LowCardinality(String),
    step UInt64,
    model LowCardinality(String),
    time_ns Int64,
    metadata Map(LowCardinality(String), String),
    extra Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

-- An insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements. `odd` are the top-level fields whose (name, kind of JSON) is not listed: mistyped, or unknown and kept.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_resources TO parsed_resources AS
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
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'event_id', 'resource', 'version', 'kind', 'uri', 'sha256', 'run_id', 'step', 'model', 'time_ns',
            'metadata'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'event_id "', 'resource "', 'version 1', 'kind "', 'uri "', 'sha256 "', 'run_id "', 'step 1',
                'model "', 'time_ns 1', 'metadata {'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    event_id String, resource String, version UInt64, kind String, uri String, sha256 String,
                    run_id String, step UInt64, model String, time_ns Int64, metadata Map(String, String))') AS f
            FROM in_resources
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS resources_mv TO resources AS
SELECT
    event_id, resource, version, kind, uri, sha256, run_id, step, model, time_ns, metadata, extra, _topic,
    _partition, _offset, _ts
FROM parsed_resources
WHERE _reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS resources_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _topic, _partition, _offset, _ts
FROM parsed_resources
WHERE _reason != '';
