"""Files fetched from an object store: whole or not at all, resumed, verified, bounded, never taken from a server."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fulgurite.consumers.follower import store
from fulgurite.consumers.follower.cache import Cache
from fulgurite.consumers.follower.store import StoredFolder, StoreTrouble, Unusable
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings
from tests.consumers.follower_support import make_version

_BUCKETS = itertools.count()

CatFile = Callable[..., bytes]


def put(folder: Path, number: int, size_bytes: int = 100, sha256: str = "") -> ResourceVersion:
    """A version that lies in a bucket of its own, and nowhere else."""
    files = folder / f"v{number}"
    (files / "tokenizer").mkdir(parents=True)
    (files / "weights.txt").write_text(str(number * 10))
    (files / "model.safetensors").write_bytes(bytes([number]) * size_bytes)
    (files / "tokenizer" / "empty.json").write_bytes(b"")
    bucket = f"memory://bucket{next(_BUCKETS)}/v{number}"
    MemoryFileSystem().put(str(files), bucket, recursive=True)
    version = make_version(folder, number, uri=bucket, sha256=sha256)
    shutil.rmtree(files)
    return version


@pytest.fixture
def settings(tmp_path: Path) -> FollowerSettings:
    return FollowerSettings(cache_folder=tmp_path / "cache", keep_versions=2)


@pytest.fixture
def cat_file(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[CatFile], CatFile]], None]:
    """Wraps the store's reads."""
    original = MemoryFileSystem.cat_file

    def wrap(around: Callable[[CatFile], CatFile]) -> None:
        monkeypatch.setattr(MemoryFileSystem, "cat_file", around(original))

    return wrap


def versions_in(cache: Cache) -> list[int]:
    return [entry.version for entry in cache.entries()]


def test_a_folder_is_fetched_once_and_found_again(settings: FollowerSettings, tmp_path: Path, cat_file: Any):
    version = put(tmp_path, 1)
    cache = Cache(settings)
    folder = cache.fetch(version)
    assert folder == cache.place(version)
    assert folder_sha256(folder) == version.sha256
    cache.close()

    def forbidden(original: CatFile) -> CatFile:
        return lambda *_, **__: pytest.fail("fetched again")

    cat_file(forbidden)
    again = Cache(settings)
    assert again.fetch(version) == folder
    again.close()


def test_a_killed_fetch_goes_on_inside_a_file(
    settings: FollowerSettings, tmp_path: Path, cat_file: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "CHUNK_BYTES", 10)
    version = put(tmp_path, 1, size_bytes=95)
    reads: list[tuple[str, int]] = []

    def breaks_after(count: int) -> Callable[[CatFile], CatFile]:
        def around(original: CatFile) -> CatFile:
            def read(fs: Any, path: str, start: int, end: int) -> bytes:
                if path.endswith("safetensors"):
                    reads.append((path, start))
                    if len(reads) > count:
                        raise ConnectionResetError("gone")
                return original(fs, path, start=start, end=end)

            return read

        return around

    cat_file(breaks_after(4))
    cache = Cache(settings)
    with pytest.raises(StoreTrouble, match="gone"):
        cache.fetch(version)
    assert not cache.place(version).exists(), "a folder that is there is whole"
    cache.close()
    reads.clear()
    cat_file(breaks_after(1_000))
    cache = Cache(settings)
    assert folder_sha256(cache.fetch(version)) == version.sha256
    assert [start for _, start in reads] == [40, 50, 60, 70, 80, 90]
    cache.close()


def test_damaged_bytes_are_fetched_anew_once_and_then_refused(
    settings: FollowerSettings, tmp_path: Path, cat_file: Any
):
    damaged = iter([True, False])

    def around(original: CatFile) -> CatFile:
        def read(fs: Any, path: str, start: int, end: int) -> bytes:
            found = original(fs, path, start=start, end=end)
            return b"x" * len(found) if path.endswith("safetensors") and next(damaged, True) else found

        return read

    cat_file(around)
    cache = Cache(settings)
    version = put(tmp_path, 1)
    assert folder_sha256(cache.fetch(version)) == version.sha256
    with pytest.raises(Unusable, match="announced was"):
        cache.fetch(put(tmp_path, 2))
    assert versions_in(cache) == [1]
    assert not list(cache.place(version).parent.glob(".partial-*"))
    cache.close()


def test_a_copy_that_was_changed_is_fetched_again(settings: FollowerSettings, tmp_path: Path):
    version = put(tmp_path, 1)
    cache = Cache(settings)
    (cache.fetch(version) / "weights.txt").write_text("666")
    assert (cache.fetch(version) / "weights.txt").read_text() == "10"
    cache.close()


def test_a_copy_that_was_changed_stays_until_the_right_one_is_there(
    settings: FollowerSettings, tmp_path: Path, cat_file: Any
):
    version = put(tmp_path, 1)
    cache = Cache(settings)
    changed = cache.fetch(version) / "weights.txt"
    changed.write_text("666")
    seen: list[str] = []

    def around(original: CatFile) -> CatFile:
        def read(fs: Any, path: str, start: int, end: int) -> bytes:
            seen.append(changed.read_text())
            if len(seen) == 1:
                raise ConnectionResetError("gone")
            return original(fs, path, start=start, end=end)

        return read

    cat_file(around)
    with pytest.raises(StoreTrouble, match="gone"):
        cache.fetch(version)
    assert changed.read_text() == "666", "a server may have it"
    assert folder_sha256(cache.fetch(version)) == version.sha256
    assert set(seen) == {"666"}
    cache.close()


def test_links_to_files_are_followed_as_the_checksum_does(settings: FollowerSettings, tmp_path: Path):
    version = make_version(tmp_path, 1)
    blob = tmp_path / "v1" / "weights.txt"
    blob.rename(tmp_path / "blob")
    blob.symlink_to(tmp_path / "blob")
    cache = Cache(settings)
    copy = cache.fetch(version) / "weights.txt"
    assert copy.read_text() == "10"
    assert not copy.is_symlink()
    cache.close()


@pytest.mark.parametrize("target", ["nowhere", "folder"])
def test_a_link_to_what_is_no_file_is_refused(tmp_path: Path, target: str):
    version = make_version(tmp_path, 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "v1" / "link").symlink_to(tmp_path / target)
    with pytest.raises(Unusable, match="link to something that is no file"):
        StoredFolder(version.uri).files()


def test_an_object_that_is_also_a_folder_is_refused(monkeypatch: pytest.MonkeyPatch):
    def find(*_: object, **__: object) -> dict[str, dict[str, Any]]:
        return {f"/bucket/v1/{name}": {"type": "file", "size": 1} for name in ("a", "a/b")}

    monkeypatch.setattr(MemoryFileSystem, "find", find)
    with pytest.raises(Unusable, match="'a' and one below it, 'a/b'"):
        StoredFolder("memory://bucket/v1").files()


def test_a_copy_of_a_local_folder_with_a_space_in_its_name(settings: FollowerSettings, tmp_path: Path):
    version = make_version(tmp_path / "my models", 1)
    assert "%20" in version.uri
    cache = Cache(settings)
    assert folder_sha256(cache.fetch(version)) == version.sha256
    cache.close()


def test_what_will_not_change_is_unusable(settings: FollowerSettings, tmp_path: Path):
    for uri, why in {
        "memory://nowhere/v1": "no file below",
        "https://example.org/v1": "must begin with",
        "simplecache::memory://bucket/v1": "must begin with",
        "oci://bucket/v1": "ocifs",
        (tmp_path / "nowhere").as_uri(): "no file below",
    }.items():
        with pytest.raises(Unusable, match=why):
            StoredFolder(uri).files()


def test_names_that_lead_out_of_the_folder_are_refused(monkeypatch: pytest.MonkeyPatch):
    def find(*_: object, **__: object) -> dict[str, dict[str, Any]]:
        return {"/bucket/v1/../../escape": {"type": "file", "size": 1}}

    monkeypatch.setattr(MemoryFileSystem, "find", find)
    with pytest.raises(Unusable, match="names no file below"):
        StoredFolder("memory://bucket/v1").files()


def test_old_copies_go_but_not_what_is_served_or_pinned(settings: FollowerSettings, tmp_path: Path):
    cache = Cache(settings.model_copy(update={"pinned_versions": [2]}))
    for number in range(1, 8):
        cache.fetch(put(tmp_path, number))
    cache.claim("http://one", [3])
    cache.claim("http://two", [4, 7])
    assert cache.collect() == [1, 5]
    assert versions_in(cache) == [2, 3, 4, 6, 7]
    cache.claim("http://one", [7])
    assert cache.collect() == [], "a claim goes only by name"
    cache.claim("http://one", [7], done_with=[3, 7])
    assert cache.collect() == [3]
    cache.close()


def test_the_next_start_knows_what_servers_that_are_away_have(settings: FollowerSettings, tmp_path: Path):
    settings = settings.model_copy(update={"servers": ["http://one/"], "keep_versions": 1})
    cache = Cache(settings)
    for number in (1, 2, 3):
        cache.fetch(put(tmp_path, number))
    cache.claim("http://one", [1])
    cache.claim("http://not-followed-any-more", [2])
    cache.close()
    cache = Cache(settings)
    cache.fetch(put(tmp_path, 4))
    assert cache.collect() == [2, 3]
    assert versions_in(cache) == [1, 4]
    cache.close()


def test_a_claim_before_the_cache_is_open_takes_none_of_the_claims_of_the_follower_before(
    settings: FollowerSettings, tmp_path: Path
):
    """Of two servers, one is looked at while the other one's first fetch opens the cache."""
    settings = settings.model_copy(update={"servers": ["http://one"], "keep_versions": 1})
    cache = Cache(settings)
    for number in (1, 2, 3):
        cache.fetch(put(tmp_path, number))
    cache.claim("http://one", [1, 2])
    cache.close()
    cache = Cache(settings)
    cache.claim("http://one", [2])
    cache.fetch(put(tmp_path, 4))
    cache.claim("http://one", [2, 4], done_with=[3])
    assert cache.claimed("http://one") == {1, 2, 4}
    assert cache.collect() == [3]
    cache.close()
    again = Cache(settings)
    again.fetch(put(tmp_path, 5))
    assert again.claimed("http://one") == {1, 2, 4}
    again.close()


def test_the_cache_stays_within_its_bytes(settings: FollowerSettings, tmp_path: Path):
    cache = Cache(settings.model_copy(update={"cache_bytes": 3_000_000, "keep_versions": 100}))
    for number in (1, 2, 3):
        cache.fetch(put(tmp_path, number, size_bytes=990_000))
    cache.claim("http://one", [1])
    cache.fetch(put(tmp_path, 4, size_bytes=990_000))
    assert versions_in(cache) == [1, 3, 4]
    cache.claim("http://two", [3, 4])
    with pytest.raises(StoreTrouble, match=r"follower\.cache_bytes"):
        cache.fetch(put(tmp_path, 5, size_bytes=990_000))
    assert versions_in(cache) == [1, 3, 4]
    cache.close()


def test_a_cache_is_of_one_follower_until_it_dies(settings: FollowerSettings, tmp_path: Path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
            "sys.stdin.read()",
            str(_made(settings.cache_folder / "policy") / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        cache = Cache(settings)
        version = put(tmp_path, 1)
        with pytest.raises(StoreTrouble, match="another follower"):
            cache.fetch(version)
    finally:
        holder.kill()
        holder.communicate()
    cache.fetch(version)
    cache.close()


def test_a_stop_ends_a_fetch_between_two_chunks(
    settings: FollowerSettings, tmp_path: Path, cat_file: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "CHUNK_BYTES", 10)
    cache = Cache(settings)

    def around(original: CatFile) -> CatFile:
        def read(fs: Any, path: str, start: int, end: int) -> bytes:
            if path.endswith("safetensors") and start == 50:
                cache.stop()
            return original(fs, path, start=start, end=end)

        return read

    cat_file(around)
    with pytest.raises(StoreTrouble, match="stopped"):
        cache.fetch(put(tmp_path, 1))
    cache.close()


KILLED = """
import sys, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from fulgurite.consumers.follower import store
from fulgurite.consumers.follower.cache import Cache
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings

store.CHUNK_BYTES = 10
original = LocalFileSystem.cat_file

def read(self, path, start, end):
    if path.endswith("safetensors") and start == 50:
        print("half", flush=True)
        time.sleep(60)
    return original(self, path, start=start, end=end)

LocalFileSystem.cat_file = read
Cache(FollowerSettings(cache_folder=Path(sys.argv[1]))).fetch(ResourceVersion.model_validate_json(sys.argv[2]))
"""


@pytest.mark.chaos
def test_kill_9_in_the_middle_of_a_fetch_leaves_what_the_next_start_goes_on_with(
    settings: FollowerSettings, tmp_path: Path
):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "model.safetensors").write_bytes(bytes(range(100)))
    version = make_version(tmp_path, 1)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(settings.cache_folder), version.model_dump_json()], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    cache = Cache(settings)
    place = cache.place(version)
    assert not place.exists()
    partial = place.parent / f".partial-{version.sha256}" / "model.safetensors"
    before = partial.stat().st_ino
    folder = cache.fetch(version)
    assert folder_sha256(folder) == version.sha256
    assert (folder / "model.safetensors").stat().st_ino == before, "the half file was completed, not replaced"
    cache.close()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
