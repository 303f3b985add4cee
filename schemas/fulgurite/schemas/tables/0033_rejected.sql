-- in_rejected: where the materialiser writes a record that no table takes, as its row of dead_letters. It stores nothing; the
-- view hands the row on, so that rules of redaction hold for it as for every other dead letter.
CREATE TABLE IF NOT EXISTS in_rejected
(
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    stage LowCardinality(String),
    reason LowCardinality(String),
    message String,
    key String,
    value String,
    _topic LowCardinality(String),
    _partition UInt32,
    _offset UInt64,
    _ts DateTime64(3, 'UTC')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS rejected_mv TO dead_letters AS
SELECT topic, partition, offset, stage, reason, message, key, value, _topic, _partition, _offset, _ts
FROM in_rejected;
