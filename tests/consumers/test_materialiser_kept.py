"""Memory that is kept between inserts: never two holders of one piece, however long Arrow holds on to it."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.consumers.materialiser.kept import KEPT, LEAST_BYTES, STEP_BYTES, Kept
from fulgurite.consumers.materialiser.lines import all_lines, line_feeds

MIB = 1 << 20


def test_a_piece_comes_back_when_nothing_refers_to_it() -> None:
    kept = Kept()
    view = kept.take(3 * MIB)
    view[:4] = b"abcd"
    assert kept.free_bytes == 0
    array = pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(view)])
    table = pa.table({"raw": array}).slice(0, 1)
    del view, array
    gc.collect()
    assert kept.free_bytes == 0
    assert table["raw"].to_pylist() == [b"abcd"]
    del table
    assert kept.free_bytes == STEP_BYTES
    assert len(kept.take(5 * MIB)) == 5 * MIB
    assert kept.free_bytes == STEP_BYTES  # back again: the view was dropped


def test_what_is_kept_is_bounded_and_what_is_too_small_goes() -> None:
    kept = Kept()
    views = [kept.take(2 * MIB) for _ in range(KEPT + 3)]
    del views
    assert kept.free_bytes == KEPT * STEP_BYTES
    large = kept.take(STEP_BYTES + 1)
    assert kept.free_bytes == (KEPT - 1) * STEP_BYTES
    del large
    assert kept.free_bytes == (KEPT - 1) * STEP_BYTES + 2 * STEP_BYTES
    assert len(kept.take(LEAST_BYTES - 1)) == LEAST_BYTES - 1


def test_two_threads_never_get_the_same_piece() -> None:
    kept = Kept()
    shared: list[int] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(mark: int) -> None:
        for _ in range(3_000):
            view = kept.take(LEAST_BYTES)
            view[0] = mark
            shared.extend([mark] * (view[0] != mark))
            del view

    try:
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(work, mark) for mark in (1, 2, 3)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert not shared
    assert kept.free_bytes <= KEPT * STEP_BYTES


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_nobody_else_writes_into_what_is_held(sizes: list[int]) -> None:
    kept = Kept()
    held: list[tuple[memoryview, int]] = []
    for number, size in enumerate(sizes):
        view = kept.take(size * MIB)
        view[0] = view[-1] = number
        held.append((view, number))
        if size % 3 == 0:
            held.pop(0)
        assert all(one[0] == one[-1] == mark for one, mark in held)


def test_large_batches_are_the_same_as_small_ones_whether_memory_is_new_or_not() -> None:
    line = b'{"a":"' + b"x" * 700 + b'"}'
    for batch in range(3):
        values = [b"\n".join([b'{"b":%d}' % batch, line, b'{"n":%d}' % number]) for number in range(4_000)]
        values[17] = b"  " + line + b"\n\n" + line  # not even
        lines = all_lines(values)
        assert sum(map(len, values)) > LEAST_BYTES
        assert lines.raw.to_pylist()[:3] == [b'{"b":%d}' % batch, line, b'{"n":0}']
        assert lines.raw.to_pylist()[-1] == b'{"n":3999}'
        assert lines.counts.sum() == len(lines.raw) == 3 * 4_000 - 1
        single = all_lines([line] * 4_000)
        assert single.raw.to_pylist() == [line] * 4_000
        assert lines.raw[1].as_py() == line


@given(st.lists(st.sampled_from([b"\n", b"x" * 9_000, b"{}"]), max_size=12))
def test_line_feeds_are_counted(parts: list[bytes]) -> None:
    value = b"".join(parts)
    assert line_feeds(value) == value.count(b"\n")
