"""Mends, IDs and refusals of dead letters, without any store."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from fulgurite.infra.dlq.actions import Mend
from fulgurite.infra.dlq.letters import Letter, Place, parse_place, short_id
from fulgurite.infra.dlq.mending import MendError, by_expression, by_fields, difference, readable, validate
from fulgurite.infra.dlq.rules import Outgoing, Refusal, outgoing
from fulgurite.schemas.errors import InvalidEvent, RecordTooLarge, SettingsError
from fulgurite.schemas.settings import KafkaSettings
from tests.consumers.otlp_encoding import part, record
from tests.consumers.otlp_encoding import span as otlp_span
from tests.infra.dlq_world import span

KAFKA = KafkaSettings(topic_prefix="t.")
NS = 1_700_000_000_123_456_789
NOW = datetime.now(UTC)


def letter(value: bytes, topic: str = "t.spans", reason: str = "bad_field", key: bytes = b"r") -> Letter:
    verdicts = (("materialiser", reason, "why"),)
    return Letter(
        Place(topic or "t.dead_letters", 1, 7), "materialiser", reason, "why", topic, NOW, NOW, key, value, verdicts
    )


def mend(value: bytes) -> Mend:
    return Mend("m", value, "how", "who", NOW)


def test_ids_are_short_and_typable() -> None:
    assert parse_place(KAFKA, "spans/3/1042") == Place("t.spans", 3, 1042, 0)
    assert parse_place(KAFKA, "t.spans/3/1042/7") == Place("t.spans", 3, 1042, 7)
    assert short_id(KAFKA, Place("t.spans", 3, 1042)) == "spans/3/1042"
    assert short_id(KAFKA, Place("otlp_spans", 0, 1, 2)) == "otlp_spans/0/1/2"
    for wrong in ("spans", "spans/1", "spans/1/x", "spans/1/2/3/4", "spams/1/2", "spans/-1/2", "spans/1/" + "9" * 30):
        with pytest.raises(SettingsError, match="spans"):
            parse_place(KAFKA, wrong)


def test_an_expression_leaves_what_it_does_not_touch() -> None:
    data = json.dumps({"start_ns": NS, "score": 0.1, "name": 5, "text": "ü"}).encode()
    for source in (
        'r["name"] = str(r["name"])',
        '{**r, "name": str(r["name"])}',
        "for n in ['name']: r[n] = str(r[n])",
    ):
        assert json.loads(by_expression(source)(data)) == {"start_ns": NS, "score": 0.1, "name": "5", "text": "ü"}
    assert str(NS).encode() in by_expression('r["name"] = "x"')(data)
    broken = b'{"start_ns": %d, "value": NaN}' % NS
    assert json.loads(by_expression('json.loads(text.replace("NaN", "null"))')(broken)) == {
        "start_ns": NS,
        "value": None,
    }


def test_an_expression_that_fails_says_why() -> None:
    with pytest.raises(SettingsError, match="Python expression"):
        by_expression("r[")
    for source, words in (("r['x']", "KeyError: 'x'"), ("1 / 0", "ZeroDivisionError"), ("None", "gives no record")):
        with pytest.raises(MendError, match=words):
            by_expression(source)(b"{}")
    with pytest.raises(MendError, match="r is None"):
        by_expression("r")(b"not json")
    with pytest.raises(MendError, match="no JSON"):
        by_expression("{'x': float('nan')}")(b"{}")


def test_fields() -> None:
    mended = by_fields(["name=chat", "start_ns=5", "attributes.a.b=[1]", 'text="7"'])(b'{"name": 1, "attributes": {}}')
    assert json.loads(mended) == {"name": "chat", "start_ns": 5, "attributes": {"a": {"b": [1]}}, "text": "7"}
    with pytest.raises(SettingsError, match="FIELD=VALUE"):
        by_fields(["name"])
    with pytest.raises(MendError, match="no object"):
        by_fields(["name.x=1"])(b'{"name": 5}')


@pytest.mark.parametrize("depth", [600, 100_000])
def test_what_is_nested_deeply_is_only_bytes(depth: int) -> None:
    """Deeper than Python follows when it reads JSON (100,000), or when it copies what it read (600)."""
    deep = b"[" * depth + b"]" * depth
    assert "".join(readable(deep).split()) == deep.decode()
    assert difference(deep, b"1")
    assert by_expression("r if len(text) < 2_000 else b'1'")(deep) in (deep, b"1")
    assert by_expression("{**(r if isinstance(r, dict) else {}), 'kind': 'internal'}")(deep) == b'{"kind":"internal"}'
    with pytest.raises(MendError, match="no object"):
        by_fields(["name=x"])(deep)
    with pytest.raises(InvalidEvent):
        validate(KAFKA, "t.spans", deep)
    assert by_fields(["name=" + deep.decode()])(b"{}").startswith(b'{"name":')


def test_a_result_nested_deeply_is_refused() -> None:
    with pytest.raises(MendError, match="no JSON"):
        by_expression("r = []\nfor _ in range(100_000): r = [r]")(b"{}")


def test_what_is_still_wrong_is_said() -> None:
    assert validate(KAFKA, "t.spans", span()).span_id == "s"
    for value, reason in ((span(name=5), "bad_field"), (b"{", "not_json"), (b"", "empty"), (b"[1]", "bad_field")):
        with pytest.raises(InvalidEvent) as caught:
            validate(KAFKA, "t.spans", value)
        assert caught.value.reason == reason
    with pytest.raises(InvalidEvent, match="NaN"):  # the tables would refuse it
        validate(KAFKA, "t.spans", span(attributes={"x": float("nan")}))
    with pytest.raises(InvalidEvent, match="2 lines"):
        validate(KAFKA, "t.spans", span() + b"\n" + span())
    with pytest.raises(RecordTooLarge):
        validate(KafkaSettings(topic_prefix="t.", max_record_bytes=1024), "t.spans", span(input="x" * 2000))
    reward = '{"rollout_id": "r", "value": %s}'
    with pytest.raises(InvalidEvent, match="has more than 64 bits"):
        validate(KAFKA, "t.rewards", (reward % 10**25).encode())
    assert validate(KAFKA, "t.rewards", (reward % "1e25").encode()).value == 1e25
    with pytest.raises(InvalidEvent, match="the value is compressed"):
        validate(KAFKA, "otlp_spans", b"\x1f\x8b")
    with pytest.raises(InvalidEvent, match="the record has no spans"):
        validate(KAFKA, "otlp_spans", b'{"span_id": "s"}')
    with pytest.raises(InvalidEvent, match="span 1: spanId: must not be empty"):
        validate(KAFKA, "otlp_spans", record(otlp_span(), otlp_span(span_id=b"")))
    with pytest.raises(InvalidEvent, match="the span cannot be read"):
        validate(KAFKA, "otlp_spans", record(part(9, part(2, b"\x0a\xff"))))
    with pytest.raises(InvalidEvent, match="must be below"):
        validate(KAFKA, "otlp_spans", record(otlp_span(end=2**63)))
    assert len(validate(KAFKA, "otlp_spans", record(otlp_span(), otlp_span()))) == 2


def test_bytes_are_readable() -> None:
    assert readable(b'{"a":1}') == '{\n "a": 1\n}'
    assert readable("Grüße".encode()) == "Grüße"
    assert readable(b"\x00\xffabc").endswith("00 ff 61 62 63                                   ..abc")
    changed = difference(b'{"a":1,"b":2,"c":3}', b'{"a":1,"b":"2","c":3}')
    assert [line for line in changed if line[0] in "+-"] == ['- "b": 2,', '+ "b": "2",']


def test_the_key_follows_a_mended_id() -> None:
    """Original bytes go with the original key; where the mend names another rollout, the record belongs there."""
    as_it_was = outgoing(KAFKA, letter(span(), reason="rejected", key=b"k"), None, (), force=False)
    mended = outgoing(KAFKA, letter(b"{", key=b"k"), mend(span(rollout_id="r2")), (), force=False)
    traced = outgoing(KAFKA, letter(b"{", key=b""), mend(span(rollout_id="")), (), force=False)
    forced = outgoing(KAFKA, letter(b"{", key=b"k"), None, (), force=True)
    found = [out.key for out in (as_it_was, mended, traced, forced) if isinstance(out, Outgoing)]
    assert found == [b"k", b"r2", None, b"k"]


def test_a_whole_record_of_several_lines_goes_as_it_came_where_each_is_good() -> None:
    lines = span() + b"\n\n" + span(span_id="t") + b"\n"
    for reason in ("undecodable", "rejected", "too_large", "too_slow"):
        out = outgoing(KAFKA, letter(lines, reason=reason), None, (), force=False)
        assert isinstance(out, Outgoing)
        assert (out.value, out.key) == (lines, b"r")
    bad = outgoing(KAFKA, letter(lines + span(name=5), reason="undecodable"), None, (), force=False)
    assert isinstance(bad, Refusal)
    assert "bad_field: line 3: spans: name" in bad.why
    one_line = outgoing(KAFKA, letter(lines, reason="bad_field"), mend(lines), (), force=False)
    assert isinstance(one_line, Refusal), "others of its record are rows already"
    with pytest.raises(InvalidEvent, match="200,002 lines, of at most 200,000"):
        validate(KAFKA, "t.spans", b"\n" * 200_001, is_record=True)


def test_a_whole_record_has_the_key_of_what_its_lines_name() -> None:
    def of(*rollouts: str) -> bytes:
        return b"\n".join(span(rollout_id=rollout, span_id=str(at)) for at, rollout in enumerate(rollouts))

    def key(out: Outgoing | Refusal) -> bytes | None:
        assert isinstance(out, Outgoing), out
        return out.key

    broken = letter(b"{", reason="rejected", key=b"k")
    assert key(outgoing(KAFKA, broken, mend(of("r2", "r2", "")), (), force=False)) == b"r2"
    assert key(outgoing(KAFKA, letter(of("r2", "r2"), reason="rejected", key=b""), None, (), force=False)) == b"r2"
    # As it came, where nobody mended it.
    for given in (b"k", b""):
        both = letter(of("r2", "r3"), reason="rejected", key=given)
        assert key(outgoing(KAFKA, both, None, (), force=False)) == (given or None)
    several = outgoing(KAFKA, broken, mend(of("r2", "r3")), (), force=False)
    assert isinstance(several, Refusal)
    assert ("its lines name r2, r3" in several.why, several.force_helps) == (True, True)
    assert key(outgoing(KAFKA, broken, mend(of("r2", "r3")), (), force=True)) == b"k"


def test_of_a_whole_record_every_rollout_is_to_be_known() -> None:
    lines = span(rollout_id="r2") + b"\n" + span(rollout_id="r3", span_id="t")
    verdicts = (("materialiser", "too_large", ""), ("assembler", "unknown_rollout", ""))
    refused = replace(letter(lines, reason="too_large"), verdicts=verdicts)
    assert isinstance(outgoing(KAFKA, refused, None, {"r2", "r3"}, force=False), Outgoing)
    unknown = outgoing(KAFKA, refused, None, {"r2"}, force=False)
    assert isinstance(unknown, Refusal)
    assert "still nobody announced rollout r3:" in unknown.why


def test_an_object_spread_over_lines_is_one_event() -> None:
    for topic, event in (("t.spans", json.loads(span())), ("t.rollouts", {"event": "queued", "rollout_id": "r"})):
        assert validate(KAFKA, topic, json.dumps(event, indent=1).encode()).rollout_id == "r"


def test_each_reward_of_a_record_has_the_name_of_its_line() -> None:
    lines = b'{"rollout_id": "r", "value": 1}\n{"rollout_id": "r", "value": 2, "reward_id": "own"}\n' * 2
    out = outgoing(KAFKA, letter(lines, "t.rewards", "undecodable"), None, (), force=False)
    assert isinstance(out, Outgoing)
    named = [json.loads(line)["reward_id"] for line in out.value.splitlines()]
    assert named == ["t.rewards-1-7", "own", "t.rewards-1-7-2", "own"]


def test_a_reward_of_one_line_has_its_name_wherever_the_mend_puts_it() -> None:
    one = replace(letter(b"{", "t.rewards"), place=Place("t.rewards", 1, 7, 5))
    out = outgoing(KAFKA, one, mend(b'\n\n{"rollout_id": "r", "value": 1}\n'), (), force=False)
    assert isinstance(out, Outgoing)
    assert json.loads(out.value)["reward_id"] == "t.rewards-1-7-5"


def test_no_force_revives_what_cannot_live() -> None:
    for topic in ("", "t.resources", "t.dead_letters", "elsewhere"):
        refused = outgoing(KAFKA, letter(b"{}", topic=topic), None, (), force=True)
        assert isinstance(refused, Refusal)
        assert not refused.force_helps
