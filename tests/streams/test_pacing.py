"""Pacing: bounded by staleness, never short of what the remaining steps need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fulgurite.streams.trainer.pacing import groups_allowed

small = st.integers(0, 50)


def test_areals_formula() -> None:
    def allowed(steps_done: int, groups_dropped: int = 0) -> int:
        return groups_allowed(
            groups_settled=steps_done * 4 + groups_dropped, steps_left=5 - steps_done, groups_per_step=4,
            pacing_staleness=1,
        )  # fmt: skip

    assert [allowed(done) for done in range(6)] == [8, 12, 16, 20, 20, 20]
    assert allowed(0, groups_dropped=3) == 11


@given(st.lists(st.integers(1, 16), min_size=1, max_size=20), small, st.data())
def test_a_window_can_always_be_filled_and_lag_is_bounded_whatever_size_earlier_ones_had(
    sizes: list[int], staleness: int, data: st.DataObject
) -> None:
    settled = asked = 0
    for done, size in enumerate(sizes):
        asked = max(
            asked,
            groups_allowed(
                groups_settled=settled, steps_left=len(sizes) - done, groups_per_step=size, pacing_staleness=staleness
            ),
        )
        assert asked - settled >= size, "the trainer would wait for groups nobody was asked for"
        assert asked - settled <= (staleness + 1) * max(sizes)
        settled += size + data.draw(st.integers(0, asked - settled - size))
