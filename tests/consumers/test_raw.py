"""Batches read record by record: what aiokafka reads comes out the same, what it raises on is undecodable alone."""

from __future__ import annotations

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_UNCOMMITTED
from aiokafka.errors import CorruptRecordException

from fulgurite.producers.raw import Undecodable, unpacked
from tests.consumers.poison import BAD_NAME, POISON, batch

TP = TopicPartition("t", 0)


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4], ids=["none", "gzip", "snappy", "lz4", "zstd"])
def test_only_the_record_that_cannot_be_decoded_is_undecodable(codec: int) -> None:
    data = batch([(b"k", b"a", [("h", b"1")]), (b"k", b"b", POISON), (None, None, [])], 7, codec)
    found = unpacked(TP, 7, data + batch([(b"k", b"c", [])], 10) + b"cut off", None)
    assert found.next == 11
    first, second, third, fourth = found.records
    assert (first.offset, first.key, first.value, first.headers) == (7, b"k", b"a", (("h", b"1"),))
    assert isinstance(second, Undecodable)
    assert (second.topic, second.partition, second.offset, second.timestamp) == ("t", 0, 8, 1001)
    assert (second.key, second.value) == (b"k", b"b")
    assert repr(BAD_NAME) in second.why
    assert (third.key, third.value, fourth.offset, fourth.value) == (None, None, 10, b"c")


def test_what_lies_before_the_offset_is_left_out() -> None:
    found = unpacked(TP, 9, batch([(None, b"%d" % n, []) for n in range(5)], 7), None)
    assert [record.offset for record in found.records] == [9, 10, 11]


def test_aborted_records_are_left_out_whatever_they_hold() -> None:
    aborted = batch([(None, b"no", POISON)], 3, sender=5, transactional=True)
    found = unpacked(TP, 3, aborted + batch([(None, b"yes", [])], 4), [(5, 3)])
    assert [record.value for record in found.records] == [b"yes"]
    assert unpacked(TP, 3, aborted, [(5, 3)]).next == 4
    assert [record.value for record in unpacked(TP, 3, aborted, None, READ_UNCOMMITTED).records] == [b"no"]


def test_a_batch_that_cannot_be_read_ends_what_comes_before_it_and_raises_alone() -> None:
    good, bad = batch([(None, b"a", [])], 0), bytearray(batch([(None, b"b", [])], 1))
    bad[-3] ^= 1
    found = unpacked(TP, 0, good + bytes(bad), None)
    assert ([record.value for record in found.records], found.next) == ([b"a"], 1)
    with pytest.raises(CorruptRecordException):
        unpacked(TP, 1, bytes(bad), None)
