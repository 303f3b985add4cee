"""Pacing: bounded by staleness, never short of what the remaining steps need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fulgurite.streams.trainer.pacing import groups_allowed

small = st.integers(0, 50)


def test_areals_formula() -> None:
    def allowed(steps_done: int, groups_dropped: int = 0) -> int:
        return groups_allowed(
            steps_done=steps_done, steps=5, groups_per_step=4, pacing_staleness=1, groups_dropped=groups_dropped
        )

    assert [allowed(done) for done in range(6)] == [8, 12, 16, 20, 20, 20]
    assert allowed(0, groups_dropped=3) == 11


@given(st.integers(1, 50), st.integers(1, 16), small, small, st.data())
def test_a_window_can_always_be_filled_and_lag_is_bounded(
    steps: int, groups_per_step: int, staleness: int, dropped: int, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, steps - 1))
    allowed = groups_allowed(
        steps_done=done,
        steps=steps,
        groups_per_step=groups_per_step,
        pacing_staleness=staleness,
        groups_dropped=dropped,
    )
    usable = allowed - dropped - done * groups_per_step
    assert usable >= groups_per_step, "the trainer would wait for groups nobody was asked for"
    assert usable <= (staleness + 1) * groups_per_step
    assert allowed - dropped <= steps * groups_per_step
