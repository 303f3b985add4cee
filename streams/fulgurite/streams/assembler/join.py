"""From an attempt's records to its trajectory: pure functions over bytes and events.

A record holds one event or several, one a line. Promises: every token the policy sampled in the attempt that counts
appears exactly once, with the logprob and the version recorded for it; tokens are never made again from text; the
result does not depend on the order in which spans arrived; a span or a reward that was sent twice counts once. What
keeps a trajectory from being whole is named in `partial`.
Does not know Kafka, offsets, or when a rollout is complete.

    call 1:  prompt  A A A A   response  b b b            token_ids  A A A A b b b C C d d
    call 2:  prompt  A A A A b b b C C   response  d d    loss_mask  0 0 0 0 1 1 1 0 0 1 1

`partial` is a comma-separated list of:
    no_calls         it succeeded without an LLM call that carries sampled tokens
    sampling         in mode train, a call was not sampled from the policy as it is (NEUTRAL_SAMPLING, or tokens were
                     forbidden or forced: a grammar, a tool that must be called); it is left out
    unfinished       a call broke off before its end, and was not asked again; it is left out
    no_reward        it succeeded, and no reward named `reward` came for it
    missing_logprobs a call has sampled tokens but not their logprobs; it is left out
    missing_prompt   a call has sampled tokens but not its prompt's; it is left out
    unattributed     a call names no attempt although there were several; it is left out
    invalid_record   a span or reward could not be read (a dead letter of the materialiser says why, but for fields that
                     tables do not look within: docs/contract.md), or is nested too deeply for the record of the
                     attempt; it is left out. Without any data: building.py
    expired          a record was deleted by Kafka's retention before the rollout ended
    too_long         a call exceeds the longest sequence there may be; it is left out
    too_large        the trajectory exceeds kafka.max_record_bytes; it is sent without its sequences and spans
For the words about calls `left_out` says whose they were: a rollout may have agents, judges and simulated users that
nobody trains.
Failed and cancelled rollouts have no sequences; their spans are not even read (`calls` is 0), their rewards are kept.

Retries. Where the gateway dies, or gives 503, after a call was recorded, the agent's client asks again and the agent
sees only the second answer. A call whose agent's next call has a higher `fulgurite.retry_count` and asks the same is
not used: by its prompt's tokens, or by its `fulgurite.request_digest`, as a gateway that was restarted may write the
earlier turns in other tokens. Limits: clients that do not count (only OpenAI's do) have both calls used; so does an
agent whose own parallel calls came in between; after the last retry failed, the call before it is used though nobody
saw it; and of a prompt asked twice on purpose, the first call is left out where the second was a retry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from fulgurite.schemas.codec import decode, split_lines
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.event import MAX_TOKENS, VersionSpan
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.rewards import FINAL_REWARD, Reward
from fulgurite.schemas.rollouts import RolloutFinished
from fulgurite.schemas.sampling import NEUTRAL_SAMPLING, is_neutral
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import (
    MAX_LEFT_OUT,
    CallRange,
    FinishedAttempt,
    LeftOutCall,
    TokenSequence,
    Trajectory,
    TrajectoryReward,
)
from fulgurite.streams.assembler.attempts import spans_of

E = TypeVar("E", Span, Reward)


CONSTRAINTS: Final = "fulgurite.request.constraints"
"""Attribute of a call: what of its request forbade or forced tokens."""
ABORTED: Final = "abort"
"""vLLM's finish_reason of a call that was ended from outside."""
EXPIRED = b""
"""Stands for a record that Kafka had deleted before it could be joined."""
INVALID_RECORD: Final = "invalid_record"
"""In `partial`: something of the rollout could not be used."""

RETRY_COUNT: Final = "fulgurite.retry_count"
"""Recorded by the gateway."""
REQUEST_DIGEST: Final = "fulgurite.request_digest"
"""As well: of the request as the agent sent it. Its words as recorded are without tools, and may be redacted or cut."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What only the `queued` event says."""

    queued_ns: int = 0
    metadata: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class Joined:
    """A trajectory, and how many of its records could not be read."""

    trajectory: Trajectory
    invalid: int = 0


def assemble(
    finished: RolloutFinished,
    announced: Announcement,
    spans: Sequence[bytes],
    rewards: Sequence[bytes],
    *,
    keep_spans: bool = False,
) -> Joined:
    """The trajectory of an ended rollout from all records of it, in the order of the log; with its spans if wanted."""
    partial: list[str] = []
    left_out: set[tuple[str, str, str]] = set()
    invalid = 0
    calls: list[Span] = []
    found: list[Span] = []
    if finished.status == "succeeded":
        found, invalid = read_spans(spans, finished.rollout_id, partial)
        calls, left_out = select_calls(found, finished)
        partial += [reason for reason, *_ in sorted(left_out)]
    kept, invalid_rewards = read_rewards(rewards, finished, partial)
    own, too_deep = spans_of(found, finished) if keep_spans else ([], 0)
    partial += [INVALID_RECORD] * bool(too_deep)
    final = [reward.value for reward in kept if reward.name == FINAL_REWARD]
    sequences = merge_calls(calls)
    if finished.status == "succeeded":
        partial += ["no_calls"] * (not calls and "sampling" not in partial) + ["no_reward"] * (not final)
    versions = [part.version for sequence in sequences for part in sequence.weight_versions]
    trajectory = Trajectory(
        rollout_id=finished.rollout_id,
        attempt_id=finished.attempt_id,
        run_id=finished.run_id,
        task_id=finished.task_id,
        group_id=finished.group_id,
        group_size=finished.group_size,
        mode=finished.mode,
        agent=finished.agent,
        status=finished.status,
        error=finished.error,
        partial=",".join(dict.fromkeys(partial)),
        left_out=_named(left_out),
        sequences=sequences,
        rewards=[TrajectoryReward(reward_id=r.reward_id, name=r.name, value=r.value, span_id=r.span_id) for r in kept],
        reward=final[-1] if final else None,
        calls=len(calls),
        min_version=min(versions, default=None),
        max_version=max(versions, default=None),
        queued_ns=announced.queued_ns,
        finished_ns=finished.time_ns,
        assembled_ns=now_ns(),
        metadata=announced.metadata,
    )
    if keep_spans:
        fields = {name: getattr(trajectory, name) for name in Trajectory.model_fields}
        trajectory = FinishedAttempt.model_construct(None, **fields, spans=own)
    return Joined(trajectory, invalid + invalid_rewards + too_deep)


def _read(model: type[E], values: Sequence[bytes], rollout_id: str, partial: list[str]) -> tuple[list[E], int]:
    """The rollout's events of these records, and how many lines are none. Adds to `partial`."""
    found: list[E] = []
    invalid = 0
    for value in values:
        if value == EXPIRED:
            partial.append("expired")
            continue
        for line in split_lines(value)[1]:
            try:
                event = decode(model, line)
            except InvalidEvent:
                partial.append(INVALID_RECORD)
                invalid += 1
                continue
            if event.rollout_id == rollout_id:
                found.append(event)
    return found, invalid


def read_spans(values: Sequence[bytes], rollout_id: str, partial: list[str]) -> tuple[list[Span], int]:
    """The spans, each span_id once, and the number of lines that are none. Adds to `partial`."""
    found, invalid = _read(Span, values, rollout_id, partial)
    spans: dict[tuple[str, str], Span] = {}
    for span in found:
        spans.setdefault((span.attempt_id, span.span_id), span)
    return list(spans.values()), invalid


def _named(left_out: set[tuple[str, str, str]]) -> list[LeftOutCall]:
    if len(left_out) > MAX_LEFT_OUT:
        return []
    return [LeftOutCall(reason=reason, agent=agent, resource=resource) for reason, agent, resource in sorted(left_out)]


def select_calls(spans: Sequence[Span], finished: RolloutFinished) -> tuple[list[Span], set[tuple[str, str, str]]]:
    """The trainable LLM calls of the last attempt in their order, and what is left out: reason, agent, resource."""
    calls: list[Span] = []
    left_out: set[tuple[str, str, str]] = set()
    for span in spans:
        if not span.response_token_ids or span.attempt_id not in (finished.attempt_id, ""):
            continue
        if reason := _unusable(span, finished):
            left_out.add((reason, span.agent, span.resource))
        else:
            calls.append(span)
    # span_id only breaks ties, so that the arrival of spans does not matter.
    if all(span.sequence_id > 0 for span in calls):
        calls.sort(key=lambda span: (span.sequence_id, span.start_ns, span.span_id))
    else:
        calls.sort(key=lambda span: (span.start_ns, span.end_ns, span.span_id))
    wanted = without_superseded(calls)
    left_out |= {("unfinished", call.agent, call.resource) for call in wanted if _broke_off(call)}
    return [call for call in wanted if not _broke_off(call)], left_out


def _unusable(call: Span, finished: RolloutFinished) -> str:
    """Why a call with sampled tokens cannot be trained on, whatever others there are; empty where it can."""
    if not call.attempt_id and finished.attempts > 1:
        return "unattributed"
    if not call.is_llm_call:
        return "missing_logprobs"
    if not call.prompt_token_ids:
        return "missing_prompt"
    if len(call.prompt_token_ids) + len(call.response_token_ids) > MAX_TOKENS:
        return "too_long"
    if finished.mode == "train" and not sampled_neutrally(call):
        return "sampling"
    return ""


def _broke_off(call: Span) -> bool:
    return call.status == "error" or call.finish_reason == ABORTED


def sampled_neutrally(call: Span) -> bool:
    """Whether nothing recorded of the request made the sampled distribution another than the policy's."""
    if call.attributes.get(CONSTRAINTS):
        return False
    return all(is_neutral(name, call.attributes.get(f"gen_ai.request.{name}")) for name in NEUTRAL_SAMPLING)


def without_superseded(calls: Sequence[Span]) -> list[Span]:
    """Ordered calls without those that the agent's client gave up and asked again; see Retries above."""
    kept: list[Span] = []
    following: dict[tuple[str, str], tuple[Span, bool]] = {}
    for call in reversed(calls):
        superseded = False
        if found := following.get((call.resource, call.agent)):
            after, after_superseded = found
            # The choices of one call (`n`) share its start and go together.
            again = _retry_count(after) > _retry_count(call) or (after_superseded and after.start_ns == call.start_ns)
            superseded = again and _asks_the_same(after, call)
        following[call.resource, call.agent] = call, superseded
        if not superseded:
            kept.append(call)
    kept.reverse()
    return kept


def _asks_the_same(one: Span, other: Span) -> bool:
    digest = one.attributes.get(REQUEST_DIGEST)
    return one.prompt_token_ids == other.prompt_token_ids or (
        digest is not None and digest == other.attributes.get(REQUEST_DIGEST)
    )


def _retry_count(call: Span) -> float:
    return _number(call.attributes.get(RETRY_COUNT, 0)) or 0


def _number(value: object) -> float | None:
    """An attribute as a number, also where a tracer wrote it as text; None where it is none."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def merge_calls(calls: Sequence[Span]) -> list[TokenSequence]:
    """Each call continues the newest sequence of its agent and policy when its prompt begins with exactly all of it."""
    sequences: list[_Sequence] = []
    newest: dict[tuple[str, str], _Sequence] = {}
    for number, call in enumerate(calls):
        sequence = newest.get((call.resource, call.agent))
        if sequence is None or not sequence.continued_by(call):
            sequence = newest[call.resource, call.agent] = _Sequence()
            sequences.append(sequence)
        sequence.add(call, number)
    return [sequence.finish() for sequence in sequences]


@dataclass(slots=True)
class _Sequence:
    """A TokenSequence that still grows."""

    token_ids: list[int] = field(default_factory=list[int])
    loss_mask: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[VersionSpan] = field(default_factory=list[VersionSpan])
    calls: list[Span] = field(default_factory=list[Span])
    ranges: list[CallRange] = field(default_factory=list[CallRange])

    def continued_by(self, call: Span) -> bool:
        length = len(self.token_ids)
        return len(call.prompt_token_ids) >= length and call.prompt_token_ids[:length] == self.token_ids

    def add(self, call: Span, number: int) -> None:
        given = call.prompt_token_ids[len(self.token_ids) :]
        sampled = call.response_token_ids
        start = len(self.token_ids) + len(given)
        self.token_ids += given + sampled
        self.loss_mask += [0] * len(given) + [1] * len(sampled)
        self.logprobs += [0.0] * len(given) + call.logprobs
        self.versions += [
            VersionSpan(version=part.version, start=start + part.start, end=start + part.end)
            for part in call.weight_versions
        ]
        self.calls.append(call)
        self.ranges.append(CallRange(span_id=call.span_id, number=number, start=start, end=start + len(sampled)))

    def finish(self) -> TokenSequence:
        last = self.calls[-1]
        return TokenSequence(
            token_ids=self.token_ids,
            loss_mask=self.loss_mask,
            logprobs=self.logprobs,
            weight_versions=self.versions,
            span_ids=[call.span_id for call in self.calls],
            calls=self.ranges,
            resource=last.resource,
            agent=last.agent,
            finish_reason=last.finish_reason,
        )


def read_rewards(values: Sequence[bytes], finished: RolloutFinished, partial: list[str]) -> tuple[list[Reward], int]:
    """The attempt's rewards, each reward_id once, in the order of the log; and the number of lines that are none."""
    found, invalid = _read(Reward, values, finished.rollout_id, partial)
    rewards: dict[str, Reward] = {}
    for reward in found:
        if reward.attempt_id in (finished.attempt_id, ""):
            rewards.setdefault(reward.reward_id, reward)
    return list(rewards.values()), invalid
