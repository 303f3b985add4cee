-- training_events.again   rollouts that a window had again: named by an earlier step, and trained on here too (windows that
--                         slide). Of the record's unknown fields, where parse_training has put it.
-- window_members          one row for every rollout and window that trained on it; is_again is 1 for all but the first.
ALTER TABLE training_events ADD COLUMN IF NOT EXISTS again Array(String) ALIAS JSONExtract(extra['again'], 'Array(String)');

CREATE VIEW IF NOT EXISTS window_members AS
SELECT
    run_id, step, version_in, version_out, member.1 AS rollout_id, member.2 AS is_again
FROM
(
    -- A step is published once, but a record that was sent again counts once.
    SELECT run_id, step, version_in, version_out, rollout_ids, again
    FROM training_events
    WHERE event = 'step'
    ORDER BY _offset DESC
    LIMIT 1 BY run_id, step
)
ARRAY JOIN arrayConcat(arrayMap(r -> (r, 0), rollout_ids), arrayMap(r -> (r, 1), again)) AS member;
