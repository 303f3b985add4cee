"""What the embedded ClickHouse is told: loopback only, bounded memory, two users, both with passwords."""

from __future__ import annotations

import hashlib
from pathlib import Path
from xml.sax.saxutils import escape

from fulgurite.infra.clickhouse_room import KEEP_FREE_BYTES

USER = "app"
READER = "reader"
MERGES = 2
"""At once. However nice they are, four of them hold what inserts wait for (memory's locks, its bandwidth): on two cores
at half load the slowest hundredth of records waited 1.2 to 3.2 seconds with them, and 0.7 with two."""
MERGE_NICE = 10
"""Merges yield to inserts and questions, which somebody waits for: they get a tenth of a core that others want, and all
of one that nobody does. They never starve: too many parts slow inserts down. The engine does so only as root or with
CAP_SYS_NICE, for a thread must come back from it."""
_JOINS = """<enable_join_runtime_filters>1</enable_join_runtime_filters>
            <enable_join_runtime_filters_index_analysis>1</enable_join_runtime_filters_index_analysis>"""
"""What one side of a join has found limits what is read for the other: views join spans with their earlier copies."""

_MIB = 1024 * 1024
_OPENING_BYTES = 16 * _MIB
_FOR_EVER_SECONDS = 2**31 - 1
"""An interval begins at a multiple of it, so this one ends in 2038; the engine crashes with longer ones."""


def config_xml(port: int, log: Path, max_memory_bytes: int) -> str:
    """config.xml of the engine."""
    return f"""\
<clickhouse>
    <listen_host>127.0.0.1</listen_host>
    <http_port>{port}</http_port>
    <users_config>users.xml</users_config>
    <log-level>information</log-level>
    <logger>
        <log>{escape(str(log))}</log>
        <size>16M</size>
        <count>2</count>
    </logger>
    <max_server_memory_usage>{max_memory_bytes}</max_server_memory_usage>
    <mark_cache_size>{64 * _MIB}</mark_cache_size>
    <uncompressed_cache_size>0</uncompressed_cache_size>
    <background_pool_size>{MERGES}</background_pool_size>
    <background_merges_mutations_concurrency_ratio>1</background_merges_mutations_concurrency_ratio>
    <os_threads_nice_value_merge_mutate>{MERGE_NICE}</os_threads_nice_value_merge_mutate>
    <background_schedule_pool_size>8</background_schedule_pool_size>
    <max_concurrent_queries>100</max_concurrent_queries>
    <storage_configuration>
        <disks><default><keep_free_space_bytes>{KEEP_FREE_BYTES}</keep_free_space_bytes></default></disks>
    </storage_configuration>
    <shutdown_wait_unfinished>1</shutdown_wait_unfinished>
</clickhouse>
"""


def users_xml(password: str, reader_password: str, readable_database: str, max_query_memory_bytes: int) -> str:
    """users.xml. The engine's own session, which opens the HTTP server, insists on `default` without a password and
    from loopback, so whoever reaches the port is that user, too. It may do nothing but open or close the server, and
    do so once: its quota is used up by the engine's own statement before anybody can connect. What needs no
    right, functions of constants, it may do one query at a time, with one thread and little memory. No bound on the
    time: the engine's own statement, which never ends, would be under it.

    READER is for dashboards: it may read one database and change settings of its queries, nothing else.
    """
    digest = hashlib.sha256(password.encode()).hexdigest()
    reader_digest = hashlib.sha256(reader_password.encode()).hexdigest()
    loopback = "<networks><ip>127.0.0.1</ip><ip>::1</ip></networks>"
    return f"""\
<clickhouse>
    <profiles>
        <default>
            <max_memory_usage>{max_query_memory_bytes}</max_memory_usage>
            {_JOINS}
        </default>
        <opening>
            <max_concurrent_queries_for_user>1</max_concurrent_queries_for_user>
            <max_memory_usage>{_OPENING_BYTES}</max_memory_usage>
            <max_threads>1</max_threads>
            <constraints>
                <max_concurrent_queries_for_user><readonly/></max_concurrent_queries_for_user>
                <max_memory_usage><readonly/></max_memory_usage>
                <max_threads><readonly/></max_threads>
            </constraints>
        </opening>
        <readonly>
            <readonly>2</readonly>
            <max_memory_usage>{max_query_memory_bytes}</max_memory_usage>
            {_JOINS}
        </readonly>
    </profiles>
    <quotas>
        <default/>
        <opening><interval><duration>{_FOR_EVER_SECONDS}</duration><queries>1</queries></interval></opening>
    </quotas>
    <users>
        <default>
            <password></password>
            {loopback}
            <profile>opening</profile>
            <quota>opening</quota>
            <grants><query>GRANT SYSTEM LISTEN ON *.*</query></grants>
        </default>
        <{USER}>
            <password_sha256_hex>{digest}</password_sha256_hex>
            {loopback}
            <profile>default</profile>
            <quota>default</quota>
        </{USER}>
        <{READER}>
            <password_sha256_hex>{reader_digest}</password_sha256_hex>
            {loopback}
            <profile>readonly</profile>
            <quota>default</quota>
            <grants>
                <query>GRANT SHOW, SELECT ON {readable_database}.*</query>
            </grants>
        </{READER}>
    </users>
</clickhouse>
"""
