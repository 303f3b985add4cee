"""Which of the chosen dead letters are sent again, and which are refused with what reason; then sends them.

Safe to run twice, and at the same time: see sending.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulgurite.infra.dlq import actions
from fulgurite.infra.dlq.actions import INTENDED, SENT, Mend, Replay
from fulgurite.infra.dlq.letters import PLACES_PER_QUERY, Letter, Place, short_id
from fulgurite.infra.dlq.mending import validate
from fulgurite.infra.dlq.rules import Outgoing, outgoing, rollouts_of
from fulgurite.infra.dlq.sending import (
    INTENT_SECONDS,
    Checkpoint,
    NotSent,
    Sender,
    Sent,
    no_checkpoint,
    settle,
)
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.settings import KafkaSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client


@dataclass(frozen=True, slots=True)
class Refused:
    """One letter that is not sent."""

    letter: Letter
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    send: Sequence[Outgoing]
    refused: Sequence[Refused]
    known: Collection[str]
    """The replays, by their ids, that this plan reckons with: any other is a rival."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator wants in spite of what speaks against it."""

    again: bool = False
    """Also what was sent already."""
    force: bool = False
    """Also what would probably be refused again."""
    intent_seconds: float = INTENT_SECONDS


async def plan(kafka: KafkaSettings, client: Client, letters: Sequence[Letter], wishes: Wishes) -> Plan:
    """Settles what earlier replays left open (0), then decides. Writes nothing else."""
    places = [letter.place for letter in letters]
    earlier = actions.replays(client, places)
    dead = [r for found in earlier.values() for r in found if _is_dead(r, wishes)]
    if dead:
        await settle(kafka, client, dead)
        earlier = actions.replays(client, places)
    mends = actions.mends(client, places)
    known = _known_rollouts(kafka, client, letters, mends)
    send: list[Outgoing] = []
    refused: list[Refused] = []
    for letter in letters:
        why = _done_before(kafka, earlier.get(letter.place, []), wishes)
        if not why:
            out = outgoing(kafka, letter, mends.get(letter.place), known, force=wishes.force)
            if isinstance(out, Outgoing):
                send.append(out)
                continue
            why = out.why + (" (or --force)" if out.force_helps else "")
        refused.append(Refused(letter, why))
    return Plan(send, refused, {r.replay_id for found in earlier.values() for r in found})


async def carry_out(
    kafka: KafkaSettings,
    client: Client,
    planned: Plan,
    report: Callable[[Sequence[Sent | NotSent]], None],
    checkpoint: Checkpoint = no_checkpoint,
) -> None:
    """Sends what is planned. Raises Unfinished."""
    if planned.send:
        async with Sender(kafka, client, planned.known, checkpoint) as sender:
            await sender.send(planned.send, report)


def became(kafka: KafkaSettings, replay: Replay) -> str:
    """What a replay came to, in a few words."""
    if replay.state == INTENDED:
        return f"begun {replay.age_seconds:.0f} s ago, not ended"
    if replay.state != SENT:
        return "not sent"
    verdicts = ", ".join(f"{reason} ({stage})" for stage, reason, _ in replay.verdicts)
    rows = f"a row of {' and '.join(replay.tables)}" if replay.tables else ""
    again = f"a dead letter again: {verdicts}" if verdicts else ""
    now = "; ".join(text for text in (rows, again) if text) or "not read by the materialiser yet"
    return f"{short_id(kafka, replay.to)}: {now}"


def _is_dead(replay: Replay, wishes: Wishes) -> bool:
    return replay.state == INTENDED and replay.age_seconds > wishes.intent_seconds


def _done_before(kafka: KafkaSettings, earlier: Sequence[Replay], wishes: Wishes) -> str:
    for replay in earlier:
        if replay.state == INTENDED:
            left = wishes.intent_seconds - replay.age_seconds
            return (
                f"{replay.who} began to replay it {replay.age_seconds:.0f} s ago; if that process is gone, "
                f"try again in {max(1.0, left):.0f} s"
            )
    if wishes.again:
        return ""
    for replay in earlier:
        if replay.state == SENT:
            text = f"it was replayed at {replay.sent_at:%Y-%m-%d %H:%M:%S} as {became(kafka, replay)}"
            if replay.verdicts:
                return f"{text}. Mend and replay that one, or use --again"
            return f"{text} (--again sends it once more)"
    return ""


def _known_rollouts(
    kafka: KafkaSettings, client: Client, letters: Sequence[Letter], mends: Mapping[Place, Mend]
) -> set[str]:
    """Those announced by now, of the rollouts that letters were refused for being unknown."""
    asked: set[str] = set()
    for letter in letters:
        if any(reason == "unknown_rollout" for _, reason, _ in letter.verdicts):
            mend = mends.get(letter.place)
            try:
                value = mend.value if mend else letter.value
                asked |= rollouts_of(validate(kafka, letter.original_topic, value, is_record=letter.is_record))
            except InvalidEvent:
                continue
    known: set[str] = set()
    names = sorted(asked)
    for start in range(0, len(names), PLACES_PER_QUERY):
        result = client.query(
            "SELECT DISTINCT rollout_id FROM rollout_events "
            "WHERE event = 'queued' AND rollout_id IN {ids:Array(String)}",
            parameters={"ids": names[start : start + PLACES_PER_QUERY]},
        )
        known |= {str(row[0]) for row in result.result_rows}
    return known
