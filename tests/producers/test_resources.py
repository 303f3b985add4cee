"""Publishing a folder by hand: numbers grow, the same files are published once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulgurite.producers.resources import newest_version, publish_folder
from fulgurite.schemas.checksum import folder_of, folder_sha256
from fulgurite.schemas.codec import encode
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import RESOURCES
from tests.consumers.poison import poison


async def test_numbers_grow_and_the_same_files_are_published_once(settings: Settings, tmp_path: Path):
    (tmp_path / "weights").write_bytes(b"one")
    assert await newest_version(settings.kafka, "policy") is None
    first = await publish_folder(settings, "policy", tmp_path)
    again = await publish_folder(settings, "policy", tmp_path)
    assert (first.version, again) == (1, first)
    assert (folder_of(first.uri), first.sha256) == (tmp_path, folder_sha256(tmp_path))
    await poison(settings.kafka, RESOURCES, encode(first.model_copy(update={"version": 9})), b"policy")
    (tmp_path / "weights").write_bytes(b"two")
    second = await publish_folder(settings, "policy", tmp_path)
    other = await publish_folder(settings, "another", tmp_path)
    assert (second.version, other.version) == (2, 1)
    assert await newest_version(settings.kafka, "policy") == second


async def test_a_missing_folder_is_named(settings: Settings, tmp_path: Path):
    with pytest.raises(SettingsError, match="is not a folder"):
        await publish_folder(settings, "policy", tmp_path / "nothing")
