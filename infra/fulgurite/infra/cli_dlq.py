"""`fulgurite dlq`: dead letters, from finding one to what became of it.

Exit codes: 0 all that was asked for was done; 1 something was refused or not found; 2 wrong arguments; 3 a store is
away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulgurite.infra.cli_common import DataOption, SetOption, console, next_steps, read_settings, register, say

if TYPE_CHECKING:
    from fulgurite.infra.dlq.sending import NotSent, Sent

dlq_app = typer.Typer(name="dlq", no_args_is_help=True)

TopicOption = Annotated[str, typer.Option("--topic", help="Only of this topic: spans, rewards, …")]
StageOption = Annotated[str, typer.Option("--stage", help="Only refused by: materialiser, assembler, coordinator, …")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Only for this reason: bad_field, not_json, late, …")]
SinceOption = Annotated[str, typer.Option("--since", help="Only since: 2h, 7d, or 2026-11-21T08:00 (UTC).")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", help="At most so many.", min=1, max=10_000)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")]
IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="As `list` shows them: spans/3/1042", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Registers all of them."""
    register(dlq_app, "list", "fulgurite dlq list --topic spans --since 2h")(list_letters)
    register(dlq_app, "reasons", "fulgurite dlq reasons --since 7d")(reasons)
    register(dlq_app, "show", "fulgurite dlq show spans/3/1042")(show)
    register(
        dlq_app,
        "mend",
        'fulgurite dlq mend --reason bad_field --topic spans --with \'r["name"] = str(r["name"])\' --dry-run',
    )(mend)
    register(dlq_app, "replay", "fulgurite dlq replay spans/3/1042 spans/3/1043/7")(replay)
    register(dlq_app, "status", "fulgurite dlq status spans/3/1042")(status)
    app.add_typer(
        dlq_app,
        name="dlq",
        help="Dead letters: list, group, show, mend, send again, follow.",
        rich_help_panel="Data",
    )


def list_letters(
    topic: TopicOption = "",
    stage: StageOption = "",
    reason: ReasonOption = "",
    since: SinceOption = "",
    waiting: Annotated[bool, typer.Option("--waiting", help="Only those never sent again.")] = False,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> None:
    """List dead letters, the newest first, with what became of each."""
    from fulgurite.infra.dlq import actions, asking, letters, screens

    settings = read_settings(data, sets)
    chosen = asking.filter(settings, topic, stage, reason, since, waiting=waiting)
    with asking.connected(settings) as client:
        found = letters.newest(client, chosen, limit)
        places = [letter.place for letter in found]
        replays = actions.replays(client, places)
        if as_json:
            screens.print_json(
                screens.letter_json(settings.kafka, letter)
                | {"replays": [screens.replay_json(settings.kafka, r) for r in replays.get(letter.place, [])]}
                for letter in found
            )
            return
        mends = actions.mends(client, places)
    if not found:
        say("No dead letters." if chosen == letters.Filter() else "No such dead letters.")
        return
    console.print(screens.letters_table(settings.kafka, found, mends, replays))
    if len(found) == limit:
        say(f"[dim]The newest {limit}; --limit shows more.[/]")
    next_steps(f"fulgurite dlq show {letters.short_id(settings.kafka, found[0].place)}", "fulgurite dlq reasons")


def reasons(
    topic: TopicOption = "",
    stage: StageOption = "",
    since: SinceOption = "",
    waiting: Annotated[bool, typer.Option("--waiting", help="Only those never sent again.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> None:
    """Count dead letters by topic, stage and reason, with an example of each."""
    from fulgurite.infra.dlq import asking, letters, screens

    settings = read_settings(data, sets)
    with asking.connected(settings) as client:
        groups = letters.grouped(client, asking.filter(settings, topic, stage, "", since, waiting=waiting))
    if as_json:
        fields = ("topic", "stage", "reason", "count", "first_time", "last_time", "message")
        screens.print_json(
            {name: getattr(group, name) for name in fields}
            | {"example": letters.short_id(settings.kafka, group.example)}
            for group in groups
        )
    elif groups:
        console.print(screens.groups_table(settings.kafka, groups))
        next_steps(f"fulgurite dlq show {letters.short_id(settings.kafka, groups[0].example)}")
    else:
        say("No dead letters.")


def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it: spans/3/1042")],
    full: Annotated[bool, typer.Option("--full", help="All bytes, however many.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Show one dead letter: where it lay, who refused it and why, its bytes, its mend, what became of it."""
    from fulgurite.infra.dlq import actions, asking, letters, screens

    settings = read_settings(data, sets)
    place = letters.parse_place(settings.kafka, letter_id)
    with asking.connected(settings) as client:
        found = letters.at(client, [place])
        if not found:
            asking.not_found(settings, client, [place])
            return 1
        replays = actions.replays(client, [place]).get(place, [])
        origins = actions.replays_to(client, place)
        mended = actions.mends(client, [place]).get(place)
    if as_json:
        item = screens.letter_json(settings.kafka, found[0], with_bytes=True)
        item["mend"] = {"how": mended.how, "who": mended.who, "at": mended.at} if mended else None
        item["replays"] = [screens.replay_json(settings.kafka, one) for one in replays]
        item["replay_of"] = [letters.short_id(settings.kafka, one.place) for one in origins]
        screens.print_json([item])
        return 0
    screens.show(settings.kafka, found[0], mended, replays, origins, full=full)
    return 0


def mend(
    ids: IdsArgument = None,
    expression: Annotated[
        str,
        typer.Option(
            "--with", help="Python over the record `r` (and `text`, the bytes as text): a new r, or statements."
        ),
    ] = "",
    fields: Annotated[
        list[str] | None, typer.Option("--set-field", metavar="FIELD=VALUE", help="Set a field; may be repeated.")
    ] = None,
    edit_file: Annotated[
        Path | None, typer.Option("--edit-file", help="Take the new bytes of one from a file.")
    ] = None,
    topic: TopicOption = "",
    stage: StageOption = "",
    reason: ReasonOption = "",
    since: SinceOption = "",
    limit: LimitOption = 1000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show and check, write nothing.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Write down what to send in place of the original bytes; refused while it is not what the topic holds."""
    from fulgurite.infra.dlq import asking
    from fulgurite.infra.dlq.mended import mend_all

    settings = read_settings(data, sets)
    mending = asking.mending(expression, fields or [], edit_file, ids or [])
    how = expression or (" ".join(f"--set-field {text}" for text in fields or [])) or f"--edit-file {edit_file}"
    chosen = asking.filter(settings, topic, stage, reason, since, waiting=True)
    with asking.connected(settings) as client:
        found, missing = asking.selected(settings, client, ids or [], chosen, limit)
        refused = mend_all(settings.kafka, client, found, mending, how, dry_run=dry_run, as_json=as_json)
    if found and not dry_run and not as_json and len(refused) < len(found):
        next_steps(asking.again("replay", ids, topic, stage, reason, since))
    return 1 if refused or missing or not found else 0


def replay(
    ids: IdsArgument = None,
    topic: TopicOption = "",
    stage: StageOption = "",
    reason: ReasonOption = "",
    since: SinceOption = "",
    limit: LimitOption = 1000,
    mended: Annotated[bool, typer.Option("--mended", help="Only those that were mended.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was replayed before.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what would probably be refused again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, send nothing.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Send dead letters, mended or as they were, to their topics again, in the order of the log; each only once."""
    from fulgurite.infra.dlq import asking, replaying, screens

    settings = read_settings(data, sets)
    chosen = asking.filter(settings, topic, stage, reason, since, waiting=not again, mended=mended)
    sent: list[Sent | NotSent] = []
    with asking.connected(settings) as client:
        found, missing = asking.selected(settings, client, ids or [], chosen, limit)

        def report(results: Sequence[Sent | NotSent]) -> None:
            screens.print_sent(settings.kafka, results, len(sent), as_json=as_json)
            sent.extend(results)

        async def work() -> replaying.Plan:
            planned = await replaying.plan(settings.kafka, client, found, replaying.Wishes(again=again, force=force))
            if not dry_run:
                await replaying.carry_out(settings.kafka, client, planned, report)
            return planned

        with asking.kafka_errors(settings):
            planned = asyncio.run(work())
    done = screens.print_outcome(settings.kafka, planned, sent, dry_run=dry_run, as_json=as_json)
    if done and not as_json:
        next_steps("fulgurite dlq status")
    complete = (dry_run or done == len(planned.send)) and not planned.refused
    return 0 if found and complete and not missing else 1


def status(
    ids: IdsArgument = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Show what became of what was sent again: the newest replays, or those of some dead letters."""
    from fulgurite.infra.dlq import actions, asking, letters, screens

    settings = read_settings(data, sets)
    places = [letters.parse_place(settings.kafka, text) for text in ids or []]
    with asking.connected(settings) as client:
        if places:
            of = actions.replays(client, places)
            found = [one for place in places for one in of.get(place, [])]
        else:
            found = actions.newest_replays(client, limit)
    if as_json:
        screens.print_json(screens.replay_json(settings.kafka, one) for one in found)
    elif found:
        console.print(screens.replays_table(settings.kafka, found))
    else:
        say("Nothing was replayed.")
    return 0 if found or not places else 1
