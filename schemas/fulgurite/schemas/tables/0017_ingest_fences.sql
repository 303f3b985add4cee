-- ingest_fences: which materialiser may insert the records of a partition: the one that wrote the greatest fence. A fence is
-- an epoch of twelve digits, then who took it, then something random, so that two that are taken at once differ. Each
-- insert of the materialiser carries its fences and refuses itself where there is a greater one. One row a partition once
-- parts are merged; rows of before are lower and do no harm. Nobody deletes from it.
CREATE TABLE IF NOT EXISTS ingest_fences
(
    _topic LowCardinality(String),
    _partition UInt32,
    fence SimpleAggregateFunction(max, String)
)
ENGINE = AggregatingMergeTree
ORDER BY (_topic, _partition);
