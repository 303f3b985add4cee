"""Dead letters on a terminal, and as JSON lines for scripts."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from fulgurite.infra.cli_common import console, say
from fulgurite.infra.dlq.actions import SENT, Mend, Replay
from fulgurite.infra.dlq.letters import Group, Letter, Place, short_id
from fulgurite.infra.dlq.mending import difference, readable
from fulgurite.infra.dlq.replaying import Plan, Refused, became
from fulgurite.infra.dlq.sending import NotSent, Sent
from fulgurite.schemas.settings import KafkaSettings

MAX_VALUE_CHARS = 4_000
MAX_MESSAGE_CHARS = 120
MAX_LINES = 50
"""Of one kind, on a terminal; the rest is counted."""


def print_json(items: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    for item in items:
        console.out(json.dumps(item, ensure_ascii=False, default=_plain), highlight=False)


def letter_json(kafka: KafkaSettings, letter: Letter, *, with_bytes: bool = False) -> dict[str, Any]:
    item: dict[str, Any] = {
        "id": short_id(kafka, letter.place),
        **asdict(letter.place),
        "original_topic": letter.original_topic,
        "stage": letter.stage,
        "reason": letter.reason,
        "message": letter.message,
        "first_time": letter.first_time,
        "time": letter.time,
    }
    if with_bytes:
        item["verdicts"] = [dict(zip(("stage", "reason", "message"), v, strict=True)) for v in letter.verdicts]
        item |= _bytes("key", letter.key) | _bytes("value", letter.value)
    return item


def replay_json(kafka: KafkaSettings, replay: Replay) -> dict[str, Any]:
    sent = replay.state == SENT
    return {
        "id": short_id(kafka, replay.place),
        "replay_id": replay.replay_id,
        "state": replay.state,
        "mended": bool(replay.mend_id),
        "who": replay.who,
        "intended_at": replay.intended_at,
        "sent_at": replay.sent_at if sent else None,
        "to": short_id(kafka, replay.to) if sent else None,
        "tables": replay.tables,
        "verdicts": [dict(zip(("stage", "reason", "message"), v, strict=True)) for v in replay.verdicts],
    }


def letters_table(
    kafka: KafkaSettings, letters: Sequence[Letter], mends: Mapping[Place, Mend], replays: Mapping[Place, list[Replay]]
) -> Table:
    table = Table(
        Column("id", no_wrap=True), Column("time", no_wrap=True), "stage", "reason", "message", "what became of it"
    )
    for letter in letters:
        table.add_row(
            escape(short_id(kafka, letter.place)),
            _time(letter.time),
            escape(letter.stage),
            escape(letter.reason),
            escape(_cut(letter.message)),
            _fate(kafka, letter.place, mends, replays),
        )
    return table


def groups_table(kafka: KafkaSettings, groups: Sequence[Group]) -> Table:
    table = Table("topic", "stage", "reason", Column("count", justify="right"), "first", "last", "example", "message")
    for group in groups:
        table.add_row(
            *(escape(text) for text in (group.topic, group.stage, group.reason)),
            f"{group.count:,}",
            _time(group.first_time),
            _time(group.last_time),
            escape(short_id(kafka, group.example)),
            escape(_cut(group.message)),
        )
    return table


def replays_table(kafka: KafkaSettings, replays: Sequence[Replay]) -> Table:
    table = Table(Column("id", no_wrap=True), "when", "by", "bytes", "what became of it")
    for replay in replays:
        table.add_row(
            escape(short_id(kafka, replay.place)),
            _time(replay.sent_at if replay.state == SENT else replay.intended_at),
            escape(replay.who),
            "mended" if replay.mend_id else "original",
            _became(kafka, replay),
        )
    return table


def show(
    kafka: KafkaSettings,
    letter: Letter,
    mend: Mend | None,
    replays: Sequence[Replay],
    origins: Sequence[Replay],
    *,
    full: bool,
) -> None:
    """Everything about one."""
    say(f"[bold]{escape(short_id(kafka, letter.place))}[/]  {escape(letter.place.header())}")
    grid = Table.grid(padding=(0, 2))
    grid.add_row("belongs to", escape(letter.original_topic or "no topic: it never was a record"))
    place = letter.place
    where = f"{place.topic}, partition {place.partition}, offset {place.offset}, line {place.index} (the first is 0)"
    grid.add_row("lies in", escape(where))
    times = _time(letter.first_time)
    grid.add_row("time", times if letter.first_time == letter.time else f"{times} to {_time(letter.time)}")
    for stage, reason, message in letter.verdicts:
        grid.add_row(f"refused by {escape(stage)}", f"[red]{escape(reason)}[/]: {escape(message)}")
    grid.add_row("key", escape(_text(letter.key)) if letter.key else "[dim]none[/]")
    for origin in origins:
        grid.add_row("is a replay of", f"{escape(short_id(kafka, origin.place))} [dim]by {escape(origin.who)}[/]")
    console.print(grid)
    say(f"[bold]bytes[/] [dim]({len(letter.value)})[/]")
    text = readable(letter.value) if letter.value else "(none)"
    cut = not full and len(text) > MAX_VALUE_CHARS
    console.out(text[:MAX_VALUE_CHARS] + "\n… (--full shows all)" if cut else text, highlight=False)
    if mend is not None:
        say(f"[bold]mended[/] {_time(mend.at)} by {escape(mend.who)}: {escape(mend.how)}")
        print_difference(letter.value, mend.value)
    say("[bold]what became of it[/]" + ("" if replays else " nothing yet: it waits"))
    for replay in replays:
        when = _time(replay.sent_at if replay.state == SENT else replay.intended_at)
        what = "mended bytes" if replay.mend_id else "original bytes"
        say(f"  {when} {what}, by {escape(replay.who)}: {_became(kafka, replay)}")
        for stage, reason, message in replay.verdicts:
            say(f"    [red]{escape(reason)}[/] ({escape(stage)}): {escape(message)}")


def print_difference(before: bytes, after: bytes) -> None:
    for line in difference(before, after):
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
        say(f"  [{colour}]{escape(line)}[/]")


def print_sent(kafka: KafkaSettings, results: Sequence[Sent | NotSent], before: int, *, as_json: bool) -> None:
    """What was just sent, or not; on a terminal up to MAX_LINES lines, counting those before."""
    if as_json:
        print_json(_result_json(kafka, result) for result in results)
        return
    for result in results[: max(0, MAX_LINES - before)]:
        place = escape(short_id(kafka, result.outgoing.letter.place))
        if isinstance(result, Sent):
            say(f"[green]{place}[/] is {escape(short_id(kafka, result.to))} now")
        else:
            say(f"[red]{place}[/] was not sent: {escape(result.why)}")


def print_refused(kafka: KafkaSettings, refused: Sequence[Refused]) -> None:
    for item in refused[:MAX_LINES]:
        say(f"[yellow]{escape(short_id(kafka, item.letter.place))}[/] refused: {escape(item.why)}")
    if len(refused) > MAX_LINES:
        more = Counter(item.letter.reason for item in refused[MAX_LINES:])
        words = ", ".join(f"{count} {reason}" for reason, count in more.most_common())
        say(f"[yellow]… and {len(refused) - MAX_LINES} more[/] ({escape(words)})")


def print_outcome(
    kafka: KafkaSettings, plan: Plan, results: Sequence[Sent | NotSent], *, dry_run: bool, as_json: bool
) -> int:
    """The end of a replay; gives how many were sent."""
    sent = sum(isinstance(result, Sent) for result in results)
    if as_json:
        failed = [(item.letter, item.why) for item in plan.refused]
        failed += [(out.letter, "dry run") for out in plan.send if dry_run]
        print_json({"id": short_id(kafka, letter.place), "sent": False, "why": why} for letter, why in failed)
        return sent
    print_refused(kafka, plan.refused)
    would = f"{len(plan.send)} would be sent" if dry_run else f"{sent} sent"
    say(f"{would}, {len(plan.refused) + len(results) - sent} refused.")
    return sent


def _result_json(kafka: KafkaSettings, result: Sent | NotSent) -> dict[str, Any]:
    name = short_id(kafka, result.outgoing.letter.place)
    if isinstance(result, Sent):
        return {"id": name, "sent": True, "to": short_id(kafka, result.to)}
    return {"id": name, "sent": False, "why": result.why}


def _fate(
    kafka: KafkaSettings, place: Place, mends: Mapping[Place, Mend], replays: Mapping[Place, list[Replay]]
) -> str:
    found = replays.get(place, [])
    if found:
        return _became(kafka, found[0]) + (f" [dim]({len(found)} replays)[/]" if len(found) > 1 else "")
    return "[cyan]mended, waits[/]" if place in mends else "[dim]waits[/]"


def _became(kafka: KafkaSettings, replay: Replay) -> str:
    colour = "yellow" if replay.state != SENT else "red" if replay.verdicts else "green" if replay.tables else "cyan"
    return f"[{colour}]{escape(became(kafka, replay))}[/]"


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.hex(" ")


def _bytes(name: str, data: bytes) -> dict[str, str]:
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else str(value)
