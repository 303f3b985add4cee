"""Redaction before Kafka: what the rules take out, and what no rule touches."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.producers.redaction import Redactor, cut, redactor
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.redaction import KNOWN_VALUES, KeyRule, RedactionSettings, ValueRule
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import load_settings
from fulgurite.schemas.spans import Span, SpanEvent, SpanLink

RULES = RedactionSettings(
    keys=[
        KeyRule(name="http.request.header.*", action="drop"),
        KeyRule(regex="(?i)passw(or)?d|secret", action="mask"),
        KeyRule(name="user.id", action="hash"),
        KeyRule(name="note", action="cut", chars=64),
    ],
    values=[ValueRule(name="email"), ValueRule(name="ticket", regex="T-[0-9]+")],
    max_value_chars=100,
    max_text_chars=200,
)


def a_span(**fields: object) -> Span:
    known: dict[str, object] = {"rollout_id": "r", "span_id": "s", "name": "n", "start_ns": 1, "end_ns": 2}
    return Span.model_validate(known | fields)


NESTED = Redactor(RedactionSettings(keys=[KeyRule(regex="(?i)password", action="drop")]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"password":"h\\"x","a":1}', '{"password":"[redacted]","a":1}'),
        ('[{"a":{"Password" : {"b":[1,{"c":"}"}]}},"z":2}]', '[{"a":{"Password" :"[redacted]"},"z":2}]'),
        ('{"password":12.5,"x":["password"]}', '{"password":"[redacted]","x":["password"]}'),
        ('{"fulgurite.password":1}', '{"fulgurite.password":1}'),
        ('see "password":"x"', 'see "password":"x"'),
        ("[" * 9 + '{"password":' + "[" * 9 + "1" + "]" * 9 + "}", "[" * 9 + '{"password":"[redacted]"'),
    ],
)
def test_keys_within_json_text_are_masked(text: str, found: str) -> None:
    assert NESTED.attributes({"x": text}) == {"x": found}
    assert NESTED.sources({"x": text}) == {"x": found}
    assert NESTED.attributes({"x": found}) == {"x": found}


def test_keys_within_objects_are_masked_and_the_object_becomes_its_text() -> None:
    given = {"user": {"password": "hunter2", "n": 1}, "plain": {"n": [1]}, "password": {"n": 1}}
    found = {"user": '{"password":"[redacted]","n":1}', "plain": {"n": [1]}}
    span = NESTED.event(a_span(attributes=given, unknown=given, events=[SpanEvent(name="e", attributes=given)]))
    assert span.attributes == span.events[0].attributes == found
    assert span.model_extra == {
        "unknown": '{"user":{"password":"[redacted]","n":1},"plain":{"n":[1]},"password":"[redacted]"}'
    }


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b'{"name":1,"attributes":{"password":"x"}', b'{"name":1,"attributes":{"password":"[redacted]"}'),
        (b'{"password":"cut of', b'{"password":"[redacted]"'),
        (b'\xff {"password":"x"}', b'\xff {"password":"[redacted]"}'),
        (
            b'{"attributes":[{"key":"password","value":{"stringValue":"x"}},{"key":"b","value":{"intValue":"1"}}]}',
            b'{"attributes":[{"key":"password","value":{"stringValue":"[redacted]"}},{"key":"b","value":{"intValue":"1"}}]}',
        ),
        (b"password is no JSON", b"password is no JSON"),
    ],
)
def test_keys_within_dead_letters_are_masked(value: bytes, found: bytes) -> None:
    dead = DeadLetter("spans", 0, 1, "s", "not_json", "m", b"k", value)
    assert NESTED.dead_letter(dead) == replace(dead, value=found)
    assert NESTED.dead_letter(replace(dead, value=found)).value == found


def test_fields_of_events_are_no_keys_of_a_dead_letter() -> None:
    rules = Redactor(RedactionSettings(keys=[KeyRule(regex="(?i)key|name|token", action="mask")]))
    kept = b'{"name":"n","prompt_token_ids":[1],"key":"k","value":{}}'
    assert rules.letter(kept) == kept
    otlp = b'{"key":"api_key","value":{"stringValue":"x"}}'
    assert rules.letter(otlp) == b'{"key":"api_key","value":{"stringValue":"[redacted]"}}'


@pytest.mark.parametrize(
    "text",
    [
        '"' * 10**6,
        '{"password":' * 10**5,
        '{"password":{"a":' * 10**5,
        '"a\\' * 10**5,
        '\\"' * 10**5,
        '{"password":[{{{"a",' * 50_000,
        '"key":"' * 10**5,
        "{" + "".join(f'"password{number}":' for number in range(50_000)),
    ],
)
def test_no_text_takes_long_to_be_searched_for_keys(text: str) -> None:
    started = time.process_time()
    NESTED.attributes({"x": "{" + text})
    NESTED.letter(text.encode())
    assert time.process_time() - started < 8


def test_the_first_matching_key_decides() -> None:
    found = Redactor(RULES).attributes(
        {
            "http.request.header.authorization": "Bearer x",
            "Password": "hunter2",
            "user.id": "u1",
            "note": "n" * 65,
            "plain": "see T-12, mail ann@example.org",
            "long": "é" * 101,
            "number": 7,
            "nested": {"mail": ["a@b.org", 1]},
            "flag": True,
        }
    )
    assert found == {
        "Password": "[redacted]",
        "user.id": "sha256:bb82030dbc2bcaba",
        "note": "n" * 47 + "… (65 characters)",
        "plain": "see [redacted:ticket], mail [redacted:email]",
        "long": "é" * 82 + "… (101 characters)",
        "number": 7,
        "nested": '{"mail":["[redacted:email]",1]}',
        "flag": True,
    }


def test_a_span_is_redacted_in_every_text_and_nowhere_else() -> None:
    mail = "ann@example.org"
    span = a_span(
        rollout_id="T-1",
        attempt_id="T-2",
        name=f"GET {mail}",
        endpoint=f"https://h/?u={mail}",
        service=mail,
        agent=mail,
        model=f"ft:{mail}",
        resource="T-4",
        status="error",
        status_message=f"no user {mail}",
        input=mail,
        output="x" * 300,
        prompt_token_ids=[1, 2],
        response_token_ids=[3, 4],
        logprobs=[-0.5, -0.25],
        weight_versions=[VersionSpan(version=7, start=0, end=2)],
        attributes={"m": mail, "fulgurite.password": mail, "agentlightning.secret": mail},
        resource_attributes={"secret": "x"},
        state={"m": mail},
        events=[SpanEvent(name=mail, attributes={"m": mail}), SpanEvent(name="plain")],
        links=[SpanLink(span_id="T-3", attributes={"m": mail})],
        password="of a field nobody knows",
        other="kept",
    )
    found = Redactor(RULES).event(span)
    assert found.name == "GET [redacted:email]"
    assert found.endpoint == "https://h/?u=[redacted:email]"
    assert (found.service, found.agent, found.model) == ("[redacted:email]", "[redacted:email]", "ft:[redacted:email]")
    assert found.status_message == "no user [redacted:email]"
    assert (found.input, len(found.output)) == ("[redacted:email]", 200)
    assert found.output.endswith("… (300 characters)")
    assert found.attributes == {"m": "[redacted:email]", "fulgurite.password": mail, "agentlightning.secret": mail}
    assert found.resource_attributes == {"secret": "[redacted]"}
    assert found.state == {"m": "[redacted:email]"}
    assert [event.name for event in found.events] == ["[redacted:email]", "plain"]
    assert found.links[0].attributes == {"m": "[redacted:email]"}
    assert found.model_extra == {"password": "[redacted]", "other": "kept"}
    untouched = "rollout_id attempt_id span_id resource start_ns end_ns prompt_token_ids response_token_ids logprobs"
    for name in [*untouched.split(), "weight_versions"]:
        assert getattr(found, name) == getattr(span, name)
    assert found.links[0].span_id == "T-3"
    assert span.input == mail, "the caller's own span stays as it is"
    Span.model_validate_json(found.model_dump_json(), strict=True)
    assert Redactor(RULES).event(found) == found, "again changes nothing"


def test_what_matches_nothing_is_the_same_object() -> None:
    span = a_span(attributes={"a": "b", "n": 1}, input="nothing here", events=[SpanEvent(name="e")])
    assert Redactor(RULES).event(span) is span
    reward = Reward(rollout_id="r", value=1.0, metadata={"by": "me"})
    assert Redactor(RULES).event(reward) is reward
    assert Redactor(RULES).event(reward.model_copy(update={"metadata": {"by": "me@me.org"}})).metadata == {
        "by": "[redacted:email]"
    }
    assert redactor(RedactionSettings()) is None


def test_dead_letters_keep_their_bytes_but_for_what_values_match() -> None:
    dead = DeadLetter("t", 0, 1, stage="x", reason="y", message="z", key=None, value=b'{"m": "a@b.org')
    assert Redactor(RULES).dead_letter(dead).value == b'{"m": "[redacted:email]'
    binary = replace(dead, value=b"\xff a@b.org \xff", message="no a@b.org")
    found = Redactor(RULES).dead_letter(binary)
    assert (found.value, found.message) == (b"\xff [redacted:email] \xff", "no [redacted:email]")
    plain = replace(dead, value=b"\xff")
    assert Redactor(RULES).dead_letter(plain) is plain


def test_what_fields_are_made_of_follows_the_rules_for_names_only() -> None:
    attributes = {"Password": "p", "user.id": 7, "note": "n" * 65, "http.request.header.x": "x", "mail": "a@b.org"}
    found = Redactor(RULES).sources(attributes | {"fulgurite.secret": "s", "secret.count": 5}, kept={"secret.count"})
    assert found == {
        "Password": "[redacted]",
        "user.id": Redactor(RULES).attributes({"user.id": "7"})["user.id"],
        "note": "n" * 47 + "… (65 characters)",
        "mail": "a@b.org",
        "fulgurite.secret": "s",
        "secret.count": 5,
    }
    assert Redactor(RedactionSettings(values=RULES.values)).sources(attributes) is attributes


@pytest.mark.parametrize(
    ("name", "secret", "harmless"),
    [
        ("email", "ann.b+c@mail.example.org", "ann at example"),
        ("card_number", "4111 1111 1111 1111", "1795267890123456789"),
        ("card_number", "378282246310005", "411111111111111"),
        ("api_key", "sk-proj-abcDEF0123456789", "task-abcdefghijklmnopqrst"),
        ("api_key", "AKIAIOSFODNN7EXAMPLE", "AKIA"),
        ("bearer", "BEARER abc.def-123", "bearer of news"),
        ("jwt", "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxw", "eyJ.a.b"),
        ("jwt", "eyJ-eyJ-eyJhbGciOiJI.eyJzdWIi-eyJPiIx.SflKxw", "eyJ-eyJ-eyJhbGciOiJI.eyJzdWIi-eyJPiIx-eyJ"),
        ("jwt", "eyJabcde.eyJabcde.eyJabcde", "eyJ-.eyJ-.eyJabcde..eyJabcde"),
        ("private_key", "-----BEGIN RSA PRIVATE KEY-----\\nMIIE\n=\n-----END RSA PRIVATE KEY-----", "-----BEGIN-----"),
    ],
)
def test_known_values(name: str, secret: str, harmless: str) -> None:
    redact = Redactor(RedactionSettings(values=[ValueRule(name=name)]))
    assert redact.parts(f"a {secret} b") == f"a [redacted:{name}] b"
    assert redact.parts(f"a {harmless} b") == f"a {harmless} b"
    assert name in KNOWN_VALUES


@pytest.mark.parametrize("name", KNOWN_VALUES)
@pytest.mark.parametrize(
    "word",
    [
        "eyJ-",
        "eyJ-" * 250 + "." + "eyJ-" * 2_000 + "!",
        "a@",
        "a.",
        "a@a.a.",
        "4111-",
        "sk-",
        "bearer ",
        "-----BEGIN PRIVATE KEY",
        "-----BEGIN PRIVATE KEY-----\n",
    ],
)
def test_no_text_makes_known_rules_slow(name: str, word: str) -> None:
    """A producer waits meanwhile, its event loop too."""
    redact = Redactor(RedactionSettings(values=[ValueRule(name=name)]))
    text = (word * (96_000 // len(word) + 1))[:96_000]
    begun = time.thread_time()
    redact.parts(text)
    assert time.thread_time() - begun < 1, "it takes some 0.1 s at most"


@given(st.lists(st.sampled_from(["eyJ", "-", ".", "abcde", "_", " ", "é"]), max_size=20))
def test_what_is_skipped_holds_no_match(words: list[str]) -> None:
    rule, text = ValueRule(name="jwt"), "".join(words)
    plain = rule.pattern.compiled().sub(rule.mark, text)
    assert Redactor(RedactionSettings(values=[rule])).parts(text) == plain


def test_cutting_again_changes_nothing() -> None:
    assert cut("x" * 64, 64) == "x" * 64
    once = cut("x" * 1_000_000, 64)
    assert len(once) == 64
    assert cut(once, 64) == once
    assert cut("x" * 100, 0) == "x" * 100


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('[{"name": "a", "regex": "b", "action": "drop"}]', "a name .* or a regex, not both"),
        ('[{"action": "drop"}]', "must have a name"),
        ('[{"name": "a", "action": "burn"}]', "'drop', 'mask', 'hash' or 'cut'"),
        ('[{"name": "a", "action": "cut"}]', "needs chars, at least 64"),
        ('[{"regex": "(?<=a)b", "action": "drop"}]', r"FULGURITE_REDACTION__KEYS.*'\(\?<=a\)b' cannot be used: of"),
        ("nonsense", "must be JSON"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings({"FULGURITE_HOME": str(tmp_path), "FULGURITE_REDACTION__KEYS": value})


def test_rules_come_from_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "fulgurite.toml").write_text(
        '[redaction]\nmax_text_chars = 1000\nvalues = [{ name = "email" }]\n'
        'keys = [{ name = "http.*", action = "drop" }, { regex = "(?i)token$", action = "mask" }]\n'
    )
    rules = load_settings({"FULGURITE_HOME": str(tmp_path)}).redaction
    assert [rule.action for rule in rules.keys] == ["drop", "mask"]
    (tmp_path / "fulgurite.toml").write_text('[redaction]\nvalues = [{ name = "fax" }]\n')
    with pytest.raises(SettingsError, match=r"redaction\.values.* in .*fax needs a regex; known without one: email"):
        load_settings({"FULGURITE_HOME": str(tmp_path)})


def test_a_span_costs_microseconds() -> None:
    span = a_span(
        attributes={f"gen_ai.attribute.{number}": f"value number {number}" for number in range(10)},
        input="what is six times seven? " * 20,
        output="forty-two",
    )
    redact = Redactor(RULES)
    redact.event(span)
    begin = time.perf_counter()
    for _ in range(2_000):
        redact.event(span)
    microseconds = (time.perf_counter() - begin) / 2_000 * 1e6
    assert microseconds < 1_000, f"{microseconds:.0f} microseconds a span"
