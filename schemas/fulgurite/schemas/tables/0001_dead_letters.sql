-- dead_letters: one row for every record that could not be used, with its bytes unchanged: what the materialiser could not
-- parse (stage `materialiser`), and every record of the topic `dead_letters` (what assembler, gateway, trainer, … refused).
--
--   topic, partition, offset   where the original record lay; offset -1 and no topic when it never was a record
--   stage, reason, message     who could not use it; a word to group by (empty, not_json, bad_field, …); what is wrong
--   key, value                 the original bytes
--   _index                     the line of the record, from 0, where a record holds several (spans, rewards); `value` is that line
--   _topic … _ingested         where the record lay that made this row: the original itself, or one of topic `dead_letters`
--
-- ingest_log: what the materialiser has inserted: one row for every range lo..hi of offsets it finished. It resumes after
-- the highest hi, and skips what it finds of later offsets in the tables. `records` are those inserted with this range.
CREATE TABLE IF NOT EXISTS dead_letters
(
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    stage LowCardinality(String),
    reason LowCardinality(String),
    message String CODEC(ZSTD(1)),
    key String CODEC(ZSTD(1)),
    value String CODEC(ZSTD(3)),
    _index UInt32 CODEC(T64, ZSTD(1)),
    _topic LowCardinality(String),
    _partition UInt32 CODEC(T64, ZSTD(1)),
    _offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    _ts DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    _ingested DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1))
)
ENGINE = MergeTree
ORDER BY (_topic, _partition, _offset)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE TABLE IF NOT EXISTS in_dead_letters
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

-- Headers as fulgurite.schemas.dead_letters names them. Anything readable is taken: a dead letter has nowhere else to go.
CREATE MATERIALIZED VIEW IF NOT EXISTS dead_letters_mv TO dead_letters AS
SELECT
    headers['__connect.errors.topic'] AS topic,
    ifNull(toInt32OrNull(headers['__connect.errors.partition']), -1) AS partition,
    ifNull(toInt64OrNull(headers['__connect.errors.offset']), -1) AS offset,
    headers['__connect.errors.stage'] AS stage,
    headers['__connect.errors.exception.class.name'] AS reason,
    headers['__connect.errors.exception.message'] AS message,
    key,
    raw AS value,
    _topic,
    _partition,
    _offset,
    _ts
FROM in_dead_letters;

CREATE TABLE IF NOT EXISTS ingest_log
(
    _topic LowCardinality(String),
    _partition UInt32,
    lo UInt64 CODEC(DoubleDelta, ZSTD(1)),
    hi UInt64 CODEC(DoubleDelta, ZSTD(1)),
    records UInt64 CODEC(T64, ZSTD(1)),
    consumer LowCardinality(String),
    at DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1))
)
ENGINE = MergeTree
ORDER BY (_topic, _partition, lo);
