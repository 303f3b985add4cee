"""`fulgurite replay`: the rows of a topic made once more from Kafka.

Exit codes: 0 done; 1 refused, because another replay is unfinished; 2 wrong arguments; 3 a store is away; 130 stopped
by Ctrl-C, and to be finished by the same command.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from fulgurite.infra.cli_common import DataOption, SetOption, read_settings, register
from fulgurite.schemas.errors import SettingsError


def add_to(app: typer.Typer) -> None:
    """Registers it."""
    register(app, "replay", "fulgurite replay spans --from-time 2026-11-21T08:00 --rebuild", rich_help_panel="Data")(
        replay
    )


def replay(
    topic: Annotated[str, typer.Argument(help="spans, rewards, rollouts, trajectories, …")],
    from_offset: Annotated[int | None, typer.Option(help="The first offset; 0 is all that Kafka has.", min=0)] = None,
    from_time: Annotated[str, typer.Option(help="From records of this time on: 2026-11-21T08:00 (UTC).")] = "",
    to_offset: Annotated[int | None, typer.Option(help="Only before this offset.", min=0)] = None,
    to_time: Annotated[str, typer.Option(help="Only before records of this time.")] = "",
    partition: Annotated[int | None, typer.Option(help="Only this partition.", min=0)] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make rows that are there anew, too.")] = False,
    abandon: Annotated[bool, typer.Option("--abandon", help="End an unfinished replay as it is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as one JSON object.")] = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Fill in rows of a topic that are missing in ClickHouse, or make them anew, from Kafka; none comes twice."""
    from fulgurite.infra.replay import command

    settings = read_settings(data, sets)
    wanted = command.Options(
        topic=topic,
        from_offset=from_offset,
        from_time=_time("--from-time", from_time),
        to_offset=to_offset,
        to_time=_time("--to-time", to_time),
        partition=partition,
        rebuild=rebuild,
    )
    if abandon:
        return command.abandon(settings, wanted)
    if (from_offset is None) == (not from_time):
        raise SettingsError("say from where: either --from-offset N (0 is all that Kafka has) or --from-time TIME")
    if to_offset is not None and to_time:
        raise SettingsError("either --to-offset or --to-time, not both")
    if None not in (from_offset, to_offset) and (to_offset or 0) <= (from_offset or 0):
        raise SettingsError(f"--to-offset {to_offset} is not behind --from-offset {from_offset}")
    try:
        return command.replay(settings, wanted, as_json=as_json)
    except KeyboardInterrupt:
        command.say_stopped(wanted)
        raise typer.Exit(130) from None


def _time(option: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"{option} {text}: must be like 2026-11-21T08:00 or 2026-11-21T08:00:00+01:00") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
