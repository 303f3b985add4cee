"""Rollouts of the calculator without services: the policy server's own engine samples, and what comes out is what the
assembler would publish.

The same conversation as agent.py's (two turns, the tool between them), with the tokens of the first turn carried into
the second as they were sampled, which is what the gateway does. A rollout of several problems has a conversation for
each, one after another, and its reward is their mean. Every call has a random stream of its own, so that what it
samples does not depend on who is sampled beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from examples.calculator.agent import CALL, MAX_TOKENS
from examples.calculator.calculator import calculate
from examples.calculator.model import END
from examples.calculator.reproduce.cells import RESOURCE, Rewarded
from examples.calculator.reward import reward_of
from examples.calculator.tasks import Task
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.trajectories import CallRange, TokenSequence, Trajectory, TrajectoryReward
from fulgurite.streams.policy_server.engine import Engine, Generation
from fulgurite.streams.policy_server.policy import Policy, load_policy

TURNS = 2
"""Calls of one problem, at most."""


@dataclass(frozen=True)
class Asked:
    """A rollout to be done."""

    rollout_id: str
    group_id: str
    tasks: tuple[Task, ...]
    greedy: bool = False


@dataclass(eq=False)
class _Conversation:
    """One problem of a rollout."""

    asked: Asked
    problem: int
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    calls: list[CallRange] = field(default_factory=list[CallRange])
    text: str = ""
    tool_output: str = ""

    @property
    def task(self) -> Task:
        return self.asked.tasks[self.problem]

    @property
    def turn(self) -> int:
        """The next call's, in its rollout; numbers of turns that another problem did not need are left out."""
        return TURNS * self.problem + len(self.calls)

    @property
    def reward(self) -> float:
        return reward_of(self.text, self.task["answer"])

    def given(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.mask += [0] * len(tokens)

    def sampled(self, generation: Generation) -> None:
        first = len(self.tokens)
        end = first + len(generation.tokens)
        self.calls.append(CallRange(span_id=f"call-{self.turn}", number=len(self.calls), start=first, end=end))
        self.tokens += generation.tokens
        self.logprobs += generation.logprobs
        self.mask += [1] * len(generation.tokens)


class Sampler:
    """The policies that may still sample, by version."""

    def __init__(self, run_id: str, rewarded: Rewarded = "rollout") -> None:
        self._run_id = run_id
        self._rewarded: Rewarded = rewarded
        self._policies: dict[int, Policy] = {}
        self._engine: Engine | None = None

    def add(self, version: int, folder: Path, keep: int) -> None:
        """A new version; the newest `keep` can sample from now on."""
        like = next(iter(self._policies.values()), None)
        self._policies[version] = load_policy(folder, like)
        for old in sorted(self._policies)[:-keep]:
            del self._policies[old]

    def rollouts(self, version: int, asked: Sequence[Asked], group_size: int) -> list[Trajectory]:
        """All of them, sampled by this version."""
        policy = self._policies[version]
        engine = self._engine
        if engine is None:
            engine = self._engine = Engine(policy, str(version))
        engine.swap(policy, str(version))
        conversations = [[_Conversation(one, problem, []) for problem in range(len(one.tasks))] for one in asked]
        every = [conversation for one in conversations for conversation in one]
        for conversation in every:
            messages = [{"role": "user", "content": conversation.task["question"]}]
            prompt = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            conversation.given(_ids(policy, str(prompt)))
        self._turn(engine, every)
        with_tool = [one for one in every if _use_tool(policy, one)]
        self._turn(engine, with_tool)
        return [self._trajectory(one, version, group_size) for one in conversations]

    def _turn(self, engine: Engine, conversations: Sequence[_Conversation]) -> None:
        generations: list[Generation] = []
        for one in conversations:
            seed = zlib.crc32(f"{one.asked.rollout_id} {one.turn}".encode())
            temperature = 0.0 if one.asked.greedy else 1.0
            generation = Generation(list(one.tokens), MAX_TOKENS, temperature, seed)
            generations.append(generation)
            engine.submit(generation)
        while not engine.idle:
            engine.step()
        for one, generation in zip(conversations, generations, strict=True):
            one.sampled(generation)
            one.text = str(engine.policy.tokenizer.decode(generation.tokens, skip_special_tokens=True))

    def _trajectory(self, problems: Sequence[_Conversation], version: int, group_size: int) -> Trajectory:
        asked = problems[0].asked
        before = accumulate((len(one.calls) for one in problems), initial=0)
        return Trajectory(
            rollout_id=asked.rollout_id,
            run_id=self._run_id,
            group_id=asked.group_id,
            group_size=group_size,
            status="succeeded",
            sequences=[_sequence(one, version, first) for one, first in zip(problems, before, strict=False)],
            reward=sum(one.reward for one in problems) / len(problems),
            rewards=self._rewards(problems),
            calls=sum(len(one.calls) for one in problems),
            min_version=version,
            max_version=version,
        )

    def _rewards(self, problems: Sequence[_Conversation]) -> list[TrajectoryReward]:
        """Of calls; none where only the rollout has one."""
        match self._rewarded:
            case "rollout":
                return []
            case "expression":
                return [
                    TrajectoryReward(
                        reward_id=f"expression-{one.problem}",
                        name="expression",
                        value=expression_reward(one.tool_output, one.task["answer"]),
                        span_id=one.calls[0].span_id,
                    )
                    for one in problems
                    if one.tool_output
                ]
            case "problem":
                return [
                    TrajectoryReward(
                        reward_id=call.span_id, name="problem", value=part, counted=part, span_id=call.span_id
                    )
                    for one in problems
                    for part in [one.reward / len(one.calls) / len(problems)]
                    for call in one.calls
                ]


def _sequence(one: _Conversation, version: int, calls_before: int) -> TokenSequence:
    calls = [call.model_copy(update={"number": calls_before + call.number}) for call in one.calls]
    return TokenSequence(
        token_ids=one.tokens,
        loss_mask=one.mask,
        logprobs=one.logprobs,
        weight_versions=[VersionSpan(version=version, start=call.start, end=call.end) for call in calls],
        calls=calls,
        resource=RESOURCE,
    )


def _use_tool(policy: Policy, conversation: _Conversation) -> bool:
    """Appends the tool's answer where the policy has asked for one."""
    call = CALL.fullmatch(conversation.text)
    if call is None:
        return False
    # A message that was cut off has no end of its own; the template writes one.
    ended = conversation.tokens[-1] in policy.stop_ids
    conversation.tool_output = calculate(call.group(1))
    text = f"{'' if ended else END}<|tool|>{conversation.tool_output}{END}<|assistant|>"
    conversation.given(_ids(policy, text))
    return True


def _ids(policy: Policy, text: str) -> list[int]:
    return policy.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def expression_reward(tool_output: str, answer: float) -> float:
    """1 where the tool was asked for the right value, whatever the policy then made of it."""
    return reward_of(f"ANS {tool_output}", answer)
