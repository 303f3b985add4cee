-- trajectories: one row for every record of the topic `trajectories`: ended rollouts, joined, ready to train on.
--
-- Columns are the fields of fulgurite.schemas.trajectories.Trajectory (sequences.token_ids is an array of arrays), and:
--   tokens          tokens of all sequences
--   sampled_tokens  those of them that a policy sampled (loss_mask 1)
--   queued_time, finished_time, assembled_time   the *_ns columns as DateTime64(9); extra, _topic … as in spans
-- The assembler writes a rollout once, in a transaction. Append-only all the same.

CREATE TABLE IF NOT EXISTS in_trajectories
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

CREATE TABLE IF NOT EXISTS trajectories
(
    rollout_id String CODEC(ZSTD(1)),
    attempt_id String CODEC(ZSTD(1)),
    run_id LowCardinality(String),
    task_id String CODEC(ZSTD(1)),
    group_id String CODEC(ZSTD(1)),
    group_size UInt64 CODEC(T64, ZSTD(1)),
    mode LowCardinality(String),
    agent LowCardinality(String),
    status LowCardinality(String),
    error String CODEC(ZSTD(1)),
    partial LowCardinality(String),
    sequences Array(Tuple(token_ids Array(UInt32), loss_mask Array(UInt8), logprobs Array(Float64), weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)), span_ids Array(String), resource String, agent String, finish_reason String)) CODEC(ZSTD(1)),
    rewards Array(Tuple(reward_id String, name String, value Float64, span_id String)) CODEC(ZSTD(1)),
    reward Nullable(Float64) CODEC(ZSTD(1)),
    calls UInt64 CODEC(T64, ZSTD(1)),
    min_version Nullable(UInt64) CODEC(T64, ZSTD(1)),
    max_version Nullable(UInt64) CODEC(T64, ZSTD(1)),
    queued_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    finished_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    assembled_ns Int64 CODEC(DoubleDelta, ZSTD(1)),
    metadata Map(LowCardinality(String), String),
    tokens UInt64 CODEC(ZSTD(1)),
    sampled_tokens UInt64 CODEC(ZSTD(1)),
    extra Map(String, String) CODEC(ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1)),
    queued_time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(queued_ns, 'UTC'),
    finished_time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(finished_ns, 'UTC'),
    assembled_time DateTime64(9, 'UTC') ALIAS fromUnixTimestamp64Nano(assembled_ns, 'UTC'),
    INDEX offsets _offset TYPE minmax GRANULARITY 1
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(_ts)
ORDER BY (rollout_id, _offset)
SETTINGS non_replicated_deduplication_window = 10000;

-- parsed_trajectories: every record once, parsed once, with what is wrong with it; feeds trajectories and dead_letters, stores nothing.
CREATE TABLE IF NOT EXISTS parsed_trajectories
(
    raw String,
    key String,
    _reason LowCardinality(String),
    _message String,
    rollout_id String,
    attempt_id String,
    run_id LowCardinality(String),
    task_id String,
    group_id String,
    group_size UInt64,
    mode LowCardinality(String),
    agent LowCardinality(String),
    status LowCardinality(String),
    error String,
    partial LowCardinality(String),
    sequences Array(Tuple(token_ids Array(UInt32), loss_mask Array(UInt8), logprobs Array(Float64), weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)), span_ids Array(String), resource String, agent String, finish_reason String)),
    rewards Array(Tuple(reward_id String, name String, value Float64, span_id String)),
    reward Nullable(Float64),
    calls UInt64,
    min_version Nullable(UInt64),
    max_version Nullable(UInt64),
    queued_ns Int64,
    finished_ns Int64,
    assembled_ns Int64,
    metadata Map(LowCardinality(String), String),
    tokens UInt64,
    sampled_tokens UInt64,
    extra Map(String, String),
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

-- An insert analyses this query anew, so it is written to be short to analyse: nested, no expression twice, no tuple
-- elements. `odd` are the top-level fields whose (name, kind of JSON) is not listed: mistyped, or unknown and kept.
CREATE MATERIALIZED VIEW IF NOT EXISTS parse_trajectories TO parsed_trajectories AS
SELECT
    raw,
    key,
    multiIf(_message = '', '', raw = '', 'empty', is_json, 'bad_field', 'not_json') AS _reason,
    multiIf(
        NOT is_json, if(raw = '', 'the record has no value', 'the record is not JSON in UTF-8'),
        NOT startsWith(trimLeft(raw), '{'), 'the record: must be an object',
        mistyped != '', concat(mistyped, ': wrong type, see its JSON Schema'),
        NOT hasAll(names, ['rollout_id', 'status']), concat(arrayFirst(n -> NOT has(names, n), ['rollout_id', 'status']), ': required and missing'),
        f.rollout_id = '',
            'rollout_id: must not be empty',
        NOT has(['', 'train', 'val', 'test'], f.mode),
            'mode: must be one of train, val, test',
        NOT has(['succeeded', 'failed', 'cancelled'], f.status),
            'status: must be one of succeeded, failed, cancelled',
        arrayExists(s -> length(s.loss_mask) != length(s.token_ids) OR length(s.logprobs) != length(s.token_ids), f.sequences),
            'sequences: token_ids, loss_mask and logprobs must have one length',
        '') AS _message,
    f.rollout_id AS rollout_id,
    f.attempt_id AS attempt_id,
    f.run_id AS run_id,
    f.task_id AS task_id,
    f.group_id AS group_id,
    if(has(names, 'group_size'), f.group_size, 1) AS group_size,
    if(f.mode = '', 'train', f.mode) AS mode,
    f.agent AS agent,
    f.status AS status,
    f.error AS error,
    f.partial AS partial,
    f.sequences AS sequences,
    f.rewards AS rewards,
    f.reward AS reward,
    f.calls AS calls,
    f.min_version AS min_version,
    f.max_version AS max_version,
    f.queued_ns AS queued_ns,
    f.finished_ns AS finished_ns,
    f.assembled_ns AS assembled_ns,
    f.metadata AS metadata,
    arraySum(s -> length(s.token_ids), f.sequences) AS tokens,
    arraySum(s -> arraySum(s.loss_mask), f.sequences) AS sampled_tokens,
    mapFromArrays(odd.1, odd.2) AS extra,
    _topic, _partition, _offset, _ts
FROM
(
    SELECT
        * EXCEPT (f),
        untuple(f) AS f,
        arrayFirst(n -> n IN (
            'rollout_id', 'attempt_id', 'run_id', 'task_id', 'group_id', 'group_size', 'mode', 'agent',
            'status', 'error', 'partial', 'sequences', 'rewards', 'reward', 'calls', 'min_version',
            'max_version', 'queued_ns', 'finished_ns', 'assembled_ns', 'metadata'
        ), odd.1) AS mistyped
    FROM
    (
        SELECT
            *,
            fields.1 AS names,
            arrayFilter(x -> concat(x.1, ' ', multiIf(
                toUInt64OrNull(x.2) < 9223372036854775808, '1', toFloat64OrNull(x.2) IS NOT NULL, '.', substring(x.2, 1, 1))) NOT IN (
                'rollout_id "', 'attempt_id "', 'run_id "', 'task_id "', 'group_id "', 'group_size 1',
                'mode "', 'agent "', 'status "', 'error "', 'partial "', 'sequences [', 'rewards [',
                'reward 1', 'reward .', 'reward n', 'calls 1', 'min_version 1', 'min_version n',
                'max_version 1', 'max_version n', 'queued_ns 1', 'finished_ns 1', 'assembled_ns 1',
                'metadata {'
            ), fields) AS odd
        FROM
        (
            SELECT
                *,
                isValidJSON(raw) AS is_json,
                JSONExtractKeysAndValuesRaw(raw) AS fields,
                JSONExtract(raw, 'Tuple(
                    rollout_id String, attempt_id String, run_id String, task_id String, group_id String,
                    group_size UInt64, mode String, agent String, status String, error String, partial String,
                    sequences Array(Tuple(token_ids Array(UInt32), loss_mask Array(UInt8), logprobs Array(Float64), weight_versions Array(Tuple(version UInt64, start UInt64, end UInt64)), span_ids Array(String), resource String, agent String, finish_reason String)),
                    rewards Array(Tuple(reward_id String, name String, value Float64, span_id String)),
                    reward Nullable(Float64), calls UInt64, min_version Nullable(UInt64),
                    max_version Nullable(UInt64), queued_ns Int64, finished_ns Int64, assembled_ns Int64,
                    metadata Map(String, String))') AS f
            FROM in_trajectories
        )
    )
);

CREATE MATERIALIZED VIEW IF NOT EXISTS trajectories_mv TO trajectories AS
SELECT
    rollout_id, attempt_id, run_id, task_id, group_id, group_size, mode, agent, status, error, partial,
    sequences, rewards, reward, calls, min_version, max_version, queued_ns, finished_ns, assembled_ns,
    metadata, tokens, sampled_tokens, extra, _topic, _partition, _offset, _ts
FROM parsed_trajectories
WHERE _reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS trajectories_dead_mv TO dead_letters AS
SELECT
    _topic AS topic, _partition AS partition, _offset AS offset, 'materialiser' AS stage,
    _reason AS reason, _message AS message,
    key, raw AS value, _topic, _partition, _offset, _ts
FROM parsed_trajectories
WHERE _reason != '';
