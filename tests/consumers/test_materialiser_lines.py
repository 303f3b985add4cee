"""Lines found for whole batches are those that split_lines finds, and an insert's body is Arrow's stream."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fulgurite.consumers.materialiser.blocks import arrow
from fulgurite.consumers.materialiser.body import Pieces
from fulgurite.consumers.materialiser.lines import all_lines
from fulgurite.schemas.codec import split_lines

LONG = b'{"long":"' + 700 * b"x" + b'"}'
LINES = st.sampled_from([LONG, LONG, LONG, b"{}", b"", b"  ", b"poison", b'{"open', b"}", LONG + b"\r", b"\xff"])
RECORDS = st.lists(LINES, max_size=12).map(b"\n".join)


@given(st.lists(RECORDS, max_size=6))
@example([b"\n".join([LONG] * 5), b"\n".join([LONG] * 5) + b"\n", b"\n" + b"\n".join([LONG] * 5)])
@example([b"\n".join([LONG] * 4) + b"\n\n", b"", b'{"a":\n1}' + b" " * 3_000])
def test_all_lines_are_those_of_each_record(values: list[bytes]) -> None:
    found = all_lines(values)
    expected = [split_lines(value) for value in values]
    assert found.raw.to_pylist() == [line for _, lines in expected for line in lines]
    assert list(found.numbers) == [number for numbers, _ in expected for number in numbers]
    assert list(found.counts) == [len(lines) for _, lines in expected]


class Written:
    """An HTTP connection."""

    def __init__(self) -> None:
        self.data = b""

    async def write(self, chunk: memoryview) -> None:
        self.data += chunk


async def test_a_body_is_one_stream_of_arrow_and_sent_once() -> None:
    table = pa.table({"raw": pa.array([LONG] * 1_000, pa.binary()), "number": pa.array(range(1_000), pa.uint32())})
    body = Pieces([b"INSERT\n", *arrow(table)])
    written: Any = Written()
    await body.write(written)
    assert (len(written.data), written.data[:7]) == (body.size, b"INSERT\n")
    reader = pa.ipc.open_stream(written.data[7:])
    assert [batch.num_rows for batch in reader] == [1_000]
    assert pa.ipc.open_stream(written.data[7:]).read_all() == table
    with pytest.raises(RuntimeError, match="sent once"):
        await body.write(written)
