"""Codec: bytes to events and back, with a reason for everything that is not one."""

from __future__ import annotations

import json

import pytest

from fulgurite.schemas.codec import decode, decode_union, encode, encode_key, split_lines
from fulgurite.schemas.errors import InvalidEvent, RecordTooLarge
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, AttemptStarted, RolloutQueued


def test_round_trip_keeps_unknown_fields() -> None:
    data = b'{"rollout_id":"r","value":1.5,"next_years_field":{"a":[1]}}'
    again = json.loads(encode(decode(Reward, data)))
    assert again["next_years_field"] == {"a": [1]}
    assert again["value"] == 1.5


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (None, "empty", "no value"),
        (b"", "empty", "no value"),
        (b"{", "not_json", "Reward"),
        (b"\xff\xfe", "not_json", "Reward"),
        (b"[]", "bad_field", "the record"),
        (b"{}", "bad_field", "rollout_id"),
        (b'{"rollout_id":"r","value":"much"}', "bad_field", "value"),
        (b'{"rollout_id":"r","value":"1.5"}', "bad_field", "value"),
        (b'{"rollout_id":"r","value":true}', "bad_field", "value"),
        (b'{"rollout_id":"r","value":1,"time_ns":"1"}', "bad_field", "time_ns"),
        (b'{"rollout_id":"r","value":1,"time_ns":2.0}', "bad_field", "time_ns"),
        (b'{"rollout_id":"r","value":NaN}', "bad_field", "value"),
        (b'{"rollout_id":"a b","value":1}', "bad_field", "rollout_id"),
    ],
)
def test_reasons(data: bytes | None, reason: str, words: str) -> None:
    with pytest.raises(InvalidEvent, match=words) as caught:
        decode(Reward, data)
    assert caught.value.reason == reason


def test_the_kind_of_a_rollout_event_decides_its_class() -> None:
    assert isinstance(decode_union(ROLLOUT_EVENT, "RolloutEvent", encode(RolloutQueued(rollout_id="r"))), RolloutQueued)
    started = AttemptStarted(rollout_id="r", attempt_id="r-1", sequence_id=1)
    assert decode_union(ROLLOUT_EVENT, "RolloutEvent", encode(started)) == started
    with pytest.raises(InvalidEvent, match="RolloutEvent"):
        decode_union(ROLLOUT_EVENT, "RolloutEvent", b'{"event":"exploded","rollout_id":"r"}')


def test_a_record_too_large_says_how_large() -> None:
    with pytest.raises(RecordTooLarge, match=r"Reward is \d+ bytes as JSON; .*max_record_bytes") as caught:
        encode(Reward(rollout_id="r", value=1, metadata={"x": "y" * 200}), max_record_bytes=100)
    assert caught.value.reason == "too_large"


def test_keys() -> None:
    assert encode_key("r1") == b"r1"
    assert encode_key("") is None


def test_a_record_is_cut_into_lines_unless_it_is_one_object_over_several() -> None:
    assert split_lines(b'{"a":1}') == ((0,), [b'{"a":1}'])
    assert list(split_lines(b'{"a":1}\n{"a":2}')[0]) == [0, 1]
    assert split_lines(b'\n{"a":1}\r\n \n{"a":2}\n') == ([1, 3], [b'{"a":1}\r', b'{"a":2}'])
    spread = b'{\n "a": {\n  "b": 1\n }\n}\n'
    assert split_lines(spread) == ((0,), [spread])
    assert split_lines(b"\n \n") == ((0,), [b"\n \n"])
    # A bad line, also the first one, does not spoil the others.
    assert split_lines(b'not json\n{"a":1}')[1] == [b"not json", b'{"a":1}']
    assert split_lines(b'{"cut":\n{"a":1}')[1] == [b'{"cut":', b'{"a":1}']
