"""The command line against the session's stores: exit codes, errors in a line, what the commands print."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import clickhouse_connect
import pytest
from aiokafka import AIOKafkaProducer
from clickhouse_connect.driver import Client
from rich.console import Console

from fulgurite.infra.kafka_probe import run_in_thread
from fulgurite.infra.settings_file import write_settings_file
from fulgurite.infra.trace import rollout_tree
from fulgurite.schemas.codec import encode
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import ENV_HOME, ENV_PREFIX, ClickHouseSettings, KafkaSettings, load_settings
from fulgurite.schemas.topics import REWARDS
from tests.consumers.poison import poison

ROLLOUT = "rollout-1"


class Cli:
    """`fulgurite …` as its own process, on a data folder whose settings file names the session's stores."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        return subprocess.run(
            [sys.executable, "-m", "fulgurite.infra", *arguments],
            env=inherited | {ENV_HOME: str(self.data), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=90,
        )


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def connected(cli: Cli, kafka_settings: KafkaSettings, clickhouse_settings: ClickHouseSettings) -> Cli:
    write_settings_file(cli.data, kafka_settings, clickhouse_settings)
    return cli


def test_a_wrong_setting_is_one_red_line_and_exit_code_2(cli: Cli) -> None:
    for arguments, message in (
        (("topics", "list", "--set", "kafka.partitions=none"), "--set kafka.partitions = 'none': "),
        (("coordinator", "--set", "coordinator.prot=1"), "--set coordinator.prot: no such setting; the nearest is c"),
        (("topics", "list", "--set", "partitions"), "must be SECTION.NAME=VALUE"),
        (("tail", "nothing"), "there is no topic nothing; known ones: rollouts"),
        (("sql", "SELECT 1", "--format", "xml"), "must be table or json"),
    ):
        done = cli(*arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr


def test_absent_stores_are_told_with_exit_codes(cli: Cli) -> None:
    nowhere = ("--set", "kafka.bootstrap_servers=127.0.0.1:1", "--set", "clickhouse.url=http://127.0.0.1:1")
    done = cli("topics", "list", *nowhere)
    assert (done.returncode, "no Kafka broker answers at 127.0.0.1:1 " in done.stderr) == (3, True)
    done = cli("sql", "SELECT 1", *nowhere)
    assert (done.returncode, "connection refused; `fulgurite up` starts one" in done.stderr) == (3, True)
    done = cli("status", *nowhere)
    assert (done.returncode, "No embedded stores run on" in done.stdout) == (1, True)
    done = cli("down")
    assert (done.returncode, "Nothing runs on" in done.stdout) == (0, True)


def test_topics_and_tail(connected: Cli, kafka_settings: KafkaSettings) -> None:
    async def send() -> None:
        async with AIOKafkaProducer(bootstrap_servers=kafka_settings.bootstrap_servers, acks="all") as producer:
            topic = kafka_settings.topic(REWARDS)
            for number in range(5):
                await asyncio.sleep(0.005)
                reward = Reward(rollout_id=f"rollout-{number}", value=number)
                await producer.send_and_wait(topic, encode(reward), key=reward.rollout_id.encode())
            await asyncio.sleep(0.005)
            await producer.send_and_wait(topic, b"[" * 100_000, key=b"deep")
            await asyncio.sleep(0.005)  # the newest are found by their timestamps, in milliseconds
            await producer.send_and_wait(topic, b"not JSON", key=b"bad")
        await asyncio.sleep(0.005)
        await poison(kafka_settings, REWARDS, b"an odd header")

    run_in_thread(send())
    done = connected("topics", "list")
    assert done.returncode == 0, done.stderr
    assert f"{kafka_settings.topic_prefix}rewards" in done.stdout
    assert "All topics exist" in connected("topics", "create").stdout

    newest = connected("tail", "rewards", "-n", "5").stdout.splitlines()
    assert ["rollout-4" in newest[0], "(100000 bytes)" in newest[1], "not JSON" in newest[2]] == [True] * 3
    assert all("cannot be decoded: a header's name is not UTF-8" in line for line in newest[3:])
    (line,) = connected("tail", "rewards", "--rollout", "rollout-1", "--full").stdout.splitlines()
    assert json.loads(line)["value"]["value"] == 1.0


def test_sql_migrate_and_status(connected: Cli, clickhouse_settings: ClickHouseSettings) -> None:
    assert f"to database {clickhouse_settings.database}" in connected("migrate").stdout
    assert "Nothing to apply" in connected("migrate").stdout
    done = connected("sql", "SELECT 1 + 1 AS two, 'x' AS [text]".replace("[text]", "text"), "--format", "json")
    assert json.loads(done.stdout) == {"two": 2, "text": "x"}
    assert "│ 2" in connected("sql", "SELECT 1 + 1 AS two;").stdout
    refused = connected("sql", "SELECT nothing")
    assert (refused.returncode, "nothing" in refused.stderr, "Traceback" in refused.stderr) == (1, True, False)
    done = connected("status")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Kafka answers" in done.stdout
    assert "ClickHouse answers" in done.stdout


def test_a_rollout_as_a_tree(connected: Cli, clickhouse_settings: ClickHouseSettings) -> None:
    apply_migrations(clickhouse_settings)
    options = connection_options(clickhouse_settings)
    with clickhouse_connect.get_client(**options, database=clickhouse_settings.database) as client:
        _fill(client)
        assert rollout_tree(client, "unknown") is None
        console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(rollout_tree(client, ROLLOUT))
            text = console.export_text()
    assert f"rollout {ROLLOUT}: succeeded in 3.0 s" in text
    assert "attempt 1 attempt-1 (counts)" in text
    chat = next(line for line in text.splitlines() if "chat" in line)
    tool = next(line for line in text.splitlines() if "calculator" in line)
    assert "2 → 3 tokens, version 7, mean logprob -0.500" in chat
    assert tool.index("calculator") > chat.index("chat"), "a child stands deeper than its parent"
    assert "reward = 1 from runner" in text
    assert connected("trace", ROLLOUT).stdout.count("chat") == 1
    assert connected("trace", "unknown").returncode == 1


def test_the_settings_file_keeps_what_else_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "fulgurite.toml"
    path.write_text(
        '[trainer]\nsteps = 7\nsampling_parameters = { temperature = 1.0, stop = ["ü"] }\n[kafka]\npartitions = 9\n'
    )
    clickhouse = ClickHouseSettings(url="http://127.0.0.1:2", user="app", password='se"cret\\')  # type: ignore[arg-type]
    write_settings_file(tmp_path, KafkaSettings(bootstrap_servers="127.0.0.1:1", partitions=9), clickhouse)
    read = load_settings({ENV_HOME: str(tmp_path)})
    assert read.trainer.steps == 7
    assert read.trainer.sampling_parameters == {"temperature": 1.0, "stop": ["ü"]}
    assert (read.kafka.bootstrap_servers, read.kafka.partitions) == ("127.0.0.1:1", 9)
    assert read.clickhouse.password.get_secret_value() == 'se"cret\\'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tomllib.loads(path.read_text())


def _fill(client: Client) -> None:
    """One succeeded rollout: a call with a tool below it, and a reward."""
    second = 1_000_000_000
    client.insert(
        "rollout_events",
        [
            ["queued", "e1", ROLLOUT, second, "", "train", '{"question": "6 * 7"}', "", 0],
            ["attempt_started", "e2", ROLLOUT, 2 * second, "attempt-1", "train", "", "", 1],
            ["finished", "e3", ROLLOUT, 4 * second, "attempt-1", "train", "", "succeeded", 2],
        ],
        column_names=["event", "event_id", "rollout_id", "time_ns", "attempt_id", "mode", "input", "status", "_offset"],
    )
    client.insert(
        "spans",
        [
            [
                ROLLOUT,
                "attempt-1",
                "s1",
                "",
                "chat policy",
                2 * second,
                3 * second,
                [1, 2],
                [3, 4, 5],
                [-0.5] * 3,
                7,
                7,
            ],
            [ROLLOUT, "attempt-1", "s2", "s1", "calculator", 2 * second, 3 * second, [], [], [], None, None],
        ],
        column_names=[
            *("rollout_id", "attempt_id", "span_id", "parent_span_id", "name", "start_ns", "end_ns"),
            *("prompt_token_ids", "response_token_ids", "logprobs", "min_version", "max_version"),
        ],
    )
    client.insert(
        "rewards",
        [["r1", ROLLOUT, "attempt-1", "reward", 1.0, "runner"]],
        column_names=["reward_id", "rollout_id", "attempt_id", "name", "value", "source"],
    )
