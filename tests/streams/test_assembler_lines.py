"""Records of several events, one a line: each rollout gets its own, a bad line does not spoil the others."""

from __future__ import annotations

from fulgurite.schemas.codec import encode
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import RolloutFinished
from fulgurite.schemas.spans import Span
from fulgurite.streams.assembler.join import Announcement, assemble
from fulgurite.streams.assembler.lines import attempts_of, lines_of


def span(rollout_id: str, span_id: str, attempt_id: str = "a1") -> bytes:
    return encode(
        Span(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            span_id=span_id,
            name="chat",
            start_ns=int(span_id),
            end_ns=9,
            prompt_token_ids=[int(span_id)],
            response_token_ids=[7],
            logprobs=[-0.5],
        )
    )


def reward(rollout_id: str, value: float) -> bytes:
    return encode(Reward(reward_id=f"{rollout_id}-{value}", rollout_id=rollout_id, attempt_id="a1", value=value))


FINISHED = RolloutFinished(rollout_id="r1", attempt_id="a1", status="succeeded", mode="val")


def test_a_record_of_lines_makes_the_trajectory_that_its_lines_alone_make() -> None:
    spans, rewards = [span("r1", "1"), span("r1", "2"), span("r1", "1")], [reward("r1", 0.25), reward("r1", 0.5)]
    alone = assemble(FINISHED, Announcement(), spans, rewards)
    together = assemble(FINISHED, Announcement(), [b"\n".join(spans) + b"\n"], [b"\r\n".join(rewards)])
    assert alone.trajectory.calls == 2
    assert alone.trajectory.reward == 0.5
    same = {"assembled_ns"}
    assert together.trajectory.model_dump(exclude=same) == alone.trajectory.model_dump(exclude=same)
    assert together.invalid == 0


def test_a_bad_line_is_named_and_the_others_are_used() -> None:
    joined = assemble(
        FINISHED, Announcement(), [span("r1", "1") + b"\nnot json\n" + span("r1", "2")], [reward("r1", 1)]
    )
    assert joined.trajectory.calls == 2
    assert (joined.trajectory.partial, joined.invalid) == ("invalid_record", 1)


def test_lines_of_several_rollouts_each_reach_their_own() -> None:
    record = b"\n".join((span("r1", "1"), span("r2", "2", "b"), b"[", span("r1", "3", "a2")))
    assert attempts_of(record) == ({"r1": "", "r2": "b"}, 1)
    assert attempts_of(span("r1", "1")) == ({"r1": "a1"}, 0)
    assert attempts_of(b"") == ({}, 1)
    assert lines_of("r1", record) == [(0, span("r1", "1")), (3, span("r1", "3", "a2"))]
    assert lines_of("r2", b"\n" + record) == [(2, span("r2", "2", "b"))]
    assert lines_of("r1", b"\n\r\n" + span("r1", "1") + b"\n") == [(2, span("r1", "1"))]
    spread = b'{\n"rollout_id": "r1"\n}\n'
    assert lines_of("r1", spread) == [(0, spread)]
    assert lines_of("r1", b"") == [(0, b"")], "Kafka has forgotten it: the letter says at least that there was one"
    joined = assemble(FINISHED, Announcement(), [record], [])
    assert [sequence.span_ids for sequence in joined.trajectory.sequences] == [["1"]]
