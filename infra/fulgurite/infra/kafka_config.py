"""What the embedded broker is told: one node, small, loopback only, everything replicated once."""

from __future__ import annotations

from pathlib import Path

from fulgurite.infra.kafka_security import BrokerSecurity
from fulgurite.schemas.codec import MAX_RECORD_BYTES
from fulgurite.schemas.errors import StartError

BATCH_OVERHEAD_BYTES = 64 * 1024
"""A record batch's header, key and headers, beside the largest value."""


def server_properties(
    broker_port: int,
    controller_port: int,
    log_folder: Path,
    security: BrokerSecurity | None = None,
    fsync: bool = False,
) -> str:
    """server.properties of the node; without `security` whoever is on this machine may connect.

    With `fsync` nothing is acknowledged, in the internal topics neither, that a power failure could take.

    Raises StartError: a data folder that Kafka cannot be told.
    """
    if "," in str(log_folder):
        raise StartError(
            f"Kafka cannot use the data folder {log_folder.parent}: it takes a comma for the end of a folder's name; "
            "choose another with --data or FULGURITE_HOME"
        )
    properties = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"BROKER://127.0.0.1:{broker_port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"BROKER://127.0.0.1:{broker_port}",
        "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "BROKER",
        "log.dirs": _escaped(log_folder),
        # Topics are created by an explicit command, never by a typing error.
        "auto.create.topics.enable": "false",
        "message.max.bytes": MAX_RECORD_BYTES + BATCH_OVERHEAD_BYTES,
        # One node: one copy of everything, also of the internal topics, in few partitions (each costs files).
        "default.replication.factor": 1,
        "min.insync.replicas": 1,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        # A group's first member does not wait for others to come; short sessions are allowed (tests, quick failover).
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1_000,
        # A broker killed and started again is let in only when its former session is over: by default after 9 s.
        "broker.session.timeout.ms": 3_000,
        "broker.heartbeat.interval.ms": 500,
        # None of the empty records, two a second, by which controllers elsewhere see how far they are: they would be a
        # third of what an idle broker costs.
        "metadata.max.idle.interval.ms": 0,
        # A small machine: few threads, small buffers and files.
        "num.network.threads": 2,
        "num.io.threads": 4,
        "background.threads": 2,
        "num.recovery.threads.per.data.dir": 2,
        "log.cleaner.threads": 1,
        "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
        "log.segment.bytes": 256 * 1024 * 1024,
        "log.index.size.max.bytes": 1024 * 1024,
    }
    if fsync:
        properties["log.flush.interval.messages"] = 1
    if security is not None:
        properties |= security.properties()
    return "".join(f"{name}={value}\n" for name, value in properties.items())


def log4j2_config(log: Path) -> str:
    """log4j2.properties: information to a bounded file, warnings also to the console."""
    return f"""\
status=error
appender.file.type=RollingFile
appender.file.name=file
appender.file.fileName={_escaped(log)}
appender.file.filePattern={_escaped(log)}.%i
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d{{ISO8601}} %-5p %c{{1}}: %m%n
appender.file.policies.type=Policies
appender.file.policies.size.type=SizeBasedTriggeringPolicy
appender.file.policies.size.size=8MB
appender.file.strategy.type=DefaultRolloverStrategy
appender.file.strategy.max=2
rootLogger.level=info
rootLogger.appenderRefs=file
rootLogger.appenderRef.file.ref=file
"""


def _escaped(path: Path) -> str:
    """A path in a .properties file, which Java reads as Latin-1 with \\uXXXX (UTF-16) for everything else."""
    units = str(path).encode("utf-16-be", errors="surrogatepass")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if 0x20 <= code < 0x7F and code != 0x5C else f"\\u{code:04x}" for code in codes)
