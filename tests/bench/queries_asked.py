"""The questions of the query benchmark, as a user asks them: tables and views as they are documented.

{rollout_id:String} and the like are ClickHouse's query parameters; queries.py gives a question one argument at a time.
A table holds what was sent twice twice: where that would count, the question says LIMIT 1 BY.
"""

from __future__ import annotations

from dataclasses import dataclass

from queries_load import RARE_ATTRIBUTE


@dataclass(frozen=True)
class Question:
    """`sql` is empty for what `fulgurite trace` shows, which asks three."""

    key: str
    words: str
    sql: str
    target_seconds: float | None = None
    may_be_none: bool = False


_SPAN = "span_id, parent_span_id, name, service, status, start_time, duration_ns, attributes"
_LAST_HOUR = "start_time > fromUnixTimestamp64Nano({since_ns:Int64}, 'UTC')"
_TIMESTAMP = "Timestamp > fromUnixTimestamp64Nano({since_ns:Int64}, 'UTC')"
_THAT_HOUR = (
    "start_time >= fromUnixTimestamp64Nano({hour_ns:Int64}, 'UTC') "
    "AND start_time < fromUnixTimestamp64Nano({hour_ns:Int64} + 3600000000000, 'UTC')"
)

QUESTIONS = (
    Question("rollout_tree", "one rollout as a tree (fulgurite trace)", "", 0.05),
    Question(
        "rollout_spans",
        "one rollout's spans",
        f"SELECT {_SPAN} FROM spans WHERE rollout_id = {{rollout_id:String}} "
        "ORDER BY start_ns LIMIT 1 BY attempt_id, span_id",
    ),
    Question(
        "rollout_reward",
        "one rollout's reward, versions, calls",
        "SELECT * FROM rollout_rewards WHERE rollout_id = {rollout_id:String}",
    ),
    Question("llm_calls", "one rollout's LLM calls", "SELECT * FROM llm_calls WHERE rollout_id = {rollout_id:String}"),
    Question("why", "what became of one rollout", "SELECT * FROM ledger WHERE rollout_id = {rollout_id:String}"),
    Question(
        "trace",
        "one trace by its id",
        f"SELECT {_SPAN} FROM spans WHERE trace_id = {{trace_id:String}} ORDER BY start_ns LIMIT 1 BY span_id",
    ),
    Question("otel_trace", "one trace in otel_traces", "SELECT * FROM otel_traces WHERE TraceId = {trace_id:String}"),
    Question(
        "otel_search",
        "otel_traces: newest 100 of a service, last hour",
        f"SELECT * FROM otel_traces WHERE {_TIMESTAMP} AND ServiceName = 'tools' ORDER BY Timestamp DESC LIMIT 100",
    ),
    Question("reward_by_version", "reward by version, all rollouts", "SELECT * FROM reward_by_version", 0.3),
    Question(
        "rewards_by_hour",
        "rewards by hour and name",
        "SELECT toStartOfHour(time) AS hour, name, count(), avg(value) FROM "
        "(SELECT time, name, value FROM rewards LIMIT 1 BY reward_id) GROUP BY ALL ORDER BY ALL",
    ),
    Question(
        "newest_rollouts",
        "newest 100 rollouts",
        "SELECT rollout_id, status, mode, attempts, queued_time FROM rollouts ORDER BY queued_time DESC LIMIT 100",
    ),
    Question(
        "newest_rewards",
        "newest 100 rollouts with reward and calls",
        "SELECT * FROM rollout_rewards ORDER BY queued_time DESC LIMIT 100 "
        "SETTINGS enable_join_runtime_filters_index_analysis = 1",
    ),
    Question("steps", "the last 100 steps", "SELECT * FROM steps ORDER BY step DESC LIMIT 100"),
    Question("why_dropped", "why rollouts were dropped", "SELECT * FROM why_dropped"),
    Question(
        "llm_calls_of_version",
        "LLM calls one version sampled",
        "SELECT rollout_id, response_token_ids, logprobs FROM llm_calls WHERE min_version = {version:UInt64}",
    ),
    Question(
        "errors",
        "errors by service, last hour",
        f"SELECT service, count() FROM spans WHERE {_LAST_HOUR} AND status = 'error' GROUP BY service",
    ),
    Question(
        "slowest_tools",
        "tools by their p99, one hour",
        f"SELECT name, count(), quantile(0.99)(duration_ns) AS p99 FROM spans "
        f"WHERE {_THAT_HOUR} AND operation = 'execute_tool' GROUP BY name ORDER BY p99 DESC",
    ),
    Question(
        "slowest_tools_ever",
        "tools by their p99, all spans",
        "SELECT name, count(), quantile(0.99)(duration_ns) AS p99 FROM spans "
        "WHERE operation = 'execute_tool' GROUP BY name ORDER BY p99 DESC",
    ),
    Question(
        "attribute",
        "spans with an attribute's value, one hour",
        f"SELECT {_SPAN} FROM spans WHERE {_THAT_HOUR} AND attributes['session.id'] = {{session:String}}",
    ),
    Question(
        "attribute_ever",
        "spans with an attribute's value, all spans",
        f"SELECT {_SPAN} FROM spans WHERE attributes['session.id'] = {{session:String}}",
    ),
    Question(
        "rare_attribute",
        "spans that have a rare attribute, one hour",
        f"SELECT {_SPAN} FROM spans WHERE {_THAT_HOUR} AND mapContains(attributes, '{RARE_ATTRIBUTE}')",
        may_be_none=True,
    ),
)
