"""The example producers: each is built and run as its header says, against the real broker, and checked by SQL.

The broker wants a password, as the one of `fulgurite up` does. All builds start at once, in copies below
build/examples, and are waited for where they are needed. A language whose tools are not on this machine is skipped and
says which are missing.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewTopic
from aiokafka.partitioner import murmur2
from jgo.env import EnvironmentBuilder, LinkStrategy
from jgo.maven import MavenContext, PythonResolver
from pydantic import SecretStr

from fulgurite.consumers.materialiser import serve
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.java import KAFKA_VERSION, cache_folder, java_program
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.kafka_probe import run_in_thread
from fulgurite.infra.kafka_security import BrokerSecurity
from fulgurite.infra.topics import connected_admin, create_topics
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas import topics
from fulgurite.schemas.migrations import connection_options as clickhouse_options
from fulgurite.schemas.settings import KafkaSettings, Settings

# A cold build of the slowest (Rust, which compiles librdkafka) takes a minute on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "examples" / "producers"
BUILD_SECONDS = 360
RUN_SECONDS = 90
PARTITIONS = 2
SHORT_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Half the time of a run that is over as soon as it is warm."""


@dataclass(frozen=True)
class Language:
    """How an example is built and run, in a copy of its folder; the ids are put after `run`, or where it says {ids}."""

    name: str
    run: tuple[str, ...]
    build: tuple[tuple[str, ...], ...] = ()
    tools: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])
    source: str = ""
    """The folder with the example, where its name is another."""
    kafka_tools: bool = False
    """Whether nothing is on its PATH but `tools` and kafka-console-producer.sh, which makes a record of each line."""

    @property
    def folder(self) -> str:
        return self.source or self.name

    @property
    def missing(self) -> list[str]:
        return [tool for tool in self.tools if shutil.which(tool) is None]

    def command(self, rollout_id: str, attempt_id: str) -> list[str]:
        if "{ids}" in self.run[-1]:
            return [*self.run[:-1], self.run[-1].format(ids=f"{rollout_id} {attempt_id}")]
        return [*self.run, rollout_id, attempt_id]


LANGUAGES = (
    Language("python", (sys.executable, "producer.py")),
    Language("shell", ("./producer.sh",), tools=("bash", "kcat", "sha256sum")),
    Language(
        "shell-without-kcat",
        ("./producer.sh",),
        tools=("bash", "cat", "cp", "cut", "date", "mktemp", "rm", "sha256sum"),
        source="shell",
        kafka_tools=True,
    ),
    Language(
        "typescript",
        ("npm", "start", "--silent", "--"),
        (
            ("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline"),
            ("npm", "run", "build", "--silent"),
        ),
        tools=("node", "npm"),
    ),
    Language(
        "java",
        ("mvn", "-q", "-B", "compile", "exec:java", "-Dexec.args={ids}"),
        (("mvn", "-q", "-B", "compile"),),
        tools=("java", "javac", "mvn"),
        environment={"MAVEN_OPTS": SHORT_JAVA},
    ),
    Language("go", ("go", "run", "."), (("go", "build", "-o", os.devnull, "."),), tools=("go",)),
    Language(
        "rust",
        ("cargo", "run", "--quiet", "--"),
        (("cargo", "build", "--quiet"),),
        tools=("cargo", "cc", "make"),
        # Compiling librdkafka and the rest without optimising them halves the time; nothing here is about speed. What
        # was compiled stays in the user's cache, as Go's and Maven's does: the next fresh clone takes seconds.
        environment={
            "CFLAGS": "-O0",
            "CARGO_PROFILE_DEV_DEBUG": "0",
            "CARGO_INCREMENTAL": "0",
            "CARGO_TARGET_DIR": str(cache_folder() / "example-producers-rust"),
        },
    ),
)


def execute(command: list[str], folder: Path, environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit code and output. After `seconds` the command is killed with all its children: code 124."""
    log = folder / f"output-{secrets.token_hex(4)}.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    text = log.read_text(errors="replace")
    log.unlink()
    return code, text


def build(language: Language) -> Path:
    """The folder it was built in. Raises AssertionError with the tool's own words."""
    folder = ROOT / "build" / "examples" / language.name
    shutil.copytree(SOURCES / language.folder, folder, dirs_exist_ok=True)
    if language.kafka_tools:
        link_tools(folder / "bin", language.tools)
    deadline = time.monotonic() + BUILD_SECONDS
    for command in language.build:
        code, output = execute(list(command), folder, language.environment, deadline - time.monotonic())
        reason = f"not done in {BUILD_SECONDS} s" if code == 124 else f"exit code {code}"
        assert code == 0, f"{' '.join(command)} in {folder}: {reason}\n{output[-4000:]}"
    return folder


def link_tools(folder: Path, tools: Sequence[str]) -> None:
    """A PATH of its own: these tools, and Kafka's console producer as its distribution has it. The embedded broker's
    jars are without it: it is resolved as they are, once per user."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    cache = cache_folder() / f"example-producers-kafka-tools-{KAFKA_VERSION}"
    context = MavenContext(resolver=PythonResolver(), repo_cache=cache / "repository", timeout=60)
    builder = EnvironmentBuilder(context, cache_dir=cache / "environments", link_strategy=LinkStrategy.HARD)
    jars = builder.from_endpoint(f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}").modules_dir
    script = folder / "kafka-console-producer.sh"
    main = f"'{java_program()}' {SHORT_JAVA} -cp '{jars}/*' org.apache.kafka.tools.ConsoleProducer"
    script.write_text(f'#!{folder}/bash\nexec {main} "$@"\n')
    script.chmod(0o700)


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Path]]]:
    """Those of the languages that this run tests, all under way."""
    selected = {item.name for item in request.session.items}
    present = [it for it in LANGUAGES if f"{test_a_producer_in.__name__}[{it.name}]" in selected and not it.missing]
    with ThreadPoolExecutor(len(LANGUAGES)) as pool:
        yield {language.name: pool.submit(build, language) for language in present}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, clickhouse_server: EmbeddedClickHouse) -> Iterator[Settings]:
    """A broker with a password, and a database, for all languages together."""
    security = BrokerSecurity(SecretStr(secrets.token_urlsafe(16)))
    clickhouse = clickhouse_server.settings(database=f"producers_{secrets.token_hex(4)}")
    clickhouse_server.command(f"CREATE DATABASE {clickhouse.database} ENGINE = Atomic")
    with EmbeddedKafka(tmp_path_factory.mktemp("producers"), security=security) as server:
        kafka = server.settings(KafkaSettings(topic_prefix="producers.", partitions=PARTITIONS))
        run_in_thread(create_topics(kafka))
        yield Settings(kafka=kafka, clickhouse=clickhouse)
    clickhouse_server.command(f"DROP DATABASE IF EXISTS {clickhouse.database} SYNC")


@pytest.fixture(scope="module")
def refusing(settings: Settings) -> KafkaSettings:
    """Topics of which `rewards` takes no record: each is refused by the broker, whatever the client thinks."""
    kafka = settings.kafka.model_copy(update={"topic_prefix": "refusing."})

    async def create() -> None:
        admin = await connected_admin(kafka)
        try:
            spans = NewTopic(kafka.topic(topics.SPANS), PARTITIONS, 1)
            rewards = NewTopic(kafka.topic(topics.REWARDS), PARTITIONS, 1, topic_configs={"max.message.bytes": "10"})
            await admin.create_topics([spans, rewards])
        finally:
            await admin.close()

    run_in_thread(create())
    return kafka


def fnv1a(data: bytes) -> int:
    """What the Collector's and Sarama's clients take by default."""
    value = 2166136261
    for byte in data:
        value = (value ^ byte) * 16777619 % 2**32
    return value


def right_partition(key: bytes) -> int:
    return murmur2(key) % 2**31 % PARTITIONS


def telling_ids(name: str) -> list[str]:
    """One rollout_id for each partition, such that the other clients' defaults would put it into another one."""
    found: dict[int, str] = {}
    for number in range(10_000):
        key = f"{name}-{number}".encode()
        if right_partition(key) not in {zlib.crc32(key) % PARTITIONS, fnv1a(key) % PARTITIONS}:
            found.setdefault(right_partition(key), key.decode())
        if len(found) == PARTITIONS:
            break
    return list(found.values())


def produce(language: Language, folder: Path, kafka: KafkaSettings, rollout_id: str) -> tuple[int, str]:
    assert kafka.sasl_username
    assert kafka.sasl_password
    environment = {
        **language.environment,
        **({"PATH": str(folder / "bin")} if language.kafka_tools else {}),
        "FULGURITE_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "FULGURITE_KAFKA__TOPIC_PREFIX": kafka.topic_prefix,
        "FULGURITE_KAFKA__SECURITY_PROTOCOL": kafka.security_protocol,
        "FULGURITE_KAFKA__SASL_USERNAME": kafka.sasl_username,
        "FULGURITE_KAFKA__SASL_PASSWORD": kafka.sasl_password.get_secret_value(),
    }
    return execute(language.command(rollout_id, f"{rollout_id}-1"), folder, environment, RUN_SECONDS)


async def partitions_of(kafka: KafkaSettings, key: bytes) -> set[tuple[str, int]]:
    """Where records with this key lie."""
    consumer = AIOKafkaConsumer(**connection_options(kafka), auto_offset_reset="earliest")
    await consumer.start()
    try:
        names = [kafka.topic(topic) for topic in (topics.SPANS, topics.REWARDS)]
        parts = [TopicPartition(name, number) for name in names for number in range(PARTITIONS)]
        consumer.assign(parts)
        ends = await consumer.end_offsets(parts)
        found: set[tuple[str, int]] = set()
        while any([await consumer.position(part) < ends[part] for part in parts]):
            for part, records in (await consumer.getmany(timeout_ms=200)).items():
                found |= {(part.topic, part.partition) for record in records if record.key == key}
        return found
    finally:
        await consumer.stop()


def ask(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    with clickhouse_connect.get_client(
        **clickhouse_options(settings.clickhouse), database=settings.clickhouse.database
    ) as client:
        return [tuple(row) for row in client.query(sql).result_rows]


async def materialise(settings: Settings, rollout_ids: list[str]) -> None:
    """Until what was published of these rollouts, three spans and a reward each time, is in the tables."""
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    wanted = (3 * len(rollout_ids), len(rollout_ids))
    of_them = f"rollout_id IN {tuple(rollout_ids)}"
    sql = (
        f"SELECT (SELECT count() FROM spans WHERE {of_them}), (SELECT count() FROM rewards WHERE {of_them}), "
        "(SELECT groupArray((reason, message, value)) FROM dead_letters)"
    )
    rows: list[tuple[Any, ...]] = []
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not running.done():
            with suppress(Exception):  # the tables are made while we look
                rows = await asyncio.to_thread(ask, settings, sql)
                if rows[0][:2] == wanted or rows[0][2]:
                    break
            await asyncio.sleep(0.1)
    finally:
        stop.set()
        await running
    assert rows == [(*wanted, [])]


def expected_spans(rollout_id: str, service: str, *, lines: bool) -> list[tuple[Any, ...]]:
    """(span_id, parent_span_id, trace_id, name, operation, status, service, input, output, hits, line of its record)"""
    path = f"{rollout_id}/{rollout_id}-1"

    def hex_id(text: str, digits: int) -> str:
        return sha256(text.encode()).hexdigest()[:digits]

    def span(name: str, *rest: Any) -> tuple[Any, ...]:
        parent = "" if name == "answer" else hex_id(f"{path}/answer", 16)
        return (hex_id(f"{path}/{name}", 16), parent, hex_id(path, 32), name, *rest)

    return [
        span("search", "execute_tool", "unset", service, '{"q": "fulgurite"}', '"glass" – made by\nlightning', "3", 0),
        span("calculate", "execute_tool", "unset", service, "6*7", "42", "", int(lines)),
        span("answer", "invoke_agent", "ok", service, "", "", "", 0),
    ]


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
async def test_a_producer_in(
    language: Language, settings: Settings, refusing: KafkaSettings, builds: dict[str, Future[Path]]
) -> None:
    if language.missing:
        pytest.skip(f"not on this machine: {', '.join(language.missing)}")
    folder = await asyncio.wrap_future(builds[language.name])
    kafka = settings.kafka
    rollout_ids = telling_ids(language.name)
    service = f"producer-{language.folder}"
    began_ns = time.time_ns()
    runs = [*rollout_ids, rollout_ids[0]]  # run again, it counts once
    for rollout_id in runs:
        code, output = await asyncio.to_thread(produce, language, folder, kafka, rollout_id)
        assert code == 0, output

    for rollout_id in rollout_ids:
        key = rollout_id.encode()
        wanted = {(kafka.topic(topic), right_partition(key)) for topic in (topics.SPANS, topics.REWARDS)}
        assert await partitions_of(kafka, key) == wanted

    await materialise(settings, runs)
    for rollout_id in rollout_ids:
        of_it = f"WHERE rollout_id = '{rollout_id}' AND attempt_id = '{rollout_id}-1'"
        assert ask(
            settings,
            "SELECT span_id, parent_span_id, trace_id, name, operation, status, service, input, output, "
            f"attributes['hits'], _index FROM distinct_spans {of_it} ORDER BY _offset, _index",
        ) == expected_spans(rollout_id, service, lines=not language.kafka_tools)
        murmur2_says = f"bitAnd(kafkaMurmurHash(rollout_id), 0x7fffffff) % {PARTITIONS}"
        assert ask(settings, f"SELECT DISTINCT {murmur2_says} = _partition FROM spans {of_it}") == [(True,)]
        times = ask(settings, f"SELECT min(start_ns), min(end_ns - start_ns), max(end_ns) FROM spans {of_it}")[0]
        # Some clocks here have milliseconds.
        assert began_ns - 10**6 <= times[0] <= times[2] <= time.time_ns() + 10**6
        assert times[1] >= 0
        assert ask(
            settings, f"SELECT reward_id, name, value, dimensions, source FROM distinct_rewards {of_it}"
        ) == [(f"{rollout_id}-1-reward", "reward", 0.75, {"exact": 1.0, "brief": 0.5}, service)]  # fmt: skip

    code, output = await asyncio.to_thread(produce, language, folder, refusing, rollout_ids[0])
    assert code not in (0, 124), f"the broker refused the reward, and the producer did not say so: {output}"
    assert output.strip()


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_an_example_is_short_and_pinned(language: Language) -> None:
    """Under 80 lines, its header says how to run it, and no file names a package registry."""
    folder = SOURCES / language.folder
    (program,) = [path for path in folder.rglob("*") if path.suffix in {".py", ".java", ".go", ".ts", ".rs", ".sh"}]
    text = program.read_text()
    assert len(text.splitlines()) < 80
    assert "ROLLOUT_ID ATTEMPT_ID" in text
    assert not list(folder.rglob("*lock*"))


def test_the_questions_of_the_contract_can_be_asked(settings: Settings) -> None:
    """The page's SQL, on the tables as they are."""
    page = (ROOT / "docs" / "contract.md").read_text()
    statements = [text for block in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) for text in block.split(";")]
    asked = [ask(settings, text) for text in statements if text.strip()]
    assert len(asked) == 5
