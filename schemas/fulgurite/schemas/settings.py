"""Every setting of every service: its name, meaning, default and bounds, in one tree.

Read from, in this order of precedence:
1. the environment: FULGURITE_<SECTION>__<NAME>, for example FULGURITE_KAFKA__BOOTSTRAP_SERVERS;
2. a TOML file: FULGURITE_CONFIG, else fulgurite.toml in the data folder (FULGURITE_HOME, default .fulgurite), which the
   embedded stores write when they start, so that every command finds them;
3. the defaults below.

A wrong or unknown setting raises SettingsError naming it and where it came from. Knows nothing of services' code.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from fulgurite.schemas.addresses import is_loopback
from fulgurite.schemas.algorithm_settings import AggregatorSettings as AggregatorSettings
from fulgurite.schemas.algorithm_settings import AlgorithmSettings as AlgorithmSettings
from fulgurite.schemas.algorithm_settings import ComplianceSettings as ComplianceSettings
from fulgurite.schemas.algorithm_settings import PromptSettings as PromptSettings
from fulgurite.schemas.algorithm_settings import RewardSource as RewardSource
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.gateway_settings import ApiKeySettings as ApiKeySettings
from fulgurite.schemas.gateway_settings import BackendSettings as BackendSettings
from fulgurite.schemas.gateway_settings import GatewaySettings as GatewaySettings
from fulgurite.schemas.ids import Id
from fulgurite.schemas.kafka_settings import KafkaSettings as KafkaSettings
from fulgurite.schemas.log_settings import LogSettings
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.retention import RetentionSettings
from fulgurite.schemas.sections import Port, Seconds, Url
from fulgurite.schemas.sections import Section as Section
from fulgurite.schemas.setting_names import section_of, wrong_name, wrong_variable
from fulgurite.schemas.source_settings import SourceSettings as SourceSettings
from fulgurite.schemas.trainer_settings import TrainerSettings as TrainerSettings

ENV_PREFIX = "FULGURITE_"
ENV_CONFIG = "FULGURITE_CONFIG"
ENV_HOME = "FULGURITE_HOME"
CONFIG_NAME = "fulgurite.toml"
DEFAULT_HOME = ".fulgurite"

_USER_IN_URL = re.compile(r"//[^/\s]*@")


class ClickHouseSettings(Section):
    url: Url = "http://127.0.0.1:8123"
    """HTTP interface."""
    user: str = "default"
    """User that may create the database and insert."""
    password: SecretStr = SecretStr("")
    """Its password."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")] = "fulgurite"
    """One database is one namespace, as one topic prefix is."""
    fsync: bool = False
    """Whether an insert is on disk before it counts, so that a power failure takes nothing; kill -9 never does. Costs
    about a fifth of the rate of small inserts, less of large ones."""
    ssl_cafile: Path | None = None
    """For https: certificate authority to trust; the usual ones when empty."""
    ssl_certfile: Path | None = None
    """For https: our own certificate (PEM), for servers that ask for one."""
    ssl_keyfile: Annotated[Path | None, Field(validate_default=True)] = None
    """The private key of ssl_certfile (PEM, without a password)."""
    ssl_verify: bool = True
    """For https: whether the server's certificate must be trusted. Without it anyone between can read and write."""

    @field_validator("url")
    @classmethod
    def _url_has_a_port_that_exists(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.hostname is not None and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be http://host:port or https://host:port with a port from 1 to 65535")
        return url

    @field_validator("ssl_cafile", "ssl_certfile", "ssl_keyfile")
    @classmethod
    def _files_are_used(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is not None:
            try:
                path.read_bytes()
            except OSError as error:
                raise ValueError(f"must be a readable file ({error.strerror})") from None
            if not str(info.data.get("url", "https:")).startswith("https:"):
                raise ValueError("has no effect: clickhouse.url is not https://")
        return path

    @field_validator("ssl_keyfile")
    @classmethod
    def _certificate_has_a_key(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if "ssl_certfile" in info.data and (path is None) != (info.data["ssl_certfile"] is None):
            raise ValueError("clickhouse.ssl_certfile and clickhouse.ssl_keyfile belong together: set both or none")
        return path


class ProducerSettings(Section):
    buffer_records: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    """Records accepted but not yet acknowledged; beyond it publish waits."""
    buffer_wait_seconds: Seconds = 30.0
    """Longest that publish waits for room before it raises BufferFull."""
    linger_ms: Annotated[int, Field(ge=0, le=10_000)] = 2
    """How long a batch waits for company; the gateway, whose answers wait for it, does not unless this is set."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "zstd"
    """Of batches on the wire and on disk. 1 MB of spans becomes 85 kB in 3 ms with zstd, 185 kB in 1 ms with snappy,
    130 kB in 13 ms with lz4 (aiokafka only has its high level)."""
    delivery_seconds: Seconds = 120.0
    """Longest that flush and close wait for acknowledgements before they report what is undelivered."""


class CoordinatorSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 4747
    """Port to listen on."""
    url: Url = "http://127.0.0.1:4747"
    """Where runners and trainers find it."""
    tick_seconds: Seconds = 0.25
    """How often it looks for attempts that timed out or fell silent."""
    max_rollouts_in_memory: Annotated[int, Field(ge=1)] = 1_000_000
    """Ended rollouts beyond it are forgotten, oldest first; open ones never are."""


class PolicyServerSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 4760
    """Port to listen on."""
    model: Path | None = None
    """Folder of the model to start with; empty: answers 503 until a follower loads a version."""
    served_model_name: str = "policy"
    """The `model` agents ask for."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """torch threads; on two cores one is faster than two."""
    max_new_tokens: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Cap of tokens generated per call."""
    max_waiting_requests: Annotated[int, Field(ge=1, le=100_000)] = 1_024
    """Requests queued beyond it are refused with 503."""


class FollowerSettings(Section):
    servers: list[Url] = Field(default_factory=lambda: ["http://127.0.0.1:4760"])
    """Every policy server to keep at the newest version."""
    resource: Id = "policy"
    """Which resource to follow."""
    group: str = ""
    """Of the followers of one resource with the same group one acts, the others wait for its end. Empty: those of the
    same servers are one group; addresses of this host (127.0.0.1) are those of other hosts only under one host name."""
    session_seconds: Annotated[float, Field(ge=1, le=1_800)] = 10.0
    """Kafka session timeout: so long after the last sign of life of the follower that acts another one may."""
    check_seconds: Seconds = 1.0
    """How often each server is asked which version it serves: restarted ones converge."""
    request_seconds: Seconds = 60.0
    """Longest one request to a server may take; loading a version's files and hashing weights are such requests."""
    api_key: SecretStr = SecretStr("")
    """Sent to the servers as a bearer token, for vLLM's --api-key; none when empty."""
    rollout_policy: Literal["rolling", "together"] = "rolling"
    """rolling: at most one server is paused at a time; together: all at once, so that versions differ for less long."""
    check_weights: bool = True
    """Whether the weights a server has are hashed after each load, while it is paused: about a second for each GB."""
    load: Literal["files", "transfer"] = "files"
    """How weights reach a server. files: it reads the version's folder, which it must see; transfer: a process beside
    the follower sends it the tensors from GPU to GPU (vLLM's weight-transfer routes, NCCL; docs/vllm.md). A server
    without these routes is given files."""
    transfer_python: str = ""
    """Interpreter that has the servers' vLLM, for transfer; the follower's own when empty."""
    transfer_device: str = "cuda:0"
    """Where tensors are held while they are sent."""
    transfer_host: str = "127.0.0.1"
    """This machine, as the servers' workers reach it for transfer; loopback where all of them are on it."""
    cache_folder: Path = Path(".fulgurite/versions")
    """Where files from object stores, and adapters, are kept; of one follower alone, and the servers must see it."""
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 200 << 30
    """Most that the cache holds."""
    keep_versions: Annotated[int, Field(ge=1, le=1_000)] = 4
    """Newest versions kept in the cache, and as adapters in the servers; what is served or pinned stays besides."""
    pinned_versions: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1_000)] = Field(default_factory=list)
    """Versions that stay in the cache, and as adapters in the servers, however old they are. Weights in a local folder
    are not copied: whoever publishes them keeps them (trainer.keep_versions)."""
    drain_seconds: Seconds = 3_600.0
    """Longest that an unloaded adapter's files stay where its server does not tell that no request is on it
    (docs/vllm.md); not below what the gateway's callers wait for an answer (gateway.answer_seconds)."""
    host: str = "127.0.0.1"
    """Where /metrics, /ready and /health listen."""
    port: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """0: nowhere."""

    @field_validator("transfer_host")
    @classmethod
    def _reachable(cls, host: str, info: ValidationInfo) -> str:
        # The workers of a server that looks for it in vain serve nobody for minutes.
        away = [url for url in info.data.get("servers", []) if not is_loopback(urlsplit(url).hostname or "")]
        if info.data.get("load") == "transfer" and away and is_loopback(host):
            raise ValueError(f"{away[0]} cannot reach {host}: set it to this machine's address in their network")
        return host


class RunnerSettings(Section):
    agent: str = ""
    """The agent, as module:function."""
    concurrency: Annotated[int, Field(ge=1, le=4_096)] = 16
    """Agents at once."""
    worker_id: str = ""
    """Name of this runner; host and process id when empty."""
    heartbeat_seconds: Seconds = 5.0
    """How often it tells the coordinator what it works on."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 10.0
    """How long one ask for work may wait."""
    shutdown_seconds: Seconds = 10.0
    """How long running agents may go on after SIGTERM."""


class MaterialiserSettings(Section):
    group: str = "materialiser"
    """Consumer group, after the topic prefix."""
    batch_records: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    """Most records of one insert."""
    batch_wait_ms: Annotated[int, Field(ge=1, le=60_000)] = 200
    """Longest that a record waits for company: an insert costs tens of milliseconds of CPU, however small it is."""
    insert_seconds: Seconds = 30.0
    """Longest one insert may take before its partitions are fenced anew and what is missing is tried again. A large
    record that alone takes longer gets more at each try, up to 16 times as much."""
    session_seconds: Seconds = 45.0
    """Kafka session timeout: so long after its last sign of life a consumer's partitions move to others."""
    host: str = "127.0.0.1"
    """Where /metrics, /ready and /health listen."""
    port: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """0: nowhere."""
    ready_lag_seconds: Seconds = 30.0
    """A record that waits longer makes the service not ready: it does not keep up."""
    stop_seconds: Seconds = 15.0
    """Longest that the service takes to end when it is told to. Where Kafka or ClickHouse do not answer it then ends as
    it is, with exit code 1; the next one goes on as after a crash."""


class AssemblerSettings(Section):
    max_open_rollouts: Annotated[int, Field(ge=1)] = 100_000
    """Rollouts whose records are kept in memory at once; of others only coordinates are, and they are read again."""
    orphan_seconds: Seconds = 900.0
    """Spans and rewards of a rollout nobody announced become dead letters after this."""
    commit_ms: Annotated[int, Field(ge=1, le=60_000)] = 50
    """Longest that a finished trajectory waits for its transaction."""
    otlp_wait_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """Longest that a succeeded rollout without a reward waits for one that came as OTLP and that the translator has not
    published yet (docs/contract.md#otlp); then its trajectory is `no_reward`. Without a translator nobody waits. 0:
    never. Keep it below trainer.group_deadline_seconds."""
    otlp_settle_seconds: Annotated[float, Field(ge=0, le=3_600)] = 1.0
    """Longest that a Collector takes to write to Kafka what it has accepted: ours batches for 0.2 s. So much of that
    wait passes before it is asked what the translator must have read."""
    metrics_host: str = "127.0.0.1"
    """Where /metrics and /health listen."""
    metrics_port: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """0: nowhere."""
    output: Literal["trajectories", "attempts"] = "trajectories"
    """Where trajectories go. trajectories: to trainers; attempts: with their spans to the aggregator, which publishes
    them with their rewards (docs/algorithms.md)."""


class Settings(Section):
    """All of them. A service reads its own section, `kafka` and `log`."""

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    clickhouse: ClickHouseSettings = Field(default_factory=ClickHouseSettings)
    producer: ProducerSettings = Field(default_factory=ProducerSettings)
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    redaction: RedactionSettings = Field(default_factory=RedactionSettings)
    coordinator: CoordinatorSettings = Field(default_factory=CoordinatorSettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    policy_server: PolicyServerSettings = Field(default_factory=PolicyServerSettings)
    follower: FollowerSettings = Field(default_factory=FollowerSettings)
    runner: RunnerSettings = Field(default_factory=RunnerSettings)
    materialiser: MaterialiserSettings = Field(default_factory=MaterialiserSettings)
    assembler: AssemblerSettings = Field(default_factory=AssemblerSettings)
    trainer: TrainerSettings = Field(default_factory=TrainerSettings)
    source: SourceSettings = Field(default_factory=SourceSettings)
    algorithm: AlgorithmSettings = Field(default_factory=AlgorithmSettings)
    aggregator: AggregatorSettings = Field(default_factory=AggregatorSettings)
    compliance: ComplianceSettings = Field(default_factory=ComplianceSettings)
    prompt: PromptSettings = Field(default_factory=PromptSettings)
    log: LogSettings = Field(default_factory=LogSettings)


def home(env: Mapping[str, str] = os.environ) -> Path:
    """The data folder: FULGURITE_HOME, else .fulgurite in the working directory."""
    return Path(env.get(ENV_HOME, DEFAULT_HOME))


def load_settings(env: Mapping[str, str] = os.environ) -> Settings:
    """Settings from file and environment. Raises SettingsError: which setting, from where, what is allowed."""
    path = Path(env[ENV_CONFIG]) if ENV_CONFIG in env else home(env) / CONFIG_NAME
    tree: dict[str, Any] = {}
    if path.is_file():
        tree = _read_file(path)
    elif ENV_CONFIG in env:
        raise SettingsError(f"{ENV_CONFIG} names {path}, which is not a file")
    from_env: dict[tuple[str, ...], str] = {}
    wrong: list[str] = []
    for name, value in env.items():
        if not name.startswith(ENV_PREFIX) or name in (ENV_CONFIG, ENV_HOME):
            continue
        if unknown := wrong_variable(Settings, ENV_PREFIX, (ENV_CONFIG, ENV_HOME), name):
            # Not into the tree, where a section of that name would seem to be the file's.
            wrong.append(unknown)
        else:
            _put(tree, from_env, name, value)
    try:
        found = Settings.model_validate(tree)
    except ValidationError as error:
        wrong += _explain(error, path, from_env)
    else:
        if not wrong:
            return found
    raise SettingsError("wrong settings:\n  " + "\n  ".join(wrong))


def to_environment(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Settings by section as environment variables, for child processes.

    >>> to_environment({"kafka": {"partitions": 2}})
    {'FULGURITE_KAFKA__PARTITIONS': '2'}
    """
    import json

    found: dict[str, str] = {}
    for section, fields in values.items():
        for name, value in fields.items():
            if value is None:
                continue  # what may be not set is not set by default
            text = value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)
            found[f"{ENV_PREFIX}{section.upper()}__{name.upper()}"] = text
    return found


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {path}: {error}") from None


def _put(tree: dict[str, Any], from_env: dict[tuple[str, ...], str], name: str, value: str) -> None:
    section, _, field = name.removeprefix(ENV_PREFIX).lower().partition("__")
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise SettingsError(f"{name}: {section} is not a section in the settings file")
    branch[field] = _parse(name, section_of(Settings, section).model_fields[field].annotation, value)
    from_env[(section, field)] = name


def _parse(name: str, annotation: object, value: str) -> Any:
    """Lists and tables come as JSON; everything else pydantic reads from the text itself."""
    import json

    if not str(annotation).startswith(("list", "dict")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{name}: must be JSON ({error})") from None


def _explain(error: ValidationError, path: Path, from_env: Mapping[tuple[str, ...], str]) -> list[str]:
    """A line for each thing that is wrong."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        where = tuple(str(part) for part in item["loc"])
        source = f"{'.'.join(where)} in {path}"
        if variable := from_env.get(where[:2]):
            source = ", ".join(filter(None, (variable, ".".join(where[2:]))))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{source}: {wrong_name(Settings, where)}")
        elif item["input"] is None:  # neither TOML nor the environment can say None
            lines.append(f"{'.'.join(where)}, not set in the environment or in {path}: {message}")
        elif item["type"] == "missing" or _may_be_secret(where):  # of a missing one the input is all that is beside it
            lines.append(f"{source}: {message}")
        else:
            # An address may have a password in it.
            lines.append(f"{source} = {_USER_IN_URL.sub('//***@', repr(item['input']))}: {message}")
    return lines


def _may_be_secret(where: tuple[str, ...]) -> bool:
    """Whether the value must not be shown: a password, or what may have one in it: a section, a table of a list."""
    if len(where) < 2 or where[0] not in Settings.model_fields:
        return True
    known: Any = section_of(Settings, where[0])
    for name in where[1:]:
        if isinstance(known, type) and issubclass(known, BaseModel):
            if name not in known.model_fields:
                return True
            known = known.model_fields[name].annotation
        elif name.isdigit() and get_args(known):
            known = get_args(known)[0]
    return _holds_secret(known)


def _holds_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_holds_secret(part) for part in get_args(annotation))
