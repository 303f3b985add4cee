"""What an attempt's reward is made of, and what each call earns of it: from spans to the trainer's calls; no broker."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import AggregatorSettings, RewardSource, Settings, TrainerSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import CallRange, FinishedAttempt, TokenSequence, Trajectory, TrajectoryReward
from fulgurite.streams.algorithms.aggregator.scoring import Scoring
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.definition import InputRefused
from fulgurite.streams.assembler.join import Announcement, assemble
from fulgurite.streams.trainer.credit import calls_of
from fulgurite.streams.trainer.samples import ModelLimits, member_of
from tests.streams.algorithms.judge_server import model_server
from tests.streams.assembler_records import finished, llm_call, value
from tests.streams.assembler_records import reward as own_reward

RULE = {"name": "no-phone-numbers", "operation": "chat", "pattern": "[0-9]{3}-[0-9]{4}", "cost": 0.5}


def attempt(own: TrajectoryReward) -> FinishedAttempt:
    """Two calls of two tokens; the first says a phone number."""
    sequence = TokenSequence(
        token_ids=[1] * 5,
        loss_mask=[0, 1, 1, 1, 1],
        logprobs=[0.0] * 5,
        weight_versions=[VersionSpan(version=1, start=1, end=5)],
        calls=[CallRange(span_id=f"s{n}", number=n, start=1 + 2 * n, end=3 + 2 * n) for n in range(2)],
    )
    said = ("call 555-1234", "ok")
    spans = [
        Span(span_id=f"s{n}", name="chat", operation="chat", start_ns=n, end_ns=n + 1, output=text)
        for n, text in enumerate(said)
    ]
    return FinishedAttempt(
        rollout_id="r",
        attempt_id="a",
        status="succeeded",
        reward=own.value,
        rewards=[own],
        sequences=[sequence],
        spans=spans,
    )


async def scored(given: FinishedAttempt, **settings: Any) -> tuple[Trajectory, list[Reward]]:
    async with httpx.AsyncClient() as client:
        events = await Scoring(Settings.model_validate(settings), client, Verdicts(None, 10)).score(given)
    (trajectory,) = [event for event in events if isinstance(event, Trajectory)]
    return Trajectory.model_validate_json(trajectory.model_dump_json()), [e for e in events if isinstance(e, Reward)]


def huge(attempt: FinishedAttempt) -> dict[str, float]:
    return {"a": 1.5e308, "b": 1.5e308}


def too_much_together(attempt: FinishedAttempt) -> dict[str, float]:
    return {"a": 6e8, "b": 6e8}


def as_much_as_may_be(attempt: FinishedAttempt) -> dict[str, float]:
    return {"a": 2e9 / 2, "b": -5.0}


def by_call(trajectory: Trajectory) -> list[float]:
    assert trajectory.reward is not None
    (calls,) = calls_of(trajectory, trajectory.sequences, trajectory.reward, TrainerSettings(credit="call"))
    return [call.reward for call in calls]


@pytest.mark.parametrize(
    ("weight", "reward", "calls"),
    [(0.0, 1.0, [0.0, 1.0]), (1.0, 0.5, [-0.5, 1.0]), (2.0, 0.0, [-1.0, 1.0])],
)
async def test_a_violation_costs_its_call_what_it_costs_the_rollout(
    weight: float, reward: float, calls: list[float]
) -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    found, given = await scored(attempt(own), compliance={"weight": weight, "rules": [RULE]})
    assert found.reward == reward
    assert by_call(found) == calls
    (audit,) = [each for each in given if each.source == "compliance"]
    assert (audit.value, audit.span_id) == (-0.5, "s0"), "the audit does not depend on the weight"
    assert [(each.value, each.counted) for each in found.rewards if each.name == "compliance"] == [
        (-0.5, pytest.approx(-0.5 * weight))
    ]


@pytest.mark.parametrize(
    ("agents", "second_begins", "calls"),
    [
        (("", "", ""), 9, [-0.5, 1.0]),
        (("", "", ""), 1, [0.0, 0.5]),
        (("a", "b", "a"), 1, [-0.5, 1.0]),
        (("a", "b", "b"), 1, [0.0, 0.5]),
        (("", "", "a"), 1, [0.0, 0.5]),
    ],
)
async def test_what_a_tool_violates_costs_the_call_that_asked_for_it(
    agents: tuple[str, str, str], second_begins: int, calls: list[float]
) -> None:
    """Two calls, the first at 0, and a tool at 1; agents of all three."""
    given = attempt(TrajectoryReward(reward_id="own", name="reward", value=1.0))
    given.spans[1].start_ns = second_begins
    given.spans.append(Span(span_id="t", name="rm", operation="execute_tool", start_ns=1, end_ns=2))
    for span, agent in zip(given.spans, agents, strict=True):
        span.agent = agent
    found, rewards = await scored(given, compliance={"rules": [{"name": "no-rm", "deny_tools": ["rm"], "cost": 0.5}]})
    assert by_call(found) == calls
    assert [each.span_id for each in rewards if each.source == "compliance"] == ["t"], "the audit names the tool"


async def test_bounds_of_the_sum_are_heeded_and_the_calls_still_add_up_to_it() -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    found, _ = await scored(attempt(own), compliance={"rules": [RULE]}, aggregator={"low": 0.75})
    assert found.reward == 0.75
    assert by_call(found) == [-0.5, 1.25]


async def test_the_agents_own_reward_that_names_its_call_counts_there_with_its_weight() -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0, span_id="s0")
    found, _ = await scored(attempt(own), compliance={"rules": [RULE]}, aggregator={"agent_weight": 3.0})
    assert found.reward == 2.5
    assert by_call(found) == [2.5, 0.0]


async def test_a_users_own_rewards_of_calls_come_on_top() -> None:
    given = attempt(TrajectoryReward(reward_id="own", name="reward", value=1.0))
    given.rewards.insert(0, TrajectoryReward(reward_id="step", name="step", value=0.25, span_id="s0"))
    found, _ = await scored(given, compliance={"rules": [RULE]})
    assert by_call(found) == [-0.25, 1.0]


@pytest.mark.parametrize("name", ["agent", "reward", "compliance"])
def test_a_source_cannot_have_the_name_of_another_part(name: str) -> None:
    with pytest.raises(ValueError, match=f"a source cannot be named {name}"):
        AggregatorSettings(sources=[RewardSource(name=name, function="module:function")])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Rate this answer from 0 to 10: {ouput}", r"\{ouput\} is no place.*\{input\}, \{output\}"),
        ("{output} of {model}", r"\{model\} is no place"),
        ("Was {agent} {status}? 0 or 1", r"needs \{input\}, \{output\} or \{transcript\}"),
        ("", r"needs \{input\}"),
        ('{output}: answer as {"score": 1, "why": {}}, { score }, \\boxed{answer}, $x^{n}_{i}$, \\frac{a}{b}', ""),
    ],
)
async def test_a_judge_that_would_not_be_told_what_it_judges_is_refused(
    tmp_path: Path, template: str, words: str
) -> None:
    file = tmp_path / "template.txt"
    file.write_text(template)
    source = {"name": "j", "url": "http://127.0.0.1:1/v1", "model": "m", "template": file}
    settings = Settings.model_validate({"aggregator": {"sources": [source]}})
    refused = pytest.raises(SettingsError, match=words) if words else contextlib.nullcontext()
    async with httpx.AsyncClient() as client:
        with refused:
            Scoring(settings, client, Verdicts(None, 10))


async def test_rules_alone_can_be_what_is_trained_on() -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    alone = {"agent_weight": 0.0}
    found, given = await scored(attempt(own), aggregator=alone, compliance={"rules": [RULE]})
    assert (found.reward, by_call(found), found.partial) == (-0.5, [-0.5, 0.0], "")
    assert given[-1].dimensions == {"compliance": -0.5}
    unrewarded = attempt(own).model_copy(update={"reward": None, "rewards": [], "partial": "no_reward"})
    found, _ = await scored(unrewarded, aggregator=alone, compliance={"rules": [RULE]})
    assert (found.reward, found.partial) == (-0.5, "")
    kept = {**RULE, "pattern": "never"}
    found, _ = await scored(attempt(own), aggregator=alone, compliance={"rules": [kept]})
    assert found.reward == 0.0, "nothing violated is the best there is"
    found, _ = await scored(unrewarded, compliance={"rules": [RULE]})
    assert (found.reward, found.partial) == (None, "no_reward"), "the agent's own is a part of the sum"


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        ({}, 7.0),
        ({"agent_weight": 0.5, "high": 2.0}, 2.0),
        ({"agent_weight": 0.0}, None),
        ({"sources": [{"name": "x", "function": f"{__name__}:huge"}]}, None),
        ({"sources": [{"name": "x", "function": f"{__name__}:huge", "required": False}]}, 7.0),
        ({"sources": [{"name": "x", "function": f"{__name__}:huge", "agent": "other"}]}, 7.0),
        ({"agent_weight": 1e9}, None),
    ],
)
@pytest.mark.parametrize(
    ("changes", "partial"), [({"status": "failed"}, ""), ({"partial": "expired"}, "expired,unscored")]
)
async def test_what_is_not_scored_has_no_reward_on_another_scale(
    changes: dict[str, str], partial: str, aggregator: dict[str, Any], expected: float | None
) -> None:
    """trainer.incomplete = fill compares it with the sums of others."""
    given = attempt(TrajectoryReward(reward_id="own", name="reward", value=7.0)).model_copy(update=changes)
    found, rewards = await scored(given, aggregator=aggregator, compliance={"rules": [RULE]})
    assert (found.reward, found.partial, rewards) == (expected, partial, [])
    assert [(each.name, each.value) for each in found.rewards] == [("reward", 7.0)], "as the agent gave it"


OPTIONAL = {"name": "x", "function": f"{__name__}:as_much_as_may_be", "required": False, "agent": "solver"}


@pytest.mark.parametrize(
    ("settings", "reward", "reason"),
    [
        ({"compliance": {"rules": [RULE]}}, 1.0, "partial:unscored"),
        ({"aggregator": {"sources": [OPTIONAL]}}, 1.0, "partial:unscored"),
        ({"aggregator": {"agent_weight": 2.0}}, 2.0, ""),
        ({"compliance": {"weight": 0.0, "rules": [RULE]}}, 1.0, ""),
        ({"aggregator": {"sources": [{**OPTIONAL, "agent": "other"}]}}, 1.0, ""),
    ],
)
async def test_no_trainer_takes_what_was_not_scored_for_a_whole_reward(
    settings: dict[str, Any], reward: float, reason: str
) -> None:
    """A simulated user's call names no attempt: sources and rules are not asked, and who trains the solver alone must
    not train on the agent's own reward, with its violation uncharged."""
    own = llm_call("r", 1, [1, 2], [3, 4], attempt=2).model_copy(update={"agent": "solver", "output": "call 555-1234"})
    user = llm_call("r", 2, [5], [6]).model_copy(update={"agent": "user", "resource": "simulator", "attempt_id": ""})
    spans, rewards = [value(own), value(user)], [value(own_reward("r", 1.0, attempt=2))]
    given = assemble(finished("r", attempt=2), Announcement(), spans, rewards, keep_spans=True).trajectory
    assert isinstance(given, FinishedAttempt)
    given.agent = "solver"
    assert [(each.reason, each.agent) for each in given.left_out] == [("unattributed", "user")]
    found, _ = await scored(given, **settings)
    member, _ = member_of(found, "policy", ModelLimits(100, 100), ["solver"])
    assert (found.reward, member.reason) == (reward, reason)


@pytest.mark.parametrize("compliance", [{}, {"weight": 0.0, "rules": [RULE]}])
async def test_a_sum_of_nothing_is_refused(compliance: dict[str, Any]) -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    with pytest.raises(SettingsError, match=r"aggregator\.agent_weight = 0.*no attempt would have a reward"):
        await scored(attempt(own), aggregator={"agent_weight": 0.0}, compliance=compliance)


async def refused(given: FinishedAttempt, **settings: Any) -> tuple[InputRefused, Trajectory]:
    """What is said of an attempt whose reward cannot be had, and its trajectory as it would be published."""
    with pytest.raises(InputRefused) as caught:
        await scored(given, **settings)
    (found,) = [event for event in caught.value.events if isinstance(event, Trajectory)]
    return caught.value, Trajectory.model_validate_json(found.model_dump_json())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("huge", r"function x: ValueError: a = 1\.5e\+308 is no reward: rewards are between ±1e\+09"),
        ("too_much_together", r"function x: ValueError: the sum of its values = 1\.2e\+09 is no reward"),
    ],
)
async def test_a_part_beyond_what_a_reward_may_be_has_failed(function: str, words: str) -> None:
    """Finite numbers of which the sum is not: no reward can be made of them."""
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    source = {"name": "x", "function": f"{__name__}:{function}", "required": False}
    found, given = await scored(attempt(own), aggregator={"sources": [source]})
    assert (found.reward, found.partial, [each.name for each in given]) == (1.0, "", ["reward"])
    error, found = await refused(attempt(own), aggregator={"sources": [{**source, "required": True}]})
    assert error.reason == "reward_failed"
    assert re.search(words, str(error))
    assert (found.reward, found.partial) == (None, "reward_failed")


async def test_a_part_may_be_as_large_as_a_reward() -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    source = {"name": "x", "function": f"{__name__}:as_much_as_may_be"}
    found, _ = await scored(attempt(own), aggregator={"sources": [source]})
    assert found.reward == 999_999_996.0


async def test_a_judge_that_says_more_than_a_reward_may_be_has_failed(tmp_path: Path) -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=1.0)
    (tmp_path / "template.txt").write_text("Rate {output}")
    async with model_server(lambda _: "2000000000") as server:
        source = {"name": "j", "url": server.url, "model": "m", "template": tmp_path / "template.txt"}
        error, found = await refused(attempt(own), aggregator={"sources": [source]})
    assert "2e+09 is no reward: rewards are between ±1e+09" in str(error)
    assert found.partial == "reward_failed"


async def test_a_kept_answer_that_gives_no_number_is_asked_for_anew(tmp_path: Path) -> None:
    own = TrajectoryReward(reward_id="own", name="reward", value=0.0)
    (tmp_path / "template.txt").write_text("Rate {output}")
    said = ["Score: 3", "hm", "Points: 4"]
    async with model_server(lambda _: said[len(server.questions) - 1]) as server:
        source = {"name": "j", "url": server.url, "model": "m", "template": tmp_path / "template.txt"}
        aggregator = {"sources": [source], "cache": tmp_path / "verdicts.sqlite", "tries": 2}
        first = await kept_scored(attempt(own), aggregator)
        source["answer"] = "Points: [0-9]+"
        values = [first] + [await kept_scored(attempt(own), aggregator) for _ in range(2)]
    assert values == [3.0, 4.0, 4.0]
    assert len(server.questions) == 3, "what is kept is no try, and the number that was had is kept"


async def kept_scored(given: FinishedAttempt, aggregator: dict[str, Any]) -> float | None:
    """With the verdicts of earlier processes."""
    settings = Settings.model_validate({"aggregator": aggregator})
    verdicts = Verdicts(settings.aggregator.cache, 10)
    try:
        async with httpx.AsyncClient() as client:
            events = await Scoring(settings, client, verdicts).score(given)
    finally:
        verdicts.close()
    return next(event.reward for event in events if isinstance(event, Trajectory))


@pytest.mark.parametrize(
    ("own", "aggregator", "rule", "words"),
    [
        (1e308, {"agent_weight": 10.0}, RULE, r"the agent's own = 1e\+308 is no reward"),
        (1e308, {"agent_weight": 10.0, "low": -1, "high": 1}, RULE, r"the agent's own = 1e\+308 is no reward"),
        (-2e9, {}, RULE, r"the agent's own = -2e\+09 is no reward: rewards are between ±1e\+09"),
        (1.0, {"agent_weight": 1.5e9}, RULE, r"the sum of the parts \(agent 1\.5e\+09, compliance -0\.5\) = 1\.5e\+09"),
        (1e9, {"agent_weight": 1e300, "high": 1}, RULE, r"agent, by its weight = inf is no reward"),
        (1.0, {"low": -1}, {**RULE, "pattern": "[a-z]", "cost": 1e308}, r"compliance, by its weight = -inf"),
    ],
)
async def test_what_does_not_add_up_to_a_reward_is_refused(
    own: float, aggregator: dict[str, Any], rule: dict[str, Any], words: str
) -> None:
    given = attempt(TrajectoryReward(reward_id="own", name="reward", value=own))
    error, found = await refused(given, aggregator=aggregator, compliance={"rules": [rule]})
    assert error.reason == "reward_failed"
    assert re.search(words, str(error))
    assert (found.reward, found.partial) == (None, "reward_failed")


async def test_a_reward_that_does_not_count_may_be_anything() -> None:
    given = attempt(TrajectoryReward(reward_id="own", name="reward", value=1e308))
    found, _ = await scored(given, aggregator={"agent_weight": 0.0}, compliance={"rules": [RULE]})
    assert found.reward == -0.5
