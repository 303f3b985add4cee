"""`fulgurite gateway-key`: an API key for the gateway, whose hash alone goes into the settings."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from fulgurite.infra.cli_common import next_steps, register, say
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.gateway_settings import KEY_NAME


def add_to(app: typer.Typer) -> None:
    register(app, "gateway-key", "fulgurite gateway-key team-a")(gateway_key)


def gateway_key(
    name: Annotated[str, typer.Argument(help="Who gets it; stands in logs and metrics.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> int:
    """Make an API key for the gateway: shown once, stored nowhere. The settings take its hash."""
    if not re.fullmatch(KEY_NAME, name):
        raise SettingsError(
            f"{name!r} cannot be a key's name: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"
        )
    from fulgurite.producers.gateway.keys import new_key

    key, hashed = new_key(name)
    if as_json:
        typer.echo(json.dumps({"name": name, "key": key, "hash": hashed}))
        return 0
    say("The key, for the agent (OPENAI_API_KEY); it cannot be shown again:")
    typer.echo(f"\n{key}\n")
    say("For the gateway's settings, in fulgurite.toml:")
    typer.echo(f'\n[[gateway.api_keys]]\nname = "{name}"\nhash = "{hashed}"\n')
    next_steps(
        "restart the gateway, which reads its settings when it starts",
        "bound the key there: requests_per_minute, max_concurrent_requests",
    )
    return 0
