"""One server's loop against a fake policy server: every step may fail or be the last one before a crash."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import aiohttp
import pytest
from starlette.requests import Request
from starlette.responses import Response

from fulgurite.consumers.follower.files import Verified
from fulgurite.consumers.follower.loading import Shared
from fulgurite.consumers.follower.owner import Lease
from fulgurite.consumers.follower.server import LABEL_LOADING, Refused, Unreachable
from fulgurite.consumers.follower.store import StoreTrouble
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.resources import ResourceVersion
from tests.consumers.follower_support import Follower, following, make_version
from tests.producers.fake_policy_server import FakePolicyServer, until


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def server() -> AsyncGenerator[FakePolicyServer]:
    async with FakePolicyServer() as server:
        yield server


def serves(server: FakePolicyServer, version: int) -> bool:
    return (server.label, server.weights, server.paused) == (str(version), version * 10, False)


async def test_a_server_is_brought_to_the_newest_version(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "2", 20
    follower = Follower(server, session, make_version(tmp_path, 3))
    await follower.loop.step()
    assert serves(server, 3)
    assert server.log == [
        *("/weight_info", "/is_paused", "/pause", "/weight_info", "/is_paused", "/update_weight_version"),
        *("/collective_rpc", "/weight_info", "/is_paused", "/update_weight_version"),
        *("/resume", "/weight_info", "/is_paused"),
    ]
    (event,) = follower.events
    assert (event.run_id, event.resource, event.version, event.server, event.ok) == (
        "run",
        "policy",
        3,
        server.url,
        True,
    )
    assert event.seconds.keys() == {"verify", "turn", "pause", "load", "check", "resume", "total", "published"}


async def test_a_fresh_follower_loads_what_the_label_says_once_and_then_leaves_the_server_alone(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "3", 666  # the number fits, the weights are from before the log was wiped
    follower = Follower(server, session, make_version(tmp_path, 3))
    for _ in range(3):
        await follower.loop.step()
    assert serves(server, 3)
    assert server.log.count("/pause") == 1
    assert follower.outcome == [(3, True)]


async def test_a_number_that_was_served_means_its_files_for_ever(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    first = make_version(tmp_path / "one", 3)
    follower = Follower(server, session, first)
    await follower.loop.step()
    make_version(tmp_path / "other", 3)
    files = tmp_path / "other" / "v3"
    (files / "weights.txt").write_text("31")
    other = first.model_copy(update={"uri": files.as_uri(), "sha256": folder_sha256(files)})
    with pytest.raises(InvalidEvent, match="number of their own") as caught:
        follower.versions.add(other)
    assert caught.value.reason == "version_reused"
    for _ in range(2):
        await follower.loop.step()
    assert serves(server, 3)
    assert server.log.count("/collective_rpc") == 1
    assert follower.outcome == [(3, True)]


async def test_a_number_that_no_server_could_use_may_be_announced_again(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, make_version(tmp_path / "one", 3, sha256="0" * 64))
    await follower.loop.step()
    follower.versions.add(make_version(tmp_path / "mended", 3))
    await follower.loop.step()
    assert serves(server, 3)
    assert follower.outcome == [(3, False), (3, True)]


async def test_the_same_content_announced_from_another_place_is_not_loaded_again(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, make_version(tmp_path / "one", 3))
    await follower.loop.step()
    follower.versions.add(make_version(tmp_path / "copy", 3))
    await follower.loop.step()
    assert server.log.count("/collective_rpc") == 1


async def test_versions_in_between_are_skipped(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, *(make_version(tmp_path, number) for number in (1, 2, 3)))
    async with follower.running():
        await until(lambda: serves(server, 3))
        follower.versions.add(make_version(tmp_path, 2))  # a late record of an older one changes nothing
        await asyncio.sleep(0.2)
    assert follower.outcome == [(3, True)]


async def test_a_new_version_is_applied_at_once(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, check_seconds=60.0)
    async with follower.running():
        await until(lambda: server.log)
        for number in (1, 2):
            follower.versions.add(make_version(tmp_path, number))
            await until(lambda number=number: serves(server, number))


async def test_a_restarted_server_is_noticed(server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path):
    follower = Follower(server, session, make_version(tmp_path, 3))
    async with follower.running():
        await until(lambda: follower.outcome == [(3, True)])  # not in the middle of it: then it would be said once
        await server.restart(label=None)
        await until(lambda: serves(server, 3))
        await until(lambda: follower.outcome == [(3, True)] * 2)


@pytest.mark.parametrize("damage", ["other bytes", "no folder", "other scheme", "other kind"])
async def test_an_unusable_version_is_refused_and_the_old_one_goes_on(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path, damage: str
):
    bad = make_version(tmp_path, 4, kind="endpoint" if damage == "other kind" else "weights")
    match damage:
        case "other bytes":
            (tmp_path / "v4" / "weights.txt").write_text("666")
        case "no folder":
            shutil.rmtree(tmp_path / "v4")
        case "other scheme":
            bad = bad.model_copy(update={"uri": "https://bucket/v4"})
        case _:
            pass
    follower = Follower(server, session, make_version(tmp_path, 3))
    async with follower.running():
        await until(lambda: serves(server, 3))
        follower.versions.add(bad)
        await until(lambda: (4, False) in follower.outcome)
        await asyncio.sleep(0.2)
        assert serves(server, 3)
        assert server.log.count("/pause") == 1, "what is refused does not even pause the server"
        follower.versions.add(make_version(tmp_path, 5))
        await until(lambda: serves(server, 5))
        await until(lambda: follower.outcome == [(3, True), (4, False), (5, True)])
    assert "version 4" in follower.events[1].error


async def test_a_version_the_server_refuses_leaves_the_old_one_serving(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "3", 30
    server.faults["/collective_rpc"] = lambda: Response("no such architecture", status_code=400)
    follower = Follower(server, session, make_version(tmp_path, 4))
    async with follower.running():
        await until(lambda: follower.events)
        await until(lambda: serves(server, 3))
        await asyncio.sleep(0.2)
    assert follower.outcome == [(4, False)]
    assert "no such architecture" in follower.events[0].error
    assert server.log.count("/collective_rpc") == 1


async def test_an_empty_server_gets_the_newest_usable_version(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label = None
    follower = Follower(server, session, make_version(tmp_path, 3), make_version(tmp_path, 4, sha256="0" * 64))
    async with follower.running():
        await until(lambda: serves(server, 3))
        await until(lambda: follower.outcome == [(4, False), (3, True)])


async def test_a_server_with_something_newer_is_not_taken_back(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "5", 50  # 5 is no longer on the log, 6 is unusable
    follower = Follower(server, session, make_version(tmp_path, 3), make_version(tmp_path, 6, sha256="0" * 64))
    async with follower.running():
        await until(lambda: follower.outcome == [(6, False)])
        await asyncio.sleep(0.2)
    assert serves(server, 5)


@pytest.mark.parametrize(
    "route", ["/weight_info", "/is_paused", "/pause", "/update_weight_version", "/collective_rpc", "/resume"]
)
async def test_trouble_that_passes_is_tried_again(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path, route: str
):
    troubles = iter([Response(status_code=500), Response(status_code=503)])
    server.faults[route] = lambda: next(troubles, None)
    follower = Follower(server, session, make_version(tmp_path, 3))
    async with follower.running():
        await until(lambda: serves(server, 3))
        await until(lambda: follower.outcome == [(3, True)])


@pytest.mark.parametrize("route", ["/pause", "/update_weight_version"])
async def test_a_step_that_fails_before_the_load_never_leaves_the_server_paused(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path, route: str
):
    server.faults[route] = lambda: Response(status_code=500)
    follower = Follower(server, session, make_version(tmp_path, 3))
    with pytest.raises(Unreachable):
        await follower.loop.step()
    assert not server.paused


@pytest.mark.parametrize(
    "hold",
    [
        ("/pause", 1),
        ("/update_weight_version", 1),
        ("/collective_rpc", 1),
        ("/update_weight_version", 2),
        ("/resume", 1),
    ],
)
async def test_a_crash_after_any_step_is_repaired_by_the_next_start(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path, hold: tuple[str, int]
):
    server.label, server.weights = "3", 30
    known = [make_version(tmp_path, 3), make_version(tmp_path, 4)]
    server.hold = hold
    killed = Follower(server, session, *known)
    dead = asyncio.create_task(killed.loop.run())
    await server.held.wait()  # the step is done, its caller never learns it and does nothing more
    label = server.label or ""
    assert label in ("3", "4") or label.startswith(LABEL_LOADING)
    assert label.startswith(LABEL_LOADING) or server.weights == int(label) * 10, "a label never lies"

    restarted = Follower(server, session, *known)
    async with restarted.running():
        await until(lambda: serves(server, 4))
        await until(lambda: restarted.outcome == [(4, True)])
    dead.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await dead


async def test_a_server_that_was_restarted_before_its_turn_gets_no_label_of_before(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server.label, server.weights = "2", 20
    follower = Follower(server, session, make_version(tmp_path, 3))
    ready = follower.shared.files.ready

    async def slowly(version: ResourceVersion) -> Verified:
        if server.label == "2":
            server.label, server.weights = "default", 0
            # Refused, the server would have had its old label back.
            server.faults["/collective_rpc"] = lambda: Response(status_code=400)
        return await ready(version)

    monkeypatch.setattr(follower.shared.files, "ready", slowly)
    with pytest.raises(Unreachable, match="when its turn was asked for"):
        await follower.loop.step()
    assert (server.label, server.weights, server.paused) == ("default", 0, False)
    server.faults.clear()
    await follower.loop.step()
    assert serves(server, 3)


async def test_a_server_left_paused_does_not_wait_for_files_that_cannot_be_had(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server.label, server.weights, server.paused = "2", 20, True
    follower = Follower(server, session, make_version(tmp_path, 3))

    async def away(version: ResourceVersion) -> Path:
        raise StoreTrouble("the store is away")

    monkeypatch.setattr(follower.shared.files, "ready", away)
    with pytest.raises(StoreTrouble):
        await follower.loop.step()
    assert not server.paused


async def test_a_server_left_paused_is_resumed_when_nothing_is_to_be_loaded(
    server: FakePolicyServer, session: aiohttp.ClientSession
):
    server.paused = True
    await Follower(server, session).loop.step()
    assert not server.paused


async def test_a_server_that_is_away_is_waited_for(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    await server.stop()
    follower = Follower(server, session, make_version(tmp_path, 3))
    async with follower.running():
        await asyncio.sleep(0.2)
        await server.start()
        await until(lambda: serves(server, 3))


async def test_refusals_of_other_routes_are_no_refusal_of_the_version(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.faults["/pause"] = lambda: Response(status_code=404)
    follower = Follower(server, session, make_version(tmp_path, 3))
    with pytest.raises(Refused, match="/pause"):
        await follower.loop.step()
    assert not follower.events


async def test_a_server_that_somebody_resumed_within_a_load_gets_no_label_before_it_is_loaded_anew(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with Disturbed(label="2", weights=20) as server:
        follower = Follower(server, session, make_version(tmp_path, 3))
        server.disturbance = lambda: setattr(server, "paused", False)
        with pytest.raises(Unreachable, match="nothing is labelled"):
            await follower.loop.step()
        assert (server.label or "").startswith(LABEL_LOADING)
        await follower.loop.step()
        assert serves(server, 3)
        assert server.log.count("/collective_rpc") == 2
        assert follower.outcome == [(3, True)]


async def test_a_server_that_another_follower_loads_is_neither_labelled_nor_resumed(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with Disturbed(label="2", weights=20) as server:
        follower = Follower(server, session, make_version(tmp_path, 3))
        server.disturbance = lambda: setattr(server, "label", f"{LABEL_LOADING}-of-another")
        with pytest.raises(Unreachable, match="nothing is labelled"):
            await follower.loop.step()
        assert (server.paused, server.label) == (True, f"{LABEL_LOADING}-of-another")


async def test_nothing_is_touched_without_the_right_to_act(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    server.paused = True
    lease = Lease()
    shared = Shared(following(server), lease=lease)
    follower = Follower(server, session, make_version(tmp_path, 3), shared=shared)
    async with follower.running():
        await asyncio.sleep(0.2)
        assert server.log == []
        lease.renew(time.monotonic() + 30)
        await until(lambda: serves(server, 3))


async def test_a_turn_that_comes_when_the_right_to_act_is_over_is_let_go(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    lease = Lease(time.monotonic() + 30)
    shared = Shared(following(server), lease=lease)
    follower = Follower(server, session, make_version(tmp_path, 3), shared=shared)
    async with shared.turns.turn():
        step = asyncio.create_task(follower.loop.step())
        await until(lambda: "/is_paused" in server.log)
        await asyncio.sleep(0.1)
        lease.end()
    await step
    assert "/pause" not in server.log


class FailingDisk:
    """folder_sha256 of a network disk that fails a few times, of one folder."""

    def __init__(self, folder: str, times: int, number: int = errno.ESTALE) -> None:
        self.folder, self.times, self.number = folder, times, number

    def __call__(self, folder: Path) -> str:
        if folder.name == self.folder and self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return folder_sha256(folder)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
async def test_an_error_of_the_disk_refuses_no_version(
    server: FakePolicyServer,
    session: aiohttp.ClientSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
):
    monkeypatch.setattr("fulgurite.consumers.follower.files.folder_sha256", FailingDisk("v3", 5, number))
    follower = Follower(server, session, make_version(tmp_path, 2), make_version(tmp_path, 3))
    for _ in range(5):
        with pytest.raises(StoreTrouble, match=os.strerror(number)):
            await follower.loop.step()
    await follower.loop.step()
    assert serves(server, 3)
    assert follower.outcome == [(3, True)]


async def test_an_error_of_the_disk_after_a_load_refuses_no_version(
    session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    version = make_version(tmp_path, 3)
    disk = FailingDisk("v3", 0)
    monkeypatch.setattr("fulgurite.consumers.follower.files.folder_sha256", disk)

    class Touching(FakePolicyServer):
        async def _collective_rpc(self, request: Request) -> Response:
            (tmp_path / "v3" / "weights.txt").touch()  # so it is read again
            disk.times = self.log.count("/collective_rpc") < 5
            return await super()._collective_rpc(request)

    async with Touching(label="2", weights=20) as server:
        follower = Follower(server, session, version)
        async with follower.running():
            await until(lambda: serves(server, 3) and follower.outcome)
        assert follower.outcome == [(3, True)]
        assert server.log.count("/collective_rpc") == 5


async def test_files_that_are_not_there_refuse_a_version(
    server: FakePolicyServer, session: aiohttp.ClientSession, tmp_path: Path
):
    version = make_version(tmp_path, 3)
    shutil.rmtree(tmp_path / "v3")
    follower = Follower(server, session, version)
    await follower.loop.step()
    assert follower.outcome == [(3, False)]


class Disturbed(FakePolicyServer):
    """Once, after files were loaded, somebody else does something to it."""

    disturbance: Callable[[], object] | None = None

    async def _collective_rpc(self, request: Request) -> Response:
        answer = await super()._collective_rpc(request)
        disturbance, self.disturbance = self.disturbance, None
        if disturbance:
            disturbance()
        return answer
