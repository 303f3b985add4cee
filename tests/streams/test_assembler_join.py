"""From spans and rewards to a trajectory: nothing lost, nothing twice, nothing re-tokenised."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import MAX_LEFT_OUT, CallRange, TokenSequence, Trajectory
from fulgurite.streams.assembler import join
from fulgurite.streams.assembler.join import EXPIRED, Announcement, assemble, merge_calls
from tests.streams.assembler_records import finished, llm_call, reward, value

NOBODY = Announcement()


def joined(spans: list[Span], rewards: list[float] | None = None) -> Trajectory:
    values = [value(reward("r", amount, number=n)) for n, amount in enumerate(rewards or [1.0])]
    return assemble(finished("r"), NOBODY, [value(span) for span in spans], values).trajectory


def test_calls_that_continue_exactly_are_one_sequence() -> None:
    first = llm_call("r", 1, [1, 2, 3], [4, 5], version=7)
    second = llm_call("r", 2, [1, 2, 3, 4, 5, 6], [8], version=8)
    trajectory = joined([first, second])
    assert trajectory.partial == ""
    assert trajectory.calls == 2
    assert (trajectory.min_version, trajectory.max_version) == (7, 8)
    assert trajectory.sequences == [
        TokenSequence(
            token_ids=[1, 2, 3, 4, 5, 6, 8],
            loss_mask=[0, 0, 0, 1, 1, 0, 1],
            logprobs=[0, 0, 0, -0.004, -0.005, 0, -0.008],
            weight_versions=[VersionSpan(version=7, start=3, end=5), VersionSpan(version=8, start=6, end=7)],
            span_ids=["r-1-1", "r-1-2"],
            calls=[
                CallRange(span_id="r-1-1", number=0, start=3, end=5),
                CallRange(span_id="r-1-2", number=1, start=6, end=7),
            ],
            resource="policy",
            finish_reason="stop",
        )
    ]


def test_a_prompt_that_differs_in_one_token_starts_a_new_sequence() -> None:
    trajectory = joined([llm_call("r", 1, [1, 2], [3]), llm_call("r", 2, [1, 2, 9, 4], [5])])
    assert [sequence.token_ids for sequence in trajectory.sequences] == [[1, 2, 3], [1, 2, 9, 4, 5]]


def test_agents_that_take_turns_keep_their_own_sequences() -> None:
    calls = [
        llm_call("r", 1, [1], [2]).model_copy(update={"agent": "a"}),
        llm_call("r", 2, [7], [8]).model_copy(update={"agent": "b"}),
        llm_call("r", 3, [1, 2, 3], [4]).model_copy(update={"agent": "a"}),
        llm_call("r", 4, [7, 8, 9], [10]).model_copy(update={"agent": "b"}),
    ]
    assert [sequence.token_ids for sequence in merge_calls(calls)] == [[1, 2, 3, 4], [7, 8, 9, 10]]


def test_sequence_ids_order_calls_when_all_have_one_and_start_times_when_not() -> None:
    early, late = llm_call("r", 1, [1], [2], sequence_id=2), llm_call("r", 2, [1, 2], [3], sequence_id=1)
    assert joined([early, late]).sequences[0].span_ids == ["r-1-2"]
    late.sequence_id = 0
    assert joined([late, early]).sequences[0].span_ids == ["r-1-1", "r-1-2"]


def test_what_was_sent_twice_counts_once() -> None:
    call = llm_call("r", 1, [1], [2])
    twice = value(reward("r", 0.5))
    trajectory = assemble(finished("r"), NOBODY, [value(call)] * 2, [twice, twice]).trajectory
    assert trajectory.calls == 1
    assert len(trajectory.rewards) == 1
    assert trajectory.reward == 0.5


def test_the_last_reward_named_reward_counts_and_others_are_kept() -> None:
    rewards = [
        reward("r", 0.1),
        reward("r", 0.9, number=2),
        reward("r", 5.0, name="style", number=3),
        reward("r", 7.0, attempt=2, number=4),
        reward("r", 0.3, number=5).model_copy(update={"attempt_id": ""}),
    ]
    trajectory = assemble(finished("r"), NOBODY, [], [value(item) for item in rewards]).trajectory
    assert trajectory.reward == 0.3
    assert [item.value for item in trajectory.rewards] == [0.1, 0.9, 5.0, 0.3]


def test_only_the_last_attempt_is_used() -> None:
    spans = [llm_call("r", 1, [1], [2]), llm_call("r", 1, [1], [3], attempt=2)]
    trajectory = assemble(finished("r", attempt=2), NOBODY, [value(span) for span in spans], []).trajectory
    assert [sequence.token_ids for sequence in trajectory.sequences] == [[1, 3]]


def test_failed_rollouts_have_rewards_and_their_error_but_no_sequences() -> None:
    event = finished("r", status="failed", error="the agent raised")
    trajectory = assemble(event, NOBODY, [value(llm_call("r", 1, [1], [2]))], [value(reward("r", 0.0))]).trajectory
    assert (trajectory.status, trajectory.error, trajectory.partial) == ("failed", "the agent raised", "")
    assert trajectory.sequences == []
    assert trajectory.reward == 0.0


def test_a_rollout_cancelled_in_the_queue() -> None:
    trajectory = assemble(finished("r", attempt=0, status="cancelled"), Announcement(7, {"a": "b"}), [], []).trajectory
    assert (trajectory.attempt_id, trajectory.reward, trajectory.queued_ns) == ("", None, 7)
    assert trajectory.metadata == {"a": "b"}


def _without(span: Span, **fields: object) -> bytes:
    return value(Span.model_validate(span.model_dump() | fields))


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        (_without(llm_call("r", 1, [1], [2]), logprobs=[]), "missing_logprobs"),
        (_without(llm_call("r", 1, [1], [2]), prompt_token_ids=[]), "missing_prompt"),
        (b'{"rollout_id": "r"', "invalid_record"),
        (b'{"rollout_id": "r", "span_id": "s", "name": "n", "start_ns": 2, "end_ns": 1}', "invalid_record"),
        (EXPIRED, "expired"),
    ],
)
def test_what_is_missing_is_said(span: bytes, reason: str) -> None:
    trajectory = assemble(finished("r"), NOBODY, [span], []).trajectory
    assert trajectory.partial == f"{reason},no_calls,no_reward"
    assert trajectory.sequences == []


def test_spans_that_name_no_attempt_count_only_when_there_was_one() -> None:
    span = value(llm_call("r", 1, [1], [2]).model_copy(update={"attempt_id": ""}))
    assert assemble(finished("r"), NOBODY, [span], []).trajectory.calls == 1
    several = assemble(finished("r", attempt=2), NOBODY, [span], []).trajectory
    assert (several.calls, several.partial) == (0, "unattributed,no_calls,no_reward")


def test_too_long_calls_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "MAX_TOKENS", 4)
    trajectory = joined([llm_call("r", 1, [1, 2], [3, 4]), llm_call("r", 2, [1, 2, 3, 4], [5])])
    assert trajectory.partial == "too_long"
    assert trajectory.sequences[0].token_ids == [1, 2, 3, 4]


def with_attributes(call: Span, **attributes: object) -> Span:
    added = {name.replace("__", "."): value for name, value in attributes.items()}
    return call.model_copy(update={"attributes": call.attributes | added})


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("temperature", 1, True),
        ("temperature", "1.0", True),
        ("temperature", 0.7, False),
        ("temperature", "hot", False),
        ("top_p", 1.0, True),
        ("top_p", 0.9, False),
        ("top_k", -1, True),
        ("top_k", 0, True),
        ("top_k", None, True),
        ("top_k", 1, False),
        ("min_p", 0.0, True),
        ("min_p", 0.1, False),
        ("presence_penalty", 0.5, False),
        ("frequency_penalty", -0.5, False),
        ("repetition_penalty", 1.0, True),
        ("repetition_penalty", 0, False),
    ],
)
def test_calls_not_sampled_from_the_policy_as_it_is_are_not_trained_on(name: str, value: object, neutral: bool) -> None:
    plain = llm_call("r", 1, [1], [2])
    call = with_attributes(llm_call("r", 2, [7], [8]), **{f"gen_ai.request.{name}": value})
    trajectory = joined([plain, call])
    assert trajectory.partial == ("" if neutral else "sampling")
    assert [sequence.token_ids for sequence in trajectory.sequences] == [[1, 2]] + [[7, 8]] * neutral
    assert joined([call]).partial == ("" if neutral else "sampling"), "calls there were"


def test_calls_with_forced_or_forbidden_tokens_are_not_trained_on() -> None:
    call = with_attributes(llm_call("r", 1, [1], [2]), fulgurite__request__constraints=["response_format"])
    assert joined([call]).partial == "sampling"
    assert joined([call]).sequences == []


@pytest.mark.parametrize("end", [{"status": "error", "finish_reason": ""}, {"finish_reason": "abort"}])
def test_a_call_that_broke_off_is_left_out_and_forgotten_where_it_was_asked_again(end: dict[str, str]) -> None:
    broken = llm_call("r", 1, [1], [2, 3]).model_copy(update=end)
    other = llm_call("r", 2, [7], [8])
    assert joined([broken, other]).partial == "unfinished"
    assert [sequence.token_ids for sequence in joined([broken, other]).sequences] == [[7, 8]]
    again = retry(llm_call("r", 2, [1], [2, 4]), 1)
    assert joined([broken, again]).partial == ""
    assert [sequence.token_ids for sequence in joined([broken, again]).sequences] == [[1, 2, 4]]


def test_a_retry_behind_a_restarted_gateway_asks_the_same_in_other_tokens() -> None:
    """What is recorded of its words says less: they are without tools, and may be redacted."""
    words = {"input": "order …"}
    unseen = with_attributes(llm_call("r", 1, [1, 2], [3]).model_copy(update=words), fulgurite__request_digest="a1")
    later = retry(llm_call("r", 2, [1, 9], [4]).model_copy(update=words), 1)
    again = with_attributes(later, fulgurite__request_digest="a1")
    assert [sequence.token_ids for sequence in joined([unseen, again]).sequences] == [[1, 9, 4]]
    for other in (later, with_attributes(later, fulgurite__request_digest="a2")):
        assert len(joined([unseen, other]).sequences) == 2


def test_whose_calls_are_left_out_is_said_each_kind_once() -> None:
    own = llm_call("r", 1, [1], [2]).model_copy(update={"agent": "solver"})
    of_user = {"agent": "user", "resource": "simulator"}
    cold = [
        with_attributes(llm_call("r", n, [1], [n]), gen_ai__request__temperature=0.2).model_copy(update=of_user)
        for n in (3, 4)
    ]
    broken = llm_call("r", 5, [1], [9]).model_copy(update={"agent": "judge", "status": "error"})
    trajectory = joined([broken, own, *cold])
    assert trajectory.partial == "sampling,unfinished"
    assert [(each.reason, each.agent, each.resource) for each in trajectory.left_out] == [
        ("sampling", "user", "simulator"),
        ("unfinished", "judge", "policy"),
    ]
    many = [broken.model_copy(update={"agent": f"judge {n}", "span_id": f"s{n}"}) for n in range(MAX_LEFT_OUT + 1)]
    assert (joined([own, *many]).partial, joined([own, *many]).left_out) == ("unfinished", []), "then of everybody"


def test_evaluations_may_sample_as_they_like() -> None:
    call = value(with_attributes(llm_call("r", 1, [1], [2]), gen_ai__request__temperature=0))
    for mode in ("val", "test"):
        event = finished("r").model_copy(update={"mode": mode})
        trajectory = assemble(event, NOBODY, [call], [value(reward("r", 1.0))]).trajectory
        assert (trajectory.partial, trajectory.calls) == ("", 1)


def retry(call: Span, count: int) -> Span:
    return with_attributes(call, fulgurite__retry_count=count)


def test_a_call_that_the_client_gave_up_and_asked_again_is_not_used() -> None:
    calls = [
        llm_call("r", 1, [1], [2]),
        retry(llm_call("r", 2, [1], [3]), 1),
        retry(llm_call("r", 3, [1], [4]), 2),
        llm_call("r", 4, [1, 4, 5], [6]),
    ]
    trajectory = joined(calls)
    assert (trajectory.calls, trajectory.partial) == (2, "")
    assert [sequence.token_ids for sequence in trajectory.sequences] == [[1, 4, 5, 6]]


def test_calls_that_only_look_like_retries_are_used() -> None:
    same_prompt_again = [llm_call("r", 1, [1], [2]), llm_call("r", 2, [1], [3])]
    first_was_never_recorded = [llm_call("r", 1, [1], [2]), retry(llm_call("r", 2, [1, 2, 3], [4]), 1)]
    of_another_agent = [
        llm_call("r", 1, [1], [2]).model_copy(update={"agent": "a"}),
        retry(llm_call("r", 2, [1], [3]).model_copy(update={"agent": "b"}), 1),
    ]
    for calls in (same_prompt_again, first_was_never_recorded, of_another_agent):
        assert joined(calls).calls == 2


def test_all_choices_of_a_call_are_given_up_together_and_all_of_its_retry_stay() -> None:
    given_up = [llm_call("r", number, [1], [number]).model_copy(update={"start_ns": 500}) for number in (1, 2, 3)]
    again = [retry(llm_call("r", n, [1], [n]).model_copy(update={"start_ns": 900}), 1) for n in (4, 5, 6)]
    assert [sequence.token_ids for sequence in joined(given_up + again).sequences] == [[1, 4], [1, 5], [1, 6]]


Turn = tuple[bool, list[int], list[int]]
TURNS = st.lists(
    st.tuples(
        st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 9), max_size=4)
    ),
    max_size=8,
)


def conversation(turns: list[Turn]) -> list[Span]:
    """Calls that go on from the call before, or begin anew; a response may be empty. Each call has a version."""
    context: list[int] = []
    calls: list[Span] = []
    for number, (goes_on, said, sampled) in enumerate(turns, start=1):
        prompt = [*context, *said] if goes_on else said
        calls.append(llm_call("r", number, prompt, sampled, version=number))
        context = prompt + sampled
    return calls


@given(TURNS, st.randoms(use_true_random=False))
def test_every_sampled_token_is_there_once_with_its_logprob_and_version(
    turns: list[Turn], shuffle: random.Random
) -> None:
    calls = conversation(turns)
    arrived = calls + calls[:2]
    shuffle.shuffle(arrived)
    trajectory = joined(arrived)

    expected = [
        (token, logprob, number)
        for number, call in enumerate(calls, start=1)
        for token, logprob in zip(call.response_token_ids, call.logprobs, strict=True)
    ]
    found: list[tuple[int, float, int]] = []
    for sequence in trajectory.sequences:
        assert len(sequence.token_ids) == len(sequence.loss_mask) == len(sequence.logprobs)
        version_of = {at: part.version for part in sequence.weight_versions for at in range(part.start, part.end)}
        for at, sampled in enumerate(sequence.loss_mask):
            assert (at in version_of) == bool(sampled)
            if sampled:
                found.append((sequence.token_ids[at], sequence.logprobs[at], version_of[at]))
            else:
                assert sequence.logprobs[at] == 0.0
    assert found == expected
    assert trajectory.sequences == joined(calls).sequences


@given(TURNS)
def test_a_sequence_is_what_its_last_call_saw_and_said(turns: list[Turn]) -> None:
    calls = {call.span_id: call for call in conversation(turns)}
    for sequence in joined(list(calls.values())).sequences:
        last = calls[sequence.span_ids[-1]]
        assert sequence.token_ids == last.prompt_token_ids + last.response_token_ids
