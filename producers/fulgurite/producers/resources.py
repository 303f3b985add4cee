"""Publishing a version of a resource by hand: what `fulgurite publish` does. The trainer does it in a transaction.

Promises: the number is one more than the newest on `resources`; publishing the same files again while they are the
newest publishes nothing. Two publishers at once are the caller's mistake: followers take whichever record came last.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition

from fulgurite.producers.kafka import connection_options
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.reading import Fetched, fetch_up_to, log_ends, value_of
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import InvalidEvent, SettingsError
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import RESOURCES


async def newest_version(settings: KafkaSettings, resource: str) -> ResourceVersion | None:
    """The newest committed version of `resource` on the topic, None where there is none. Waits for transactions that
    are still open: the next number may be in one."""
    name = settings.topic(RESOURCES)
    # Not seek_to_beginning: it may lose against the client's own search for a position, and the topic looks empty.
    consumer = AIOKafkaConsumer(
        **connection_options(settings),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(name, p) for p in sorted(consumer.partitions_for_topic(name) or {0})]
        consumer.assign(partitions)
        newest: ResourceVersion | None = None
        async for fetched in fetch_up_to(settings, consumer, await log_ends(settings, partitions)):
            for records in fetched.values():
                for record in records:
                    found = _version_of(record, resource)
                    if found and (newest is None or found.version >= newest.version):
                        newest = found
        return newest
    finally:
        await consumer.stop()


def _version_of(record: Fetched, resource: str) -> ResourceVersion | None:
    try:
        version = decode(ResourceVersion, value_of(record))
    except InvalidEvent:
        return None  # the materialiser keeps it as a dead letter; here it is just not a version
    return version if version.resource == resource else None


def _files(folder: Path) -> tuple[str, str]:
    """URI and checksum of a folder's files."""
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder: give the folder of the model's files")
    return folder.resolve().as_uri(), folder_sha256(folder)


async def publish_folder(settings: Settings, resource: str, folder: Path, run_id: str = "") -> ResourceVersion:
    """Publishes the files in `folder` as the next version of `resource`; gives the version that is now the newest."""
    uri, sha256 = await asyncio.to_thread(_files, folder)
    newest = await newest_version(settings.kafka, resource)
    if newest and newest.sha256 == sha256:
        return newest
    version = ResourceVersion(
        resource=resource,
        version=newest.version + 1 if newest else 1,
        uri=uri,
        sha256=sha256,
        run_id=run_id,
    )
    async with Publisher(settings.kafka, settings.producer) as publisher:
        await (await publisher.publish(RESOURCES, resource, version))
    return version
