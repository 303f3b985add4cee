"""One writer of a resource at a time, told from the real topic."""

from __future__ import annotations

import pytest

from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings
from fulgurite.schemas.topics import RESOURCES
from fulgurite.streams.trainer.events import version_event_id
from fulgurite.streams.trainer.ownership import Ownership, ResourceTaken
from tests.consumers.poison import poison


async def announce(kafka: KafkaSettings, *versions: tuple[str, int, str], resource: str = "policy") -> None:
    """(run_id, version, event_id); an empty event_id is the trainer's."""
    async with Publisher(kafka, ProducerSettings()) as publisher:
        for run_id, number, event_id in versions:
            version = ResourceVersion(
                event_id=event_id or version_event_id(run_id, number),
                resource=resource, version=number, uri="file:///x", sha256="0" * 64, run_id=run_id,
            )  # fmt: skip
            await (await publisher.publish(RESOURCES, resource, version))


async def test_a_new_run_takes_over_and_is_alone_from_then_on(kafka_settings: KafkaSettings) -> None:
    run = Ownership(kafka_settings, "policy", "new")
    assert await run.take_over() == 0
    await announce(kafka_settings, ("old", 7, ""))
    run = Ownership(kafka_settings, "policy", "new")
    assert await run.take_over() == 7
    await announce(kafka_settings, ("old", 30, ""), resource="another")
    await poison(kafka_settings, RESOURCES, b"{}", b"policy")
    await run.check()
    await announce(kafka_settings, ("new", 8, ""), ("new", 9, ""))
    await run.check()
    # Between a look and the commit: the foreign one lies before our own, with the same number.
    await announce(kafka_settings, ("old", 10, ""), ("new", 10, ""))
    with pytest.raises(ResourceTaken, match="version 10 was announced by run old") as raised:
        await run.check()
    assert raised.value.exit_code == 2


async def test_a_run_goes_on_only_while_the_newest_version_is_its_own(kafka_settings: KafkaSettings) -> None:
    await announce(kafka_settings, ("old", 1, ""), ("run", 2, ""), ("run", 3, ""))
    await Ownership(kafka_settings, "policy", "run").check()
    with pytest.raises(ResourceTaken, match="version 2 was announced by run run"):
        await Ownership(kafka_settings, "policy", "old").check()
    with pytest.raises(ResourceTaken):  # compaction took what it had announced
        await Ownership(kafka_settings, "policy", "forgotten").check()
    await announce(kafka_settings, ("run", 4, "by-hand"))  # `fulgurite publish` with this run's settings
    with pytest.raises(ResourceTaken, match="version 4"):
        await Ownership(kafka_settings, "policy", "run").check()
