"""The rules in SQL give what the rules in Python give, on the real engine; and the views follow the rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import clickhouse_connect
import pytest
from clickhouse_connect.driver import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fulgurite.consumers.redaction import DERIVING, VIEWS, apply_redaction, view_selects
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas import migrations as module
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.patterns import portable
from fulgurite.schemas.redaction import KNOWN_VALUES, KeyRule, RedactionSettings, ValueRule
from fulgurite.schemas.redaction_sql import (
    attributes_sql,
    column_sql,
    nested_sql,
    redacted_select,
    text_sql,
)
from fulgurite.schemas.settings import ClickHouseSettings

_REGEXES = [
    r"(?i)sEcret|pass(wor)?d",
    r"a.c",
    r"^x|y$",
    r"[^\d\s]-",
    r"(?i)[^k-m][k-m]",
    r"\bé+\b",
    r"[\[\]{}^&~|'\\-]+",
    r"\$[0-9]{2,3}?",
    r"\x41\t",
    r"[\x00-\x08]",
    r"(a|ab)(c|bcd)",
    r"\S+@\S+",
    r"'",
]
_TEXTS = st.one_of(
    st.text(st.sampled_from("abckmxyzAK019 -@.'\\\n\t\v$[]{}^&~|é…🔥ſK\x01"), max_size=90),
    st.sampled_from(
        ["", "my secret PASSWORD", "ann@example.org", "4111 1111 1111 1111", "Bearer abcdefgh12", "x" * 64, "é" * 65]
    ),
    st.just("sha256:0123456789abcdef"),
)
_NAMES = st.one_of(
    st.sampled_from(["password", "http.header.x", "user.id", "note", "fulgurite.password", "agentlightning.note"]),
    _TEXTS,
)
_BOUNDS = st.sampled_from([0, 64, 70])
_KEY_RULES = st.one_of(
    st.builds(lambda name: KeyRule(name=name, action="drop"), st.sampled_from(["http.*", "?b*", "*'*", "*", "a*b"])),
    st.builds(
        lambda regex, action: KeyRule(regex=regex, action=action),
        st.sampled_from(_REGEXES),
        st.sampled_from(["drop", "mask", "hash"]),
    ),
    st.builds(lambda name: KeyRule(name=name, action="hash"), st.sampled_from(["user.*", "note"])),
    st.builds(lambda chars: KeyRule(regex="o", action="cut", chars=chars), st.sampled_from([64, 66])),
)
_VALUE_RULES = st.one_of(
    st.builds(lambda name: ValueRule(name=name), st.sampled_from(sorted(KNOWN_VALUES))),
    st.builds(lambda regex: ValueRule(name="rule", regex=regex), st.sampled_from(_REGEXES)),
)
_RULES = st.builds(
    RedactionSettings,
    keys=st.lists(_KEY_RULES, max_size=4),
    values=st.lists(_VALUE_RULES, max_size=4),
    max_value_chars=_BOUNDS,
    max_text_chars=_BOUNDS,
    hash_salt=st.sampled_from(["", "pepper's \\"]),
)
_QUICK = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def engine(clickhouse_server: EmbeddedClickHouse) -> Iterator[Client]:
    with clickhouse_connect.get_client(**connection_options(clickhouse_server.settings("system"))) as client:
        yield client


def _asked(engine: Client, expression: str, values: dict[str, Any], kind: str) -> Any:
    """What the engine makes of the value named v0."""
    rows = engine.query(f"SELECT {expression} FROM (SELECT {{v0:{kind}}} AS v0)", parameters=values).result_rows
    return rows[0][0]


@_QUICK
@given(rules=_RULES, texts=st.lists(_TEXTS, min_size=1, max_size=20))
def test_texts_come_out_the_same(engine: Client, rules: RedactionSettings, texts: list[str]) -> None:
    redact = Redactor(rules)
    # As JSON and not as a parameter: its escaping would be under test.
    rows = engine.query(
        f"SELECT {text_sql(rules, 'v')} FROM (SELECT arrayJoin(JSONExtract({{all:String}}, 'Array(String)')) AS v)",
        parameters={"all": json.dumps(texts)},
    ).result_rows
    assert [row[0] for row in rows] == [redact.text(text) for text in texts]


@_QUICK
@given(rules=_RULES, attributes=st.dictionaries(_NAMES, _TEXTS, min_size=1, max_size=12))
def test_attributes_come_out_the_same(engine: Client, rules: RedactionSettings, attributes: dict[str, str]) -> None:
    document = json.dumps(attributes)
    for kind in ("Map(String, String)", "Map(LowCardinality(String), String)"):
        rows = engine.query(
            f"SELECT {attributes_sql(rules, 'm')} FROM (SELECT JSONExtract({{all:String}}, '{kind}') AS m)",
            parameters={"all": document},
        ).result_rows
        assert rows[0][0] == Redactor(rules).attributes(attributes)


_NESTED = st.recursive(
    st.one_of(st.sampled_from(['a"}', "\\", "{[", "é\n", "plain"]), st.integers(-9, 9), st.booleans(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["password", "Secret", "user", 'a"secret', "p\\x", "ü"]), inner, max_size=3),
        st.builds(json.dumps, inner),
    ),
    max_leaves=12,
)
_MASKING = RedactionSettings(
    keys=[KeyRule(name="ü", action="cut", chars=64), KeyRule(regex="(?i)secret|^pass|^p.x|ü", action="drop")]
)


@_QUICK
@given(trees=st.lists(_NESTED, min_size=1, max_size=30), escape=st.booleans(), at=st.integers(0, 60))
def test_keys_within_json_come_out_the_same(engine: Client, trees: list[Any], escape: bool, at: int) -> None:
    """Whole and cut off somewhere, as an attribute and as a dead letter."""
    texts = [json.dumps({"user": tree}, ensure_ascii=escape, separators=(", ", ":")) for tree in trees]
    texts += [text[:at] for text in texts]
    redact = Redactor(_MASKING)
    attribute, letter = nested_sql(_MASKING, "v"), nested_sql(_MASKING, "v", of_letter=True)
    rows = engine.query(
        f"SELECT {attribute}, {letter} FROM "
        "(SELECT arrayJoin(JSONExtract({all:String}, 'Array(String)')) AS v) "
        "SETTINGS short_circuit_function_evaluation = 'disable'",
        parameters={"all": json.dumps(texts)},
    ).result_rows
    for text, (attributed, kept) in zip(texts, rows, strict=True):
        assert attributed == redact.attributes({"x": text})["x"]
        assert kept.encode() == redact.letter(text.encode())
        assert redact.letter(kept.encode()) == kept.encode(), "twice is once"


@pytest.mark.parametrize("regex", _REGEXES)
def test_every_expression_is_one_the_engine_takes(engine: Client, regex: str) -> None:
    rules = RedactionSettings(values=[ValueRule(name="r", regex=regex)], keys=[KeyRule(regex=regex, action="mask")])
    assert portable(regex).re2
    assert _asked(engine, text_sql(rules, "v0"), {"v0": "-"}, "String") == Redactor(rules).parts("-")


def test_without_rules_nothing_is_asked_of_the_engine() -> None:
    rules = RedactionSettings()
    assert column_sql(rules, "text", "input") == "input"
    assert column_sql(rules, "attributes", "attributes") == "attributes"
    assert column_sql(rules, "events", "events") == "events"
    for view, select in view_selects().items():
        assert redacted_select(rules, select, VIEWS.get(view, {})) == select


def test_the_views_follow_the_rules(clickhouse_settings: ClickHouseSettings) -> None:
    apply_migrations(clickhouse_settings)
    rules = RedactionSettings(
        keys=[KeyRule(name="auth", action="drop"), KeyRule(regex="(?i)password", action="mask")],
        values=[ValueRule(name="email")],
        max_value_chars=64,
        max_text_chars=80,
    )
    with clickhouse_connect.get_client(
        **connection_options(clickhouse_settings), database=clickhouse_settings.database
    ) as client:
        before = _definitions(client)
        assert apply_redaction(client, RedactionSettings()) == []
        _insert(client, 1)
        assert sorted(apply_redaction(client, rules)) == sorted([*VIEWS, DERIVING])
        assert apply_redaction(client, rules) == []
        _insert(client, 2)
        assert sorted(apply_redaction(client, RedactionSettings())) == sorted([*VIEWS, DERIVING])
        _insert(client, 3)
        assert _definitions(client) == before

        spans = client.query(
            "SELECT input, output, name, status_message, endpoint, attributes, resource_attributes, state, extra, "
            "events, links, logprobs, response_token_ids, rollout_id FROM spans ORDER BY start_ns"
        ).result_rows
        assert spans[0][:13] == spans[2][:13]
        assert "ann@example.org" in str(spans[0])
        assert "ann@example.org" not in str(spans[1])
        mail = "[redacted:email]"
        assert spans[1][:9] == (
            mail,
            "o" * 62 + "… (100 characters)",
            f"GET {mail}",
            f"no {mail}",
            f"https://h/{mail}",
            {"password": "[redacted]", "m": f'["{mail}"]', "long": "é" * 47 + "… (70 characters)", "fulgurite.x": "1"},
            {"host": "h"},
            {"m": mail},
            {"Password": "[redacted]"},
        )
        assert [event["attributes"] for event in spans[1][9]] == [{"m": mail}]
        assert [event["name"] for event in spans[1][9]] == [mail]
        assert spans[1][10][0]["attributes"] == {"m": mail}
        assert spans[1][11:] == ([-0.5], [5], "r2")

        rewards = client.query("SELECT metadata FROM rewards ORDER BY time_ns").result_rows
        assert [row[0] for row in rewards] == [{"by": "ann@example.org"}, {"by": mail}, {"by": "ann@example.org"}]
        dead = client.query("SELECT value FROM dead_letters ORDER BY _offset").result_rows
        assert [row[0] for row in dead] == ["not json ann@example.org", f"not json {mail}", "not json ann@example.org"]


def test_a_migration_that_changes_a_view_leaves_the_rules_to_be_applied_again(
    clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = RedactionSettings(values=[ValueRule(name="email")])
    older = [migration for migration in module.migrations() if migration.name < "0015"]
    with clickhouse_connect.get_client(
        **connection_options(clickhouse_settings), database=clickhouse_settings.database
    ) as client:
        with monkeypatch.context() as before:
            before.setattr(module, "migrations", lambda: older)
            before.setattr("fulgurite.consumers.redaction.migrations", lambda: older)
            views = {view: columns for view, columns in VIEWS.items() if view != "rejected_mv"}
            before.setattr("fulgurite.consumers.redaction.VIEWS", views)
            apply_migrations(clickhouse_settings)
            apply_redaction(client, rules)
            assert apply_redaction(client, rules) == []
        apply_migrations(clickhouse_settings)
        assert "dead_letters_mv" in apply_redaction(client, rules)
        [select] = [select for name, select, _ in _definitions(client) if name == "dead_letters_mv"]
        assert "[redacted:email]" in select
        assert "__connect.errors.line" in select


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_while_rules_change_is_mended_by_the_next_start(
    clickhouse_settings: ClickHouseSettings, step: int
) -> None:
    apply_migrations(clickhouse_settings)
    rules = RedactionSettings(values=[ValueRule(name="email")])
    with clickhouse_connect.get_client(
        **connection_options(clickhouse_settings), database=clickhouse_settings.database
    ) as client:
        before = _definitions(client)
        with pytest.raises(_Killed):
            apply_redaction(cast(Client, _KilledAfter(client, step)), rules)
        apply_redaction(client, RedactionSettings())  # the rules were taken back meanwhile
        assert _definitions(client) == before
        with pytest.raises(_Killed):
            apply_redaction(cast(Client, _KilledAfter(client, step)), rules)
        apply_redaction(client, rules)
        assert apply_redaction(client, rules) == []
        selects = {name: select for name, select, _ in _definitions(client)}
        assert all("[redacted:email]" in selects[view] for view, columns in VIEWS.items() if "metadata" not in columns)


class _Killed(Exception):
    pass


class _KilledAfter:
    """A client of a process that is killed after this many commands."""

    def __init__(self, client: Client, commands: int) -> None:
        self._client = client
        self._left = commands

    def query(self, sql: str) -> Any:
        return self._client.query(sql)

    def command(self, sql: str) -> None:
        self._client.command(sql)
        self._left -= 1
        if not self._left:
            raise _Killed


def _definitions(client: Client) -> list[Any]:
    rows = client.query(
        "SELECT name, as_select, comment FROM system.tables WHERE database = currentDatabase() "
        "AND engine = 'MaterializedView' ORDER BY name"
    ).result_rows
    return [tuple(row) for row in rows]


def _insert(client: Client, number: int) -> None:
    mail = "ann@example.org"
    span = {
        "rollout_id": f"r{number}",
        "span_id": "s",
        "name": f"GET {mail}",
        "start_ns": number,
        "end_ns": number + 1,
        "status": "error",
        "status_message": f"no {mail}",
        "endpoint": f"https://h/{mail}",
        "input": mail,
        "output": "o" * 100,
        "response_token_ids": [5],
        "logprobs": [-0.5],
        "attributes": {"auth": "x", "password": "p", "m": [mail], "long": "é" * 70, "fulgurite.x": "1"},
        "resource_attributes": {"host": "h"},
        "state": {"m": mail},
        "events": [{"name": mail, "time_ns": 1, "attributes": {"m": mail}}],
        "links": [{"trace_id": "t", "span_id": "l", "attributes": {"m": mail}}],
        "Password": "p",
    }
    reward = {"rollout_id": f"r{number}", "value": 1.0, "time_ns": number, "metadata": {"by": mail}}
    for topic, raw in (("spans", json.dumps(span)), ("spans", f"not json {mail}"), ("rewards", json.dumps(reward))):
        row = {"raw": raw, "key": "k", "_topic": topic, "_partition": 0, "_offset": number, "_into": 3}
        client.insert(f"in_{topic}", [list(row.values())], column_names=list(row))
