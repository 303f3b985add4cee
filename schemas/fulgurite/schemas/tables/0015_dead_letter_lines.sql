-- dead_letters.line: which line of the original record, from 0, a dead letter is: (topic, partition, offset, line) is the
-- place of what was refused. `_index` is, as everywhere, the line of the record that made the row: for what the materialiser
-- itself refuses the same number, for a record of the topic `dead_letters` 0, while its header __connect.errors.line (absent:
-- 0) names the line of the original. Rows of before, and those of a materialiser that knows nothing of it, have their _index.
ALTER TABLE dead_letters ADD COLUMN IF NOT EXISTS line UInt32 DEFAULT _index CODEC(T64, ZSTD(1)) AFTER offset;

ALTER TABLE dead_letters_mv MODIFY QUERY
SELECT
    headers['__connect.errors.topic'] AS topic,
    ifNull(toInt32OrNull(headers['__connect.errors.partition']), -1) AS partition,
    ifNull(toInt64OrNull(headers['__connect.errors.offset']), -1) AS offset,
    ifNull(toUInt32OrNull(headers['__connect.errors.line']), 0) AS line,
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

-- As in 0012, with the line of the original as `index`: what several readers refused of a line is one dead letter.
CREATE OR REPLACE VIEW dead_letter_verdicts AS
SELECT
    if(placed, d.topic, d._topic) AS topic,
    if(placed, d.partition, toInt32(d._partition)) AS partition,
    if(placed, d.offset, toInt64(d._offset)) AS offset,
    d.line AS `index`,
    d.stage AS stage,
    d.reason AS reason,
    d.message AS message,
    d.topic AS original_topic,
    d.key AS key,
    d.value AS value,
    d._ts AS time,
    d._offset AS _offset
FROM
(
    SELECT *, topic != '' AND partition >= 0 AND offset >= 0 AS placed FROM dead_letters
) AS d;
