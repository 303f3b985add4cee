"""Mends chosen dead letters, shows each change, refuses what is still wrong, and writes the others down.

A mend always begins at the original bytes: the same command run again writes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from fulgurite.infra.cli_common import say
from fulgurite.infra.dlq import actions, screens
from fulgurite.infra.dlq.actions import MENDED, Step
from fulgurite.infra.dlq.letters import Letter, short_id
from fulgurite.infra.dlq.mending import MendError, Mending, validate
from fulgurite.infra.dlq.replaying import Refused
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.ids import new_id
from fulgurite.schemas.settings import KafkaSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

MAX_DIFFS = 10
"""Shown; the others are only checked."""
WRITE_LETTERS = 200
WRITE_BYTES = 16 * 1024 * 1024


def mend_all(
    kafka: KafkaSettings,
    client: Client,
    letters: Sequence[Letter],
    mending: Mending,
    how: str,
    *,
    dry_run: bool,
    as_json: bool,
) -> list[Refused]:
    """Gives those that stay as they are, with the reason."""
    good: list[tuple[Letter, bytes]] = []
    refused: list[Refused] = []
    for letter in letters:
        try:
            value = _mended(kafka, letter, mending)
        except (MendError, InvalidEvent) as error:
            refused.append(Refused(letter, str(error)))
        else:
            good.append((letter, value))
    if not dry_run:
        _write(client, good, how)
    if as_json:
        screens.print_json(
            [{"id": short_id(kafka, one.place), "mended": True, "value": value.decode()} for one, value in good]
            + [{"id": short_id(kafka, one.letter.place), "mended": False, "why": one.why} for one in refused]
        )
        return refused
    for letter, value in good[:MAX_DIFFS]:
        say(f"[green]{escape(short_id(kafka, letter.place))}[/]")
        screens.print_difference(letter.value, value)
    if len(good) > MAX_DIFFS:
        say(f"[dim]… and {len(good) - MAX_DIFFS} more[/]")
    screens.print_refused(kafka, refused)
    say(f"{len(good)} {'would be mended' if dry_run else 'mended'}, {len(refused)} refused.")
    return refused


def _mended(kafka: KafkaSettings, letter: Letter, mending: Mending) -> bytes:
    if not letter.original_topic:
        raise MendError(f"it never was a record of a topic: the {letter.stage} kept these bytes to be looked at")
    value = mending(letter.value)
    if value == letter.value:
        raise MendError("the mend changes nothing")
    validate(kafka, letter.original_topic, value, is_record=letter.is_record)
    return value


def _write(client: Client, mends: Sequence[tuple[Letter, bytes]], how: str) -> None:
    steps: list[Step] = []
    size = 0
    for letter, value in mends:
        steps.append(Step(letter.place, MENDED, new_id(), value=value, how=how))
        size += len(value)
        if len(steps) == WRITE_LETTERS or size > WRITE_BYTES:
            actions.write(client, steps)
            steps, size = [], 0
    if steps:
        actions.write(client, steps)
