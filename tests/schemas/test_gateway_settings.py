"""The gateway's backends and keys as settings: from TOML and from the environment, and what is told of wrong ones."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fulgurite.infra.settings_file import write_settings_file
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import BackendSettings, Settings, load_settings, to_environment

HASH = f"sha256:{'0' * 32}:{'a' * 64}"

TOML = f"""
[gateway]
max_rollout_tokens = 5

[[gateway.backends]]
url = "http://10.0.0.5:8000/v1/"
max_concurrent_requests = 64

[[gateway.backends]]
url = "https://provider.example/api"
kind = "openai"
models = ["judge"]
api_key = "hunter2"

[[gateway.api_keys]]
name = "team-a"
hash = "{HASH}"
requests_per_minute = 60
"""


def load(tmp_path: Path, **values: str) -> Settings:
    return load_settings({"FULGURITE_HOME": str(tmp_path), **values})


def refused(tmp_path: Path, backend: Any, **others: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, FULGURITE_GATEWAY__BACKENDS=json.dumps([backend]), **others)
    assert "hunter2" not in str(caught.value)
    return str(caught.value)


def test_toml_and_environment_say_the_same(tmp_path: Path):
    (tmp_path / "fulgurite.toml").write_text(TOML)
    from_file = load(tmp_path).gateway
    tree = tomllib.loads(TOML)
    from_environment = load(tmp_path / "elsewhere", **to_environment(tree)).gateway
    assert from_file == from_environment
    first, second = from_file.all_backends()
    assert (first.url, first.kind, first.models, first.resource) == ("http://10.0.0.5:8000", "vllm", [], "policy")
    assert second.url == "https://provider.example/api"
    assert second.api_key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(from_file)
    assert from_file.api_keys[0].requests_per_minute == 60


def test_starting_the_stores_keeps_tables_in_lists(tmp_path: Path):
    (tmp_path / "fulgurite.toml").write_text(TOML)
    before = load(tmp_path)
    write_settings_file(tmp_path, before.kafka, before.clickhouse)
    assert load(tmp_path).gateway == before.gateway


def test_the_short_form_is_one_backend(tmp_path: Path):
    short = load(tmp_path, FULGURITE_GATEWAY__BACKEND_URL="http://h:1/v1", FULGURITE_GATEWAY__RESOURCE="r")
    (only,) = short.gateway.all_backends()
    assert (only.url, only.resource, only.kind, only.forward_authorization) == ("http://h:1", "r", "vllm", True)


def test_agents_keys_are_never_handed_on(tmp_path: Path):
    keys = json.dumps([{"name": "a", "hash": HASH}])
    (only,) = load(tmp_path, FULGURITE_GATEWAY__API_KEYS=keys).gateway.all_backends()
    assert not only.forward_authorization
    backend = {"url": "http://h:1", "forward_authorization": True}
    assert "would hand on the keys" in refused(tmp_path, backend, FULGURITE_GATEWAY__API_KEYS=keys)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ({"urll": "hunter2"}, "BACKENDS, 0.url: Field required"),
        ("hunter2", "BACKENDS, 0: Input should be"),
        ({"url": "ftp://h"}, "0.url = 'ftp://h': "),
        ({"url": "http://h:99999"}, "0.url = 'http://h:99999': must be http://host:port"),
        ({"url": "http://h:1?x=1"}, "must be http://host:port"),
        ({"url": "http://u:hunter2@h:1"}, "must not have a login in it"),
        ({"url": "http://h:1", "api_key": 17}, "0.api_key: Input should be"),
        ({"url": "http://h:1", "api_key": "hunter2\n"}, "0.api_key: must be printable"),
        ({"url": "http://h:1", "api_key_file": "/no/such"}, "must be a readable file (No such file"),
        ({"url": "http://h:1", "api_key": "hunter2", "forward_authorization": True}, "exclude each other"),
        ({"url": "http://h:1", "kind": "sglang"}, "0.kind = 'sglang': "),
        ({"url": "http://h:1", "models": [""]}, "0.models.0 = ''"),
    ],
)
def test_a_wrong_backend_is_named_without_its_key(tmp_path: Path, backend: Any, words: str):
    assert words in refused(tmp_path, backend)


def test_the_same_backend_twice_is_refused(tmp_path: Path):
    twice = json.dumps([{"url": "http://h:1"}, {"url": "http://h:1/v1"}])
    with pytest.raises(SettingsError, match="the same url"):
        load(tmp_path, FULGURITE_GATEWAY__BACKENDS=twice)


@pytest.mark.parametrize(
    ("url", "kept", "v1"),
    [
        ("https://h", "https://h", True),
        ("https://h/", "https://h", True),
        ("https://h/v1/", "https://h", True),
        ("https://h/api/v1", "https://h/api/v1", False),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai", False),
        ("https://h/api/paas/v4", "https://h/api/paas/v4", False),
    ],
)
def test_a_providers_url_is_what_its_clients_take(url: str, kept: str, v1: bool):
    backend = BackendSettings(url=url, kind="openai")
    assert (backend.url, backend.routes_begin_with_v1) == (kept, v1)
    policy = BackendSettings(url="https://h/api/v1/")
    assert (policy.url, policy.routes_begin_with_v1) == ("https://h/api", True)
