"""docs/reference.md, rendered from the code: every command, topic and setting, so that the page cannot fall behind.

`make docs` writes it; a test compares the page with what this module renders.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, SecretStr

from fulgurite.schemas.settings import CONFIG_NAME, DEFAULT_HOME, ENV_CONFIG, ENV_HOME, ENV_PREFIX, Settings
from fulgurite.schemas.topics import DAY_MS, TOPICS, Topic

HEAD = """# Reference

Rendered from the code by `make docs`; do not edit by hand.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_commands(), *_topics(), *_settings()]) + "\n"


def _commands() -> Iterator[str]:
    from typer.main import get_command

    from fulgurite.infra.cli import app

    group = get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    yield "## Commands\n"
    yield "Every command has `--help` with an example.\n"
    yield "| command | does |\n|---|---|"
    yield from _group_rows("fulgurite", getattr(group, "commands", {}))
    yield ""


def _group_rows(prefix: str, commands: dict[str, Any]) -> Iterator[str]:
    for name, command in sorted(commands.items()):
        text = next(iter((command.help or "").strip().splitlines()), "")
        yield f"| `{prefix} {name}` | {_cell(text)} |"
        yield from _group_rows(f"{prefix} {name}", getattr(command, "commands", {}))


def _topics() -> Iterator[str]:
    yield "## Topics\n"
    yield "The prefix is the setting `kafka.topic_prefix` (default `fulgurite.`).\n"
    yield "| topic | key | holds | cleanup | kept |\n|---|---|---|---|---|"
    for topic in TOPICS:
        yield f"| `{topic.name}` | {topic.key} | {topic.holds} | {topic.cleanup} | {_kept(topic)} |"
    yield ""


def _kept(topic: Topic) -> str:
    return "for ever" if topic.retention_ms < 0 else f"{topic.retention_ms // DAY_MS} days"


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield (
        f"Environment `{ENV_PREFIX}<SECTION>__<NAME>` over the TOML file (`{ENV_CONFIG}`, else `{CONFIG_NAME}` in "
        f"`{ENV_HOME}`, default `{DEFAULT_HOME}`) over the defaults; on the command line `--set section.name=value`.\n"
    )
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        yield f"### {section}\n"
        yield "| setting | default | meaning |\n|---|---|---|"
        for name, known in model.model_fields.items():
            default = known.get_default(call_default_factory=True)
            shown = "(none)" if default in (None, "") or isinstance(default, SecretStr) else f"`{default}`"
            yield f"| `{section}.{name}` | {shown} | {_cell(known.description or '')} |"
        yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render())
