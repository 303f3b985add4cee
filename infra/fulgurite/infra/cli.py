"""The command `fulgurite`: stores, services and questions. Imports nothing heavy before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from fulgurite.infra import (
    cli_algorithms,
    cli_data,
    cli_demo,
    cli_dlq,
    cli_gateway,
    cli_replay,
    cli_track,
    cli_train,
)
from fulgurite.infra.cli_common import (
    SERVICE_EXIT_CODES,
    DataOption,
    SetOption,
    data_folder,
    lazy_module,
    read_settings,
    register,
    start_service,
)

app = typer.Typer(
    name="fulgurite",
    help="Online reinforcement learning for LLM agents over Kafka and ClickHouse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Exit codes: {SERVICE_EXIT_CODES}",
)
cli_data.add_to(app)
cli_demo.add_to(app)
cli_dlq.add_to(app)
cli_gateway.add_to(app)
cli_replay.add_to(app)


@register(app, "up", "fulgurite up --data .fulgurite")
def up(
    data: DataOption = None,
    sets: SetOption = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay here until Ctrl-C or SIGTERM.")] = False,
) -> int:
    """Start the embedded Kafka and ClickHouse on a data folder, with topics and tables; done already is fine."""
    from fulgurite.infra import up as up_module

    settings = read_settings(data, sets)
    if foreground:
        return up_module.run_foreground(data_folder(data), settings)
    return up_module.start_background(data_folder(data))


@register(app, "down", "fulgurite down --data .fulgurite")
def down(data: DataOption = None) -> int:
    """Stop what `fulgurite up` started; the data stays."""
    from fulgurite.infra import up as up_module

    return up_module.stop_background(data_folder(data))


@register(app, "status", "fulgurite status")
def status(data: DataOption = None, sets: SetOption = None) -> int:
    """Show what runs and where, its memory, records per topic, consumer lag. Exit code 1 if a store is away."""
    from fulgurite.infra.status import show_status

    return show_status(data_folder(data), read_settings(data, sets))


def _service(name: str, module: str, summary: str, example: str = "", *, kafka: bool = True) -> None:
    def run(data: DataOption = None, sets: SetOption = None) -> int:
        return start_service(name, module, data, sets, kafka=kafka)

    run.__doc__ = summary
    register(app, name, example or f"fulgurite {name}", rich_help_panel="Services")(run)


_service("coordinator", "fulgurite.consumers.coordinator", "Queue of rollouts: leases, retries, REST API /v1/agl.")
_service(
    "gateway",
    "fulgurite.producers.gateway",
    "OpenAI API for agents; records tokens, logprobs and versions of every call.",
    "fulgurite gateway --set gateway.backend_url=http://127.0.0.1:8000",
)
_service(
    "policy-server",
    "fulgurite.streams.policy_server",
    "The embedded policy server for a machine without vLLM.",
    "fulgurite policy-server --set policy_server.model=./model",
    kafka=False,
)
_service("follower", "fulgurite.consumers.follower", "Brings policy servers to the newest version.")
_service(
    "runner",
    "fulgurite.producers.runner",
    "Asks the coordinator for rollouts and runs the agent on them.",
    "fulgurite runner --set runner.agent=examples.calculator.agent:agent",
)
_service("materialiser", "fulgurite.consumers.materialiser", "Writes all topics into ClickHouse, exactly once.")
_service("translator", "fulgurite.consumers.translator", "Publishes the rewards that OTLP spans carry.")
_service("assembler", "fulgurite.streams.assembler", "Joins spans, rewards and rollouts into trajectories.")
cli_train.add_to(app)
cli_track.add_to(app)
cli_algorithms.add_to(app)


@register(
    app,
    "evaluate",
    "fulgurite evaluate --tasks examples.calculator.tasks:heldout_task --count 512 --name before",
    rich_help_panel="Services",
)
def evaluate(
    tasks: Annotated[str, typer.Option(help="Held-out tasks, as module:function.")],
    name: Annotated[str, typer.Option(help="Of this evaluation; a name used before only goes on where it stood.")],
    count: Annotated[int, typer.Option(help="How many of them.", min=1)] = 512,
    samples: Annotated[list[str] | None, typer.Option("--sampling", help="sampled, greedy, or both.")] = None,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Run held-out tasks as rollouts of mode `val`; read the results with `fulgurite sql`."""
    settings = read_settings(data, sets)
    module = lazy_module("fulgurite.streams.evaluate")
    kinds = samples or ["sampled", "greedy"]
    return int(module.main(settings, name=name, tasks=tasks, count=count, samples=kinds))


def main() -> None:
    """Entry point of the script `fulgurite`."""
    app()
