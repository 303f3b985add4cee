"""API keys: who is let in, how often, and what a bearer token may carry."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.keys import Bearer, Keys, ensure_guarded, new_key, parse_bearer, parse_token
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import ApiKeySettings, GatewaySettings

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,20}", fullmatch=True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def keys(clock: Clock | None = None, **bounds: int) -> tuple[str, Keys]:
    key, hashed = new_key("team-a")
    return key, Keys([ApiKeySettings.model_validate({"name": "team-a", "hash": hashed} | bounds)], clock or Clock())


def refused(known: Keys, key: str) -> ApiError:
    with pytest.raises(ApiError) as caught, known.held(key):
        pass
    return caught.value


@given(IDS, IDS, st.text(max_size=30).map(str.strip))
def test_a_token_carries_ids_and_a_key(rollout_id: str, attempt_id: str, key: str):
    assert parse_bearer(f"Bearer fg-{rollout_id}/{attempt_id}") == Bearer("", rollout_id, attempt_id)
    assert parse_bearer(f"bearer fg-{rollout_id}/{attempt_id}/{key}") == Bearer(key, rollout_id, attempt_id)


@given(st.text())
def test_any_header_can_be_read(text: str):
    parse_bearer(text)
    parse_bearer(f"Bearer {text}")


@pytest.mark.parametrize(
    ("authorization", "bearer"),
    [
        ("", Bearer()),
        ("Basic dXNlcjpw", Bearer()),
        ("Bearer ", Bearer()),
        ("Bearer sk-abc", Bearer(key="sk-abc")),
        ("Bearer fgk-team-abc", Bearer(key="fgk-team-abc")),
        ("Bearer fg-r1", Bearer(rollout_id="r1")),
        ("Bearer fg-r1/", Bearer(rollout_id="r1")),
        ("Bearer fg-/a1", Bearer(attempt_id="a1")),
        ("Bearer fg-r1/a1/sk/with/slashes", Bearer("sk/with/slashes", "r1", "a1")),
    ],
)
def test_tokens(authorization: str, bearer: Bearer):
    assert parse_bearer(authorization) == bearer


def test_a_new_key_is_let_in_and_only_its_hash_is_in_the_settings():
    key, hashed = new_key("team-a")
    assert key.startswith("fgk-team-a-")
    assert key not in hashed
    known = Keys([ApiKeySettings(name="team-a", hash=hashed)])
    with known.held(parse_token(f"fg-r/a/{key}").key) as name:
        assert name == "team-a"
    assert len({new_key("team-a") for _ in range(20)}) == 20


def test_no_key_a_wrong_key_and_a_nearly_right_one_are_401():
    key, known = keys()
    assert (refused(known, "").status, refused(known, "").code) == (401, "missing_api_key")
    other, _ = new_key("team-a")
    for wrong in (other, new_key("team-b")[0], key[:-1], key + "x", key.upper(), "sk-1", "é\udc80" * 40, "x" * 10_000):
        error = refused(known, wrong)
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert wrong not in error.message


def test_without_keys_everybody_is_let_in():
    with Keys([]).held("anything") as name:
        assert name == ""


def test_calls_at_once_are_bounded_and_counted_once():
    key, known = keys(max_concurrent_requests=2)
    with known.held(key):
        with known.held(key):
            error = refused(known, key)
            assert (error.status, error.code, error.headers()) == (429, "key_concurrency", [(b"retry-after", b"1")])
        with pytest.raises(RuntimeError), known.held(key):
            raise RuntimeError
        with known.held(key):
            pass


def test_calls_a_minute_are_bounded_and_the_answer_says_when_to_come_back():
    clock = Clock()
    key, known = keys(clock, requests_per_minute=60)
    for _ in range(6):  # a tenth may come at once
        with known.held(key):
            pass
    assert refused(known, key).code == "key_rate"
    clock.now += 0.5
    assert refused(known, key).headers() == [(b"retry-after", b"1")]
    clock.now += 0.5
    with known.held(key):
        pass
    clock.now += 1_000
    for _ in range(6):
        with known.held(key):
            pass
    assert refused(known, key).status == 429


@given(st.lists(st.floats(0, 5), max_size=200))
def test_no_history_lets_more_through_than_the_rate(pauses: list[float]):
    clock = Clock()
    key, known = keys(clock, requests_per_minute=30)
    passed = 0
    for pause in pauses:
        clock.now += pause
        try:
            with known.held(key):
                passed += 1
        except ApiError:
            pass
    assert passed <= 3 + sum(pauses) * 30 / 60 + 1e-6


def test_an_open_gateway_listens_on_loopback_only():
    _, hashed = new_key("a")
    guarded = [ApiKeySettings(name="a", hash=hashed)]
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        ensure_guarded(GatewaySettings(host=host))
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "gateway.internal"):
        with pytest.raises(StartError, match=r"gateway\.api_keys"):
            ensure_guarded(GatewaySettings(host=host))
        ensure_guarded(GatewaySettings(host=host, api_keys=guarded))
        ensure_guarded(GatewaySettings(host=host, insecure=True))


def test_a_key_itself_is_no_setting():
    key, hashed = new_key("a")
    with pytest.raises(ValidationError):
        ApiKeySettings(name="a", hash=key)
    with pytest.raises(ValidationError, match="same name"):
        GatewaySettings(api_keys=[ApiKeySettings(name="a", hash=hashed), ApiKeySettings(name="a", hash=hashed)])


def test_the_command_makes_a_key_that_its_hash_lets_in():
    from typer.testing import CliRunner

    from fulgurite.infra.cli import app

    answer = CliRunner().invoke(app, ["gateway-key", "team-a", "--json"])
    made = json.loads(answer.stdout)
    with Keys([ApiKeySettings(name=made["name"], hash=made["hash"])]).held(made["key"]) as name:
        assert name == "team-a"
    shown = CliRunner().invoke(app, ["gateway-key", "team-a"]).stdout
    table = shown[shown.index("[[gateway.api_keys]]") : shown.index("Next:")]
    settings = GatewaySettings.model_validate(tomllib.loads(table)["gateway"])
    (key,) = [line for line in shown.splitlines() if line.startswith("fgk-")]
    with Keys(settings.api_keys).held(key) as name:
        assert name == "team-a"
    assert CliRunner().invoke(app, ["gateway-key", "a b"]).exit_code == 2
