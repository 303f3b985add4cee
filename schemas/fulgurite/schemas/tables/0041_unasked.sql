-- Offsets without a record that Kafka could not be asked about in time, as while it was away: whoever has the partition
-- next asks, after a rebalance or a crash too.
--
-- ingest_log.unasked    ranges (lo, hi) up to this row's hi of which nobody knows yet whether Kafka has a record there: all of
--                       the partition, in the newest row with the highest hi. In rows of before, and in those of an older
--                       materialiser, empty
ALTER TABLE ingest_log ADD COLUMN IF NOT EXISTS unasked Array(Tuple(lo UInt64, hi UInt64)) CODEC(ZSTD(1));
