"""One rollout as a tree, asked from ClickHouse: attempts, spans with times, tokens and versions, rewards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.tree import Tree

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

MAX_SPANS = 1_000
MAX_REWARDS = 100
MAX_TEXT_CHARS = 100

Row = Mapping[str, Any]

_ROLLOUT = """
SELECT rollout_id, status, mode, run_id, task_id, group_id, agent, input, attempts, attempt_id, error,
       queued_ns, started_ns, finished_ns
FROM rollouts WHERE rollout_id = {rollout_id:String}
"""
_SPANS = f"""
SELECT attempt_id, span_id, parent_span_id, name, operation, status, status_message, start_ns, end_ns, input, output,
       length(prompt_token_ids) AS prompt_tokens, length(response_token_ids) AS response_tokens, finish_reason,
       if(empty(logprobs), NULL, arrayAvg(logprobs)) AS logprob, min_version, max_version
FROM spans WHERE rollout_id = {{rollout_id:String}} ORDER BY start_ns, sequence_id
LIMIT 1 BY attempt_id, span_id LIMIT {MAX_SPANS}
"""
_REWARDS = f"""
SELECT attempt_id, span_id, name, value, source
FROM rewards WHERE rollout_id = {{rollout_id:String}} ORDER BY time_ns LIMIT 1 BY reward_id LIMIT {MAX_REWARDS}
"""
_COUNTS = """
SELECT (SELECT uniqExact(attempt_id, span_id) FROM spans WHERE rollout_id = {rollout_id:String}) AS spans,
       (SELECT uniqExact(reward_id) FROM rewards WHERE rollout_id = {rollout_id:String}) AS rewards
"""


def rollout_tree(client: Client, rollout_id: str) -> Tree | None:
    """None where ClickHouse knows nothing of it. `client` is connected to our database, without a session."""
    with ThreadPoolExecutor(3) as pool:  # most of a short question's time is planning, on one core each
        asked = (_ROLLOUT, _SPANS, _REWARDS)
        rollout, spans, rewards = pool.map(lambda sql: _rows(client, sql, rollout_id), asked)
    if not rollout and not spans:
        return None
    tree = Tree(_rollout_label(rollout_id, rollout[0] if rollout else {}))
    attempts = list(dict.fromkeys([row["attempt_id"] for row in (*spans, *rewards)]))
    for number, attempt in enumerate(attempts, start=1):
        counts = bool(rollout) and rollout[0]["attempt_id"] == attempt
        branch = tree.add(f"[bold]attempt {number}[/] {escape(attempt)}{' [green](counts)[/]' if counts else ''}")
        _add_attempt(
            branch,
            [row for row in spans if row["attempt_id"] == attempt],
            [row for row in rewards if row["attempt_id"] == attempt],
        )
    if len(spans) >= MAX_SPANS or len(rewards) >= MAX_REWARDS:
        _add_rest(tree, _rows(client, _COUNTS, rollout_id)[0], len(spans), len(rewards))
    return tree


def _add_rest(tree: Tree, counts: Row, spans: int, rewards: int) -> None:
    """What is not shown, so that nobody takes a part for the whole."""
    left = {"spans": counts["spans"] - spans, "rewards": counts["rewards"] - rewards}
    said = [f"{number:,} more {what}" for what, number in left.items() if number > 0]
    if said:
        tree.add(f"[yellow]… {' and '.join(said)}, later ones:[/] ask for them with fulgurite sql")


def _rows(client: Client, sql: str, rollout_id: str) -> list[Row]:
    return list(client.query(sql, parameters={"rollout_id": rollout_id}).named_results())


def _add_attempt(branch: Tree, spans: Sequence[Row], rewards: Sequence[Row]) -> None:
    known = {row["span_id"] for row in spans}
    children: dict[str, list[Row]] = defaultdict(list)
    for row in spans:
        # A parent outside this rollout (the caller's own trace) is no node here; a span is never its own parent.
        parent = row["parent_span_id"]
        children[parent if parent in known and parent != row["span_id"] else ""].append(row)
    by_span: dict[str, list[Row]] = defaultdict(list)
    for row in rewards:
        by_span[row["span_id"] if row["span_id"] in known else ""].append(row)
    begin = min((row["start_ns"] for row in spans), default=0)
    pending: list[tuple[Tree, Row]] = [(branch, row) for row in reversed(children.pop("", []))]
    while pending:
        parent_branch, row = pending.pop()
        node = parent_branch.add(_span_label(row, begin))
        for reward in by_span[row["span_id"]]:
            node.add(_reward_label(reward))
        pending += [(node, child) for child in reversed(children.pop(row["span_id"], []))]
    for row in (row for rest in children.values() for row in rest):  # parents in a circle
        branch.add(_span_label(row, begin))
    for reward in by_span[""]:
        branch.add(_reward_label(reward))


def _rollout_label(rollout_id: str, row: Row) -> str:
    if not row:
        return f"[bold]rollout[/] {escape(rollout_id)} [yellow](nobody announced it)[/]"
    took = _seconds(row["finished_ns"] - row["queued_ns"]) if row["finished_ns"] else "not ended"
    parts = [f"{name} {row[name]}" for name in ("mode", "run_id", "task_id", "agent") if row[name]]
    status = _coloured(row["status"])
    text = f"[bold]rollout[/] {escape(rollout_id)}: {status} in {took} [dim]{escape(', '.join(parts))}[/]"
    if row["input"]:
        text += f"\n[dim]task[/] {escape(_short(row['input']))}"
    return text + (f"\n[red]{escape(_short(row['error']))}[/]" if row["error"] else "")


def _span_label(row: Row, begin: int) -> str:
    took = f"[dim]+{_seconds(row['start_ns'] - begin)}, took {_seconds(row['end_ns'] - row['start_ns'])}[/]"
    text = f"[cyan]{escape(row['name'])}[/] {took}"
    if row["response_tokens"]:
        versions = _versions(row["min_version"], row["max_version"])
        logprob = f", mean logprob {row['logprob']:.3f}" if row["logprob"] is not None else ""
        text += f" [magenta]{row['prompt_tokens']} → {row['response_tokens']} tokens, {versions}{logprob}[/]"
    if row["status"] == "error":
        text += f" [red]error {escape(_short(row['status_message']))}[/]"
    for mark, field in (("in ", "input"), ("out", "output")):
        if row[field]:
            text += f"\n[dim]{mark}[/] {escape(_short(row[field]))}"
    return text


def _reward_label(row: Row) -> str:
    source = f" [dim]from {escape(row['source'])}[/]" if row["source"] else ""
    return f"[yellow]{escape(row['name'])} = {row['value']:g}[/]{source}"


def _versions(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return "version unknown"
    return f"version {low}" if low == high else f"versions {low} to {high}"


def _coloured(status: str) -> str:
    colour = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}.get(status, "blue")
    return f"[{colour}]{escape(status)}[/]"


def _seconds(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds:.1f} s"


def _short(text: str) -> str:
    """One line, its end cut where it is long: the end of a prompt is what was asked last."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT_CHARS else "…" + line[-MAX_TEXT_CHARS:]
