"""The pages say what the code does: commands, topics, settings, links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_is_what_the_code_says():
    from fulgurite.infra.reference import render

    assert (ROOT / "docs" / "reference.md").read_text() == render(), "run `make docs`"


def test_every_command_topic_and_setting_is_documented():
    from typer.main import get_command

    from fulgurite.infra.cli import app
    from fulgurite.schemas.settings import Settings
    from fulgurite.schemas.topics import TOPICS

    page = (ROOT / "docs" / "reference.md").read_text()
    commands: dict[str, object] = getattr(get_command(app), "commands")  # noqa: B009
    wanted = [f"`fulgurite {name}`" for name in commands] + [f"| `{topic.name}` |" for topic in TOPICS]
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        wanted += [f"| `{section}.{name}` |" for name in field.annotation.model_fields]
    assert [text for text in wanted if text not in page] == []
    assert not re.search(r"\| \s*\|$", page, re.MULTILINE), "a command or setting has no description"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    broken: list[str] = []
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", page.read_text()):
        if target and "://" not in target and not (page.parent / target).exists():
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_exist(page: Path):
    from typer.main import get_command

    from fulgurite.infra.cli import app

    commands: dict[str, object] = getattr(get_command(app), "commands")  # noqa: B009
    used = set(re.findall(r"(?:^|[`&(]|&& )\s*fulgurite ([a-z][a-z-]*)", page.read_text(), re.MULTILINE))
    assert used - set(commands) == set()


def test_make_targets_on_the_front_page_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^    |`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= used <= targets


def test_help_of_every_command_has_an_example():
    from typer.main import get_command

    from fulgurite.infra.cli import app

    def leaves(prefix: tuple[str, ...], command: object) -> list[tuple[tuple[str, ...], object]]:
        children: dict[str, object] = getattr(command, "commands", {})
        if not children:
            return [(prefix, command)]
        return [leaf for name, child in children.items() for leaf in leaves((*prefix, name), child)]

    without = [
        " ".join(name)
        for name, command in leaves((), get_command(app))
        if "fulgurite" not in (getattr(command, "help", "") or "") + (getattr(command, "epilog", "") or "")
    ]
    assert without == []


def test_help_is_quick_and_light():
    code = "import sys; from fulgurite.infra.cli import app; print('torch' in sys.modules, 'chdb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
