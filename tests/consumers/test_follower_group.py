"""Which followers are one group, of which one acts: those that would be at the same servers."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from fulgurite.consumers.follower.owner import group_of
from fulgurite.schemas.settings import FollowerSettings, KafkaSettings

KAFKA = KafkaSettings(topic_prefix="x.")


def group(**settings: Any) -> str:
    return group_of(KAFKA, FollowerSettings.model_validate(settings))


def test_followers_of_the_same_servers_are_one_group_and_others_are_not() -> None:
    one, other = "http://gpu-1:8000", "http://gpu-2:8000"
    assert group(servers=[one, other]) == group(servers=[other, one])
    assert len({group(servers=[one]), group(servers=[other]), group(servers=[one], resource="critic")}) == 3
    assert group(servers=[one]).startswith("x.follower.policy.")
    assert group(servers=[one], group="mine") == group(servers=[other], group="mine") == "x.mine.policy"


def test_servers_of_this_host_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    local, remote = "http://127.0.0.1:8000", "http://gpu-1:8000"
    here = group(servers=[local]), group(servers=[remote])
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    there = group(servers=[local]), group(servers=[remote])
    assert here[0] != there[0]
    assert here[1] == there[1]
