"""What is wrong is told within bounded time, with where and what to do, and an exit code: no traceback, no hang."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from fulgurite.infra import sql, topics
from fulgurite.infra.cli import app
from fulgurite.infra.settings_file import write_settings_file
from fulgurite.schemas.settings import ENV_HOME, ClickHouseSettings, KafkaSettings

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line on an empty data folder, with short patience."""
    monkeypatch.setattr(sql, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(topics, "CONNECT_SECONDS", 1.0)
    monkeypatch.setenv(ENV_HOME, str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "command",
    ["sql SHOW", "migrate", "trace r", "dlq list", "dlq show spans/0/0", "dlq replay --topic spans", "dlq status"],
)
def test_a_clickhouse_that_says_nothing_is_given_up(
    run: Run, silent: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULGURITE_CLICKHOUSE__URL", f"http://127.0.0.1:{silent}")
    done = run(*command.split())
    assert done.exit_code == 3, done.output
    assert f"no ClickHouse answers at http://127.0.0.1:{silent} (clickhouse.url)" in done.stderr


@pytest.mark.parametrize("command", ["topics list", "topics create", "tail spans"])
def test_a_broker_that_says_nothing_is_given_up(
    run: Run, silent: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULGURITE_KAFKA__BOOTSTRAP_SERVERS", f"127.0.0.1:{silent}")
    done = run(*command.split())
    assert done.exit_code == 3, done.output
    assert f"no Kafka broker answers at 127.0.0.1:{silent} (kafka.bootstrap_servers" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sql", " ; "), "the statement is empty"),
        (("sql", "SELECT 1 FORMAT JSON;"), "leave out 'FORMAT JSON': --format table or --format json"),
        (("replay", "spans", "--from-offset", "5", "--to-offset", "5"), "--to-offset 5 is not behind --from-offset 5"),
        (("dlq", "mend", "spans/0/1", "--edit-file", "/no/such"), "--edit-file /no/such: No such file"),
    ],
)
def test_wrong_arguments_are_told_before_any_store_is_asked(run: Run, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, words in done.stderr) == (2, True), done.output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("trainer.clip_low=2", "  --set trainer.clip_low = '2': Input should be less than or equal to 1"),
        ("trainer.agents=a", "--set trainer.agents: must be JSON"),
        ("trainer.clip_lo=0.1", "--set trainer.clip_lo: no such setting; the nearest is trainer.clip_low; known"),
        ("trainr.steps=1", "--set trainr.steps: there is no section trainr; the nearest is trainer.steps; known"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_given(
    run: Run, given: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--set goes through the environment, of which its user knows nothing; what is set there keeps its name."""
    section, _, rest = given.partition(".")
    field, _, value = rest.partition("=")
    variable = f"FULGURITE_{section.upper()}__{field.upper()}"
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("FULGURITE_TRAINER__STEPS", "1")  # as the other: and so it is taken away afterwards
    done = run("train", "--set", given)
    assert (done.exit_code, words in done.stderr, variable in done.stderr) == (2, True, False), done.output
    other = run("train", "--set", "trainer.steps=0")
    assert variable in other.stderr, other.output


def test_a_login_that_clickhouse_does_not_take_is_a_wrong_setting(
    run: Run, tmp_path: Path, clickhouse_settings: ClickHouseSettings
) -> None:
    wrong = clickhouse_settings.model_copy(update={"password": SecretStr("hunter2")})
    write_settings_file(tmp_path, KafkaSettings(), wrong)
    done = run("sql", "SELECT 1")
    assert (done.exit_code, "check clickhouse.user and clickhouse.password" in done.stderr) == (2, True), done.output
    assert "hunter2" not in done.output


@pytest.mark.parametrize("command", [(), ("sql",), ("dlq", "replay"), ("replay",), ("topics", "create"), ("train",)])
def test_help_says_the_exit_codes(run: Run, command: tuple[str, ...]) -> None:
    assert "Exit codes: 0 done; 1 refused" in run(*command, "--help").output
