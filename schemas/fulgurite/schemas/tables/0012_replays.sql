-- What was done about dead letters, and what came of it. Written by `fulgurite dlq`, readable by anyone.
--
-- dead_letter_actions   append-only, one row for every step of a mend or a replay:
--                         mended     `value` is to be sent in place of the original bytes; `how` says what was done to them
--                         intended   about to be sent to to_topic, to_partition, at or after to_offset
--                         sent       acknowledged: it lies at to_offset
--                         withdrawn  it was not sent and will not be
--                       topic, partition, offset, index are the dead letter's, as in dead_letter_records. A step of a mend
--                       has the mend's id as action_id, a step of a replay the replay's, and in mend_id which mend it sends.
-- dead_letter_verdicts  every row of dead_letters with the place of the record (or line) it is about: that of the original,
--                       or that of the dead letter itself where there never was an original.
-- dead_letter_records   one row for every such record, however many readers refused it. Ask for few of them.
-- dead_letter_replays   one row for every replay: what was sent where, and what became of it: the tables that have it
--                       now, and the reasons for which it is a dead letter again. Empty both: not read yet.
--
-- replay_log            what `fulgurite replay` does: for every partition `begun` with its range lo..hi (hi excluded), a
--                       `part` for every piece lo..hi that is done, at last `done`, `withdrawn` or `abandoned`.
CREATE TABLE IF NOT EXISTS dead_letter_actions
(
    topic LowCardinality(String),
    partition Int32,
    offset Int64,
    `index` UInt32,
    action LowCardinality(String),
    action_id String,
    mend_id String,
    value String CODEC(ZSTD(3)),
    how String CODEC(ZSTD(1)),
    to_topic LowCardinality(String),
    to_partition Int32 DEFAULT -1,
    to_offset Int64 DEFAULT -1,
    who LowCardinality(String),
    at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = MergeTree
ORDER BY (topic, partition, offset, `index`, at)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE VIEW IF NOT EXISTS dead_letter_verdicts AS
SELECT
    if(placed, d.topic, d._topic) AS topic,
    if(placed, d.partition, toInt32(d._partition)) AS partition,
    if(placed, d.offset, toInt64(d._offset)) AS offset,
    d._index AS `index`,
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

CREATE VIEW IF NOT EXISTS dead_letter_records AS
SELECT
    v.topic AS topic,
    v.partition AS partition,
    v.offset AS offset,
    v.`index` AS `index`,
    -- Of several readers that refused it the materialiser speaks first: its words are the most exact.
    argMin(v.stage, (v.stage != 'materialiser', -toInt64(v._offset))) AS stage,
    argMin(v.reason, (v.stage != 'materialiser', -toInt64(v._offset))) AS reason,
    argMin(v.message, (v.stage != 'materialiser', -toInt64(v._offset))) AS message,
    arraySort(groupUniqArray((toString(v.stage), toString(v.reason), v.message))) AS verdicts,
    argMin(v.original_topic, (v.stage != 'materialiser', -toInt64(v._offset))) AS original_topic,
    argMin(v.key, (v.stage != 'materialiser', -toInt64(v._offset))) AS key,
    argMin(v.value, (v.stage != 'materialiser', -toInt64(v._offset))) AS value,
    min(v.time) AS first_time,
    max(v.time) AS time
FROM dead_letter_verdicts AS v
GROUP BY v.topic, v.partition, v.offset, v.`index`;

CREATE VIEW IF NOT EXISTS dead_letter_replays AS
SELECT
    r.topic AS topic,
    r.partition AS partition,
    r.offset AS offset,
    r.`index` AS `index`,
    r.replay_id AS replay_id,
    r.state AS state,
    r.mend_id AS mend_id,
    r.intended_at AS intended_at,
    r.sent_at AS sent_at,
    r.who AS who,
    r.to_topic AS to_topic,
    r.to_partition AS to_partition,
    r.to_offset AS to_offset,
    t.tables AS tables,
    d.verdicts AS verdicts
FROM
(
    SELECT
        a.topic AS topic, a.partition AS partition, a.offset AS offset, a.`index` AS `index`, a.action_id AS replay_id,
        multiIf(countIf(a.action = 'sent') > 0, 'sent', countIf(a.action = 'withdrawn') > 0, 'withdrawn', 'intended') AS state,
        any(a.mend_id) AS mend_id,
        minIf(a.at, a.action = 'intended') AS intended_at,
        maxIf(a.at, a.action = 'sent') AS sent_at,
        any(a.who) AS who,
        any(a.to_topic) AS to_topic,
        any(a.to_partition) AS to_partition,
        if(state = 'sent', maxIf(a.to_offset, a.action = 'sent'), minIf(a.to_offset, a.action = 'intended')) AS to_offset
    FROM dead_letter_actions AS a
    WHERE a.action != 'mended'
    GROUP BY a.topic, a.partition, a.offset, a.`index`, a.action_id
) AS r
LEFT JOIN
(
    SELECT at_topic, at_partition, at_offset, arraySort(groupUniqArray(place)) AS tables
    FROM
    (
        SELECT _topic AS at_topic, toInt32(_partition) AS at_partition, toInt64(_offset) AS at_offset, place
        FROM
        (
            SELECT _topic, _partition, _offset, 'spans' AS place FROM spans
            UNION ALL SELECT _topic, _partition, _offset, 'rewards' FROM rewards
            UNION ALL SELECT _topic, _partition, _offset, 'rollout_events' FROM rollout_events
            UNION ALL SELECT _topic, _partition, _offset, 'trajectories' FROM trajectories
            UNION ALL SELECT _topic, _partition, _offset, 'training_events' FROM training_events
        )
        -- The index on _offset makes this quick.
        WHERE _offset IN (SELECT toUInt64(to_offset) FROM dead_letter_actions WHERE action = 'sent')
    )
    WHERE (at_topic, at_partition, at_offset) IN (
        SELECT toString(to_topic), to_partition, to_offset FROM dead_letter_actions WHERE action = 'sent')
    GROUP BY at_topic, at_partition, at_offset
) AS t ON t.at_topic = r.to_topic AND t.at_partition = r.to_partition AND t.at_offset = r.to_offset AND r.state = 'sent'
LEFT JOIN
(
    SELECT topic, partition, offset, arraySort(groupUniqArray((toString(stage), toString(reason), message))) AS verdicts
    FROM dead_letters
    WHERE offset IN (SELECT to_offset FROM dead_letter_actions WHERE action = 'sent')
    GROUP BY topic, partition, offset
) AS d ON d.topic = r.to_topic AND d.partition = r.to_partition AND d.offset = r.to_offset AND r.state = 'sent';

CREATE TABLE IF NOT EXISTS replay_log
(
    replay_id String,
    _topic LowCardinality(String),
    _partition UInt32,
    state LowCardinality(String),
    lo UInt64,
    hi UInt64,
    rebuild Bool,
    asked String,
    who LowCardinality(String),
    at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = MergeTree
ORDER BY (_topic, replay_id, _partition, at)
SETTINGS non_replicated_deduplication_window = 1000;
