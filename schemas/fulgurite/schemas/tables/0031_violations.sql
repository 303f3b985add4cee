-- Violations of rules (section compliance of the settings), which the aggregator records as negative rewards.
--
-- violations            one row each: which rule of which version, which span, which characters of which field, what it cost;
--                       and the oldest version of the policy that sampled a token of the rollout. Found twice it counts once
-- violations_by_rule    (rule, rules_version, run, policy version) -> violations, rollouts that have one, of how many, cost
CREATE OR REPLACE VIEW violations AS
SELECT
    w.rollout_id AS rollout_id,
    w.attempt_id AS attempt_id,
    w.span_id AS span_id,
    w.metadata['rule'] AS rule,
    w.metadata['rules_version'] AS rules_version,
    w.metadata['field'] AS field,
    toUInt64OrZero(w.metadata['start']) AS start,
    toUInt64OrZero(w.metadata['end']) AS end,
    w.metadata['text'] AS text,
    -w.value AS cost,
    t.run_id AS run_id,
    t.agent AS agent,
    t.min_version AS version,
    fromUnixTimestamp64Nano(w.time_ns, 'UTC') AS time
FROM
(
    SELECT rollout_id, attempt_id, span_id, metadata, value, time_ns
    FROM rewards
    WHERE source = 'compliance' AND name = 'compliance'
    ORDER BY _offset, _index
    LIMIT 1 BY reward_id
) AS w
LEFT JOIN rollout_versions AS t ON t.rollout_id = w.rollout_id;

CREATE OR REPLACE VIEW violations_by_rule AS
SELECT
    v.rule AS rule,
    v.rules_version AS rules_version,
    v.run_id AS run_id,
    v.version AS version,
    count() AS violations,
    uniqExact(v.rollout_id) AS rollouts,
    any(t.rollouts) AS of_rollouts,
    sum(v.cost) AS cost
FROM violations AS v
LEFT JOIN
(
    SELECT run_id, min_version, count() AS rollouts
    FROM rollout_versions
    GROUP BY run_id, min_version
) AS t ON t.run_id = v.run_id AND t.min_version IS NOT DISTINCT FROM v.version
GROUP BY rule, rules_version, run_id, version
ORDER BY rule, rules_version, run_id, version;
