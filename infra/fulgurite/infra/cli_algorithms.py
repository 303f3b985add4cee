"""Commands of the algorithms that follow the log: one's own, the aggregator, the search for prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from fulgurite.infra.cli_common import DataOption, SetOption, lazy_module, read_settings, register, start_service

PANEL = "Services"


def add_to(app: typer.Typer) -> None:
    """Registers them."""
    register(
        app,
        "algorithm",
        "fulgurite algorithm examples.algorithms.best_of_group:best_of_group --from beginning",
        rich_help_panel=PANEL,
    )(algorithm)
    register(
        app,
        "aggregator",
        "fulgurite aggregator   (its sources and rules stand in fulgurite.toml: docs/algorithms.md)",
        rich_help_panel=PANEL,
    )(aggregator)
    register(
        app,
        "optimise-prompt",
        "fulgurite optimise-prompt --set prompt.run_id=words --set prompt.resource=support --set prompt.seed=seed.txt "
        "--set prompt.tasks=my_tasks:task --set prompt.critic_url=http://127.0.0.1:8000/v1 --set prompt.critic_model=m",
        rich_help_panel=PANEL,
    )(optimise_prompt)


def algorithm(
    function: Annotated[str, typer.Argument(help="The function with @algorithm above it, as module:function.")],
    begin: Annotated[
        str,
        typer.Option(
            "--from", help="Where its first start begins: beginning, latest, an offset, or a time (2026-11-21T08:00)."
        ),
    ] = "beginning",
    name: Annotated[str, typer.Option(help="Under which it goes on after a restart; default: the function's.")] = "",
    run: Annotated[str, typer.Option(help="Only of this run.")] = "",
    agent: Annotated[str, typer.Option(help="Only of this agent.")] = "",
    mode: Annotated[str, typer.Option(help="Only of this mode: train, val or test.")] = "",
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Run an algorithm of your own over the log; what it yields is published exactly once for each input."""
    settings = read_settings(data, sets)
    definition = lazy_module("fulgurite.streams.algorithms.definition")
    memory = lazy_module("fulgurite.streams.algorithms.memory")
    start = memory.Start.parse(begin)
    found = definition.load_algorithm(function, name=name, run_id=run, agent=agent, mode=mode)
    return int(lazy_module("fulgurite.streams.algorithms.service").main(settings, found, start))


def aggregator(data: DataOption = None, sets: SetOption = None) -> int:
    """Give trajectories the rewards of functions, judges and rules before they are trained on."""
    return start_service("aggregator", "fulgurite.streams.algorithms.aggregator", data, sets)


def optimise_prompt(data: DataOption = None, sets: SetOption = None) -> int:
    """Search for a better prompt template: critiques and edits by a model, tried by the agents themselves."""
    return start_service("optimise-prompt", "fulgurite.streams.algorithms.prompts", data, sets)
