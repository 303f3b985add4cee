"""The commands that show the whole circle: demo, and publish, which starts a resource's versions by hand."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fulgurite.infra.cli_common import DataOption, SetOption, console, data_folder, next_steps, read_settings, register


class Server(StrEnum):
    """What may serve the demo's policy."""

    embedded = "embedded"
    vllm = "vllm"


def add_to(app: typer.Typer) -> None:
    """Adds them to the command line."""
    register(app, "demo", "fulgurite demo --data .fulgurite --serve vllm")(demo)
    register(
        app,
        "publish",
        "fulgurite publish ./model --resource policy",
        rich_help_panel="Services",
    )(publish)


def demo(
    data: DataOption = None,
    steps: Annotated[int, typer.Option(help="GRPO steps, each makes a version.", min=1)] = 36,
    groups_per_step: Annotated[int, typer.Option(help="Tasks per step.", min=1)] = 8,
    group_size: Annotated[int, typer.Option(help="Rollouts of one task.", min=2)] = 8,
    eval_tasks: Annotated[int, typer.Option(help="Held-out tasks before and after.", min=1)] = 512,
    greedy_tasks: Annotated[int, typer.Option(help="How many of them also greedily.", min=1)] = 128,
    warm_start_steps: Annotated[int, typer.Option(help="Steps on demonstrations before.", min=1)] = 350,
    concurrency: Annotated[int, typer.Option(help="Agents at once.", min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Of warm start and trainer.")] = 1,
    serve: Annotated[
        Server, typer.Option(help="What serves the policy: the embedded server, or vLLM's CPU build (`make vllm`).")
    ] = Server.embedded,
) -> int:
    """Train the calculator agent online, from nothing, on this machine: everything real, about 5 minutes."""
    from fulgurite.infra.demo.flow import main
    from fulgurite.infra.demo.plan import Sizes

    sizes = Sizes(
        steps=steps,
        groups_per_step=groups_per_step,
        group_size=group_size,
        eval_tasks=eval_tasks,
        greedy_tasks=min(greedy_tasks, eval_tasks),
        warm_start_steps=warm_start_steps,
        concurrency=concurrency,
        seed=seed,
    )
    return main(data_folder(data), sizes, serve.value)


def publish(
    folder: Annotated[Path, typer.Argument(help="The model's files; every server must be able to read them here.")],
    resource: Annotated[str, typer.Option(help="Whose next version it is.")] = "policy",
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Publish a folder as the next version of a resource; followers bring it to the servers."""
    from fulgurite.producers.resources import publish_folder

    settings = read_settings(data, sets)
    version = asyncio.run(publish_folder(settings, resource, folder, settings.trainer.run_id))
    console.print(
        f"{resource} version {version.version} is {version.uri} (sha256 {version.sha256[:12]}…)", soft_wrap=True
    )
    next_steps("fulgurite tail resources -n 3", "fulgurite tail training -n 3    # which servers have applied it")
    return 0
