"""A load for the query benchmark: rows as the services' events become, made by ClickHouse itself.

100 spans a rollout; ids and times as the services make them (UUIDv7: rollouts sort by time). Of 100 spans 10 are LLM
calls with tokens, logprobs and versions, 10 are tools. Every 20th rollout had two attempts, the first of which failed;
1 % of spans and rewards were sent twice. A rollout's spans lie in four inserts, among those of 500 others. Everything
is a function of (rollout, span): the same size and the same end give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clickhouse_connect.driver import Client

SPANS_A_ROLLOUT = 100
ROLLOUTS_AN_INSERT = 500
STAGES = 4
"""Inserts over which the spans of a rollout spread."""
ROLLOUTS_A_STEP = 64
HOURS = 48
RUN = "run-1"
RARE_ATTRIBUTE = "fulgurite.error"
"""Of one span in 5,000."""

# What all rows of rollout `i` share.
_ROLLOUT = """
    toInt64({begin_ns} + i * {pause_ns}) AS at_ns,
    lower(leftPad(hex(intDiv(at_ns, 1000000)), 12, '0')) AS id_time,
    concat(id_time, '7', substring(lower(hex(sipHash128('rollout', i))), 1, 19)) AS rollout_id,
    concat(id_time, '7', substring(lower(hex(sipHash128('attempt', i, 1))), 1, 19)) AS attempt_1,
    concat(id_time, '7', substring(lower(hex(sipHash128('attempt', i, 2))), 1, 19)) AS attempt_2,
    i % 20 = 7 AS again,
    if(again, attempt_2, attempt_1) AS last_attempt,
    i % 50 = 11 AS failed,
    -- A step makes a version; half the agents still use the one before.
    toUInt64(greatest(0, toInt64(intDiv(i, {a_step})) - i % 2)) AS version,
    if(intDiv(i, 8) % 20 = 13, 'val', 'train') AS mode,
    concat('group-', toString(intDiv(i, 8))) AS group_id,
    concat('task-', toString(intDiv(i, 8) % 2000)) AS task_id,
    toFloat64(sipHash64('reward', i) % 1000 < 200 + intDiv(600 * i, {rollouts})) AS value,
    toUInt32(sipHash64(i) % 4) AS _partition
"""

_TOKENS = "(SELECT groupArray(toUInt32(pow(2, 17 * (sipHash64(number) % 65536) / 65536))) FROM numbers(70000)) AS text"
"""Small ids are frequent, as in a vocabulary. Prompts are pieces of it: those of later calls begin as the earlier."""

_SPANS = f"""
INSERT INTO spans (
    rollout_id, attempt_id, sequence_id, trace_id, span_id, parent_span_id, name, kind, status, status_message,
    start_ns, end_ns, service, agent, operation, resource, model, endpoint, prompt_token_ids, response_token_ids,
    logprobs, weight_versions, finish_reason, input, output, input_tokens, output_tokens, attributes,
    resource_attributes, min_version, max_version, _topic, _partition, _offset, _index, _ts)
WITH {_TOKENS}
SELECT
    rollout_id,
    if(again AND n < 40, attempt_1, last_attempt) AS attempt_id,
    n AS sequence_id,
    lower(hex(sipHash128(attempt_id))) AS trace_id,
    lower(hex(sipHash64(i, n))) AS span_id,
    if(n = root, '', lower(hex(sipHash64(i, if(turn = 0, root, n - turn))))) AS parent_span_id,
    multiIf(n = root, 'agent', turn = 0, 'turn', llm, 'chat policy', tool != '', concat('execute_tool ', tool),
        ['GET /search', 'POST /run', 'SELECT', 'parse', 'render', 'cache', 'retry'][turn - 2]) AS name,
    if(llm OR turn BETWEEN 3 AND 5, 'client', 'internal') AS kind,
    if(sipHash64('error', i, n) % 100 = 0, 'error', 'ok') AS status,
    if(status = 'error', 'timed out', '') AS status_message,
    at_ns + n * 600000000 + sipHash64('start', i, n) % 1000000 AS start_ns,
    start_ns + 1000000 + toInt64(exp2(sipHash64('took', i, n) % 31)) AS end_ns,
    multiIf(llm, 'gateway', tool != '' OR turn = 4, 'tools', turn = 3, 'search', turn = 5, 'database', 'runner')
        AS service,
    'solver' AS agent,
    multiIf(n = root, 'invoke_agent', llm, 'chat', tool != '', 'execute_tool', '') AS operation,
    if(llm, 'policy', '') AS resource,
    if(llm, 'policy-7b', '') AS model,
    if(llm, '/v1/chat/completions', '') AS endpoint,
    if(llm, arraySlice(text, 1 + sipHash64(i) % 60000, 200 + 2 * n), []) AS prompt_token_ids,
    if(llm, arrayMap(x -> toUInt32(exp2((sipHash64(i, n, x) % 65536) / 3856)), range(60 + sipHash64(i, n) % 80)), [])
        AS response_token_ids,
    arrayMap(t -> -toFloat64(sipHash64(t, i, n) % 1000000) / 400000, response_token_ids) AS logprobs,
    if(llm, [(version, toUInt64(0), toUInt64(length(response_token_ids)))], []) AS weight_versions,
    if(llm, 'stop', '') AS finish_reason,
    if(llm OR tool != '', concat('What is ', hex(sipHash128(i, n)), '? ', repeat('Think in steps. ', 6)), '') AS input,
    if(llm OR tool != '', concat('It is ', hex(sipHash128(n, i)), '. ', repeat('I thought so. ', 5)), '') AS output,
    length(prompt_token_ids) AS input_tokens,
    length(response_token_ids) AS output_tokens,
    mapFromArrays(
        arrayConcat(
            ['session.id', 'server.address', 'http.response.status_code', 'worker', 'task.difficulty', 'thread.id',
             'code.function.name', 'gen_ai.request.temperature', 'queue.seconds'],
            if(sipHash64('rare', i, n) % 5000 = 0, ['{RARE_ATTRIBUTE}'], ['note'])),
        [substring(rollout_id, 13), concat('10.0.', toString(i % 256), '.', toString(n)), '200',
         concat('runner-', toString(i % 64)), ['easy', 'hard'][i % 2 + 1], toString(sipHash64(i, n) % 100000),
         concat('agent.step_', toString(n)), '1.0', toString((sipHash64(n, i) % 10000) / 1000),
         repeat('x', 40 + sipHash64(i, n) % 40)]) AS attributes,
    map('service.name', service, 'host.name', concat('host-', toString(i % 64))) AS resource_attributes,
    if(llm, version, NULL) AS min_version,
    if(llm, version, NULL) AS max_version,
    'spans', _partition, intDiv({{first_row}} + row, 100), ({{first_row}} + row) % 100,
    fromUnixTimestamp64Nano(end_ns, 'UTC')
FROM
(
    SELECT
        *,
        rowNumberInAllBlocks() AS row,
        if(again AND n >= 40, 40, 0) AS root,
        n % 10 AS turn,
        turn = 1 AS llm,
        if(turn = 2, ['search', 'python', 'calculator', 'browser'][sipHash64('tool', i, n) % 4 + 1], '') AS tool
    FROM
    (
        SELECT toUInt64(signed_i) AS i, stage * {{a_stage}} + place % {{a_stage}} AS n, {_ROLLOUT}
        FROM
        (
            SELECT
                number AS place,
                toInt64(intDiv(number, {{a_stage}} * {{cohort}})) AS stage,
                {{first}} - stage * {{cohort}} + toInt64(intDiv(number, {{a_stage}}) % {{cohort}}) AS signed_i
            FROM numbers({SPANS_A_ROLLOUT} * {{cohort}})
            WHERE signed_i BETWEEN 0 AND {{rollouts}} - 1
        )
    )
    ARRAY JOIN range(if(sipHash64('twice', i, n) % 100 = 0, 2, 1)) AS time_sent
)
"""

_REWARDS = f"""
INSERT INTO rewards (
    reward_id, rollout_id, attempt_id, name, value, source, time_ns, _topic, _partition, _offset, _index, _ts)
SELECT
    lower(hex(sipHash128('reward', i, name))), rollout_id, last_attempt, name, if(name = 'reward', value, 1), 'solver',
    at_ns + 61000000000 AS time_ns, 'rewards', _partition, i * 4 + time_sent, name = 'format',
    fromUnixTimestamp64Nano(time_ns, 'UTC')
FROM (SELECT number AS i, {_ROLLOUT} FROM numbers({{first}}, {{count}}))
ARRAY JOIN ['reward', 'format'] AS name
ARRAY JOIN range(if(sipHash64('twice', i) % 100 = 0, 2, 1)) AS time_sent
WHERE NOT failed
"""

_EVENTS = f"""
INSERT INTO rollout_events (
    event, event_id, rollout_id, time_ns, run_id, task_id, group_id, group_size, mode, agent, input, attempt_id,
    sequence_id, worker_id, status, attempts, error, _topic, _partition, _offset, _ts)
SELECT
    e.1 AS event, lower(hex(sipHash128(event, i, e.2))), rollout_id, at_ns + e.2 * 1000000000 AS time_ns,
    if(event = 'queued', '{RUN}', ''), if(event = 'queued', task_id, ''), if(event = 'queued', group_id, ''),
    if(event = 'queued', 8, 0), if(event = 'queued', mode, ''), if(event = 'queued', 'solver', ''),
    if(event = 'queued', concat('{{{{"question":"', hex(sipHash128(i)), repeat(' and on', 30), '"}}}}'), '') AS input,
    multiIf(event IN ('queued', 'requeued'), '', again AND e.2 < 25, attempt_1, last_attempt) AS attempt_id,
    if(attempt_id = attempt_2, 2, attempt_id = attempt_1) AS sequence_id,
    if(event = 'attempt_started', concat('runner-', toString(i % 64)), ''),
    multiIf(event NOT LIKE '%finished', '', failed OR (again AND e.2 < 25), 'failed', 'succeeded') AS status,
    if(event = 'finished', 1 + again, 0), if(status = 'failed', 'timed out', ''),
    'rollouts', _partition, i * 16 + number, fromUnixTimestamp64Nano(time_ns, 'UTC')
FROM (SELECT number AS i, {_ROLLOUT} FROM numbers({{first}}, {{count}}))
ARRAY JOIN
    arrayConcat(
        [('queued', -5), ('attempt_started', 0), ('heartbeat', 10)],
        if(again, [('attempt_finished', 24), ('requeued', 24), ('attempt_started', 25)], []),
        [('heartbeat', 40), ('heartbeat', 50), ('attempt_finished', 62), ('finished', 63)]) AS e,
    arrayEnumerate(arrayConcat(range(if(again, 10, 7)))) AS number
"""

_TRAJECTORIES = f"""
INSERT INTO trajectories (
    rollout_id, attempt_id, run_id, task_id, group_id, group_size, mode, agent, status, error, sequences, rewards,
    reward, calls, min_version, max_version, queued_ns, finished_ns, assembled_ns, metadata, tokens, sampled_tokens,
    _topic, _partition, _offset, _ts)
WITH {_TOKENS}
SELECT
    rollout_id, last_attempt, '{RUN}', task_id, group_id, 8, mode, 'solver', if(failed, 'failed', 'succeeded'),
    if(failed, 'timed out', ''),
    if(failed, [], [(
        arraySlice(text, 1 + sipHash64(i) % 60000, 1200 + i % 400) AS token_ids,
        arrayMap(x -> toUInt8(x % 14 > 6), range(length(token_ids))) AS loss_mask,
        arrayMap((t, m) -> m * toFloat64(sipHash64(t, i) % 1000000) / -400000, token_ids, loss_mask),
        [(version, toUInt64(0), toUInt64(length(token_ids)))],
        arrayMap(n -> lower(hex(sipHash64(i, n))), range(1, 100, 10)), 'policy', 'solver', 'stop')]),
    if(failed, [], [(lower(hex(sipHash128('reward', i, 'reward'))), 'reward', value, '')]),
    if(failed, NULL, value), if(failed, 0, if(again, 6, 10)), if(failed, NULL, version), if(failed, NULL, version),
    at_ns - 5000000000, at_ns + 63000000000, at_ns + 64000000000 AS assembled_ns,
    map('sampling', if(mode = 'val', ['sampled', 'greedy'][i % 2 + 1], 'sampled')),
    if(failed, 0, length(token_ids)), if(failed, 0, arraySum(loss_mask)),
    'trajectories', _partition, i, fromUnixTimestamp64Nano(assembled_ns, 'UTC')
FROM (SELECT number AS i, {_ROLLOUT} FROM numbers({{first}}, {{count}}))
"""

_TRAINING = f"""
INSERT INTO training_events (
    event, event_id, run_id, time_ns, step, resource, version_in, version_out, rollout_ids, dropped, groups, tokens,
    reward_mean, loss, metrics, offsets, _topic, _partition, _offset, _ts)
SELECT
    'step', lower(hex(sipHash128('step', step))), '{RUN}', max(at_ns) + 70000000000 AS time_ns,
    intDiv(i, {{a_step}}) AS step,
    'policy', step, step + 1, groupArrayIf(rollout_id, why = ''), groupArrayIf((rollout_id, why), why != ''),
    uniqExact(group_id), 100000, avg(value), 0.5 / (1 + step), map('kl', 0.01, 'clip_fraction', 0.1, 'entropy', 2.),
    map('0', step, '1', step, '2', step, '3', step), 'training', 0, step, fromUnixTimestamp64Nano(time_ns, 'UTC')
FROM
(
    SELECT number AS i, {_ROLLOUT}, multiIf(failed, 'failed', sipHash64('stale', i) % 30 = 0, 'stale',
        intDiv(i, 8) % 9 = 4, 'zero_variance', '') AS why
    FROM numbers({{rollouts}})
)
WHERE mode = 'train'
GROUP BY step
"""

_RESOURCES = """
INSERT INTO resources (
    event_id, resource, version, kind, uri, sha256, run_id, step, model, time_ns, _topic, _offset, _ts)
SELECT
    lower(hex(sipHash128('version', number))), 'policy', number, 'weights', concat('file:///policy/', toString(number)),
    lower(hex(SHA256(toString(number)))), 'run-1', number, 'policy-7b',
    toInt64({begin_ns} + number * {a_step} * {pause_ns}) AS at_ns, 'resources', number,
    fromUnixTimestamp64Nano(at_ns, 'UTC')
FROM numbers(intDiv({rollouts}, {a_step}) + 1)
"""

_ONE_PART = {
    "max_threads": 1,
    "max_insert_threads": 1,
    "max_block_size": 100_000,
    "min_insert_block_size_rows": 2**40,
    "min_insert_block_size_bytes": 0,
}


@dataclass(frozen=True)
class Load:
    """What is in the tables, for who asks."""

    spans: int
    end_ns: int

    @property
    def rollouts(self) -> int:
        return self.spans // SPANS_A_ROLLOUT

    @property
    def numbers(self) -> dict[str, int]:
        pause_ns = HOURS * 3_600_000_000_000 // self.rollouts
        # The last spans end about now.
        begin_ns = self.end_ns - pause_ns * self.rollouts - 60_000_000_000
        return {"rollouts": self.rollouts, "begin_ns": begin_ns, "pause_ns": pause_ns, "a_step": ROLLOUTS_A_STEP}

    def insert_spans(self, client: Client) -> Iterator[None]:
        """One insert at a time: as large as the materialiser's."""
        numbers = {**self.numbers, "cohort": ROLLOUTS_AN_INSERT, "a_stage": SPANS_A_ROLLOUT // STAGES}
        inserts = -(-self.rollouts // ROLLOUTS_AN_INSERT) + STAGES - 1
        for insert in range(inserts):
            first_row = insert * 2 * SPANS_A_ROLLOUT * ROLLOUTS_AN_INSERT
            sql = _SPANS.format(**numbers, first=insert * ROLLOUTS_AN_INSERT, first_row=first_row)
            client.command(sql, settings=_ONE_PART)
            yield

    def insert_rest(self, client: Client) -> Iterator[None]:
        """Rewards, rollouts' lives, trajectories, in inserts of 5,000 rollouts; then steps and versions."""
        for first in range(0, self.rollouts, 5_000):
            for sql in (_REWARDS, _EVENTS, _TRAJECTORIES):
                count = min(5_000, self.rollouts - first)
                client.command(sql.format(**self.numbers, first=first, count=count), settings=_ONE_PART)
            yield
        for sql in (_TRAINING, _RESOURCES):
            client.command(sql.format(**self.numbers), settings=_ONE_PART)
