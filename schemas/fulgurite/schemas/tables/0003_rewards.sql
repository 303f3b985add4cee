-- rewards: one row for every reward of the topic `rewards`.
--
-- Columns are the fields of fulgurite.schemas.rewards.Reward; time is time_ns as DateTime64(9); extra, _topic … as in spans.
-- A reward that came without reward_id (or time_ns) has its place in the log (its Kafka time) instead.
-- Append-only. The same reward_id sent twice makes two rows; the views (rollout_rewards, …) count it once.

CREATE TABLE IF NOT EXISTS in_rewards
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

CREATE TABLE IF NOT EXISTS rewards
(
    reward_id String CODEC(ZSTD(1)),
    rollout_id String CODEC(ZSTD(1)),
    attempt_id String CODEC(ZSTD(1)),
    span_id String CODEC(ZSTD(1)),
    name LowCardinality(String),
    value Float64 CODEC(ZSTD(1)),
    dimensions Map(LowCardinality(String), Float64) CODEC(ZSTD(1)),
    source LowCardinality(String),
    time_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    metadata Map(LowCardinality(String), String),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _index UInt32 CODEC(T64, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(time_ns, 'UTC'),
    INDEX offsets _offset TYPE minmax GRANULARITY 1
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(_ts)
ORDER BY (rollout_id, attempt_id, name, reward_id)
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_rewards: every line once, parsed once, with what is wrong with it; feeds rewards and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_rewards
(
    raw String,
    key LowCardinality(String),
    _reason LowCardinality(String),
    _message String,
    reward_id String,
    rollout_id String,
    attempt_id String,
    span_id String,
    name LowCardinality(String),
    value Float64,
    dimensions Map(LowCardinality(String), Float64),
    source LowCardinality(String),
    time_ns Int64,
    metadata Map(LowCardinality(String), String),
    extra Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _index UInt32,
    _ts DateTime64(3, 'UTC'),
    _into UInt8
)
ENGINE = Null;

-- An insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements. `odd` are the top-level fields whose (name, kind of JSON) is not listed: mistyped, or unknown and kept.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_rewards TO parsed_rewards AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['rollout_id', 'value']), concat(arrayFirst(n -> NOT has(names, n), ['rollout_id', 'value']), ': required and missing'),
        f.rollout_id = '',
            'rollout_id: must not be empty',
        has(mapValues(f.dimensions), NULL),
            'dimensions: every value must be a finite number',
        '') AS _message,
    if(f.reward_id = '', concat(_topic, '-', toString(_partition), '-', toString(_offset), if(_index = 0, '', concat('-', toString(_index)))), f.reward_id) AS reward_id,
    f.rollout_id AS rollout_id,
    f.attempt_id AS attempt_id,
    f.span_id AS span_id,
    if(has(names, 'name'), f.name, 'reward') AS name,
    f.value AS value,
    mapApply((k, v) -> (k, ifNull(v, 0)), f.dimensions) AS dimensions,
    f.source AS source,
    if(has(names, 'time_ns'), f.time_ns, toUnixTimestamp64Milli(_ts) * 1000000) AS time_ns,
    f.metadata AS metadata,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _index, _ts, _into
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'reward_id', 'rollout_id', 'attempt_id', 'span_id', 'name', 'value', 'dimensions', 'source',
            'time_ns', 'metadata'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'reward_id "', 'rollout_id "', 'attempt_id "', 'span_id "', 'name "', 'value 1', 'value .',
                'dimensions {', 'source "', 'time_ns 1', 'metadata {'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    reward_id String, rollout_id String, attempt_id String, span_id String, name String,
                    value Float64, dimensions Map(String, Nullable(Float64)), source String, time_ns Int64,
                    metadata Map(String, String))') AS f
            FROM in_rewards
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS rewards_mv TO rewards AS
SELECT
    reward_id, rollout_id, attempt_id, span_id, name, value, dimensions, source, time_ns, metadata, extra,
    _topic, _partition, _offset, _index, _ts
FROM parsed_rewards
WHERE _reason = '' AND bitTest(_into, 0);

CREATE MATERIALIZED VIEW IF NOT EXISTS rewards_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _index, _topic, _partition, _offset, _ts
FROM parsed_rewards
WHERE _reason != '' AND bitTest(_into, 1);
