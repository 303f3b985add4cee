"""Conversations with the traits of real chat templates: the next prompt begins with exactly the tokens of the turn
before and ends with what the template writes for what is new, or it is as the template writes it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.producers.gateway.calls import Call, Caller
from fulgurite.producers.gateway.continuation import NotContinued, Spliced, splice, tokens
from fulgurite.producers.gateway.conversations import Conversations
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.turn_ends import TEXT, TurnEnds
from tests.producers.chat_templates import TRAITS, Json, Server

FOR_EVER = float("inf")
ATTEMPT = ("r", "a", "policy")


class Agent:
    """And the gateway's part that its prompts go through."""

    def __init__(self, trait: str) -> None:
        self.server = Server(TRAITS[trait])
        self.ends = TurnEnds(self.server)
        self.conversations = Conversations()
        self.messages: list[Json] = [{"role": "user", "content": "how many?"}]
        self.calls: list[tuple[int, list[int], str]] = []
        """Of each: the place of its answer, its prompt and response, and the end that the policy gave it."""
        self.reasons: list[str] = []

    async def turn(self, answer: Json, end: str, *, sends_back: Json, then: list[Json]) -> None:
        call = self._call()
        rendered = self.server.encode(self.server.write(self.messages, to_answer=True))
        await self.ends.closing(call, TEXT, FOR_EVER)
        spliced = await self._splice(call, rendered)
        prompt = spliced.prompt.tolist() if spliced else rendered
        response = self.server.encode("<think>so</think> as it was said", as_sampled=True) + self.server.encode(end)
        choice: Json = {"index": 0, "token_ids": response, "finish_reason": "stop" if end else "length"}
        await self.ends.learn(call, [choice], FOR_EVER)
        known = self.ends.known("policy")
        self.conversations.remember(
            ATTEMPT,
            self.messages,
            answer,
            rendered=rendered,
            prompt=prompt,
            response=response,
            end_text=end or None,
            ends=known,
            answers=spliced.answers if spliced else (),
        )
        self.calls.append((len(self.messages), [*prompt, *response], end))
        self.messages = [*self.messages, sends_back, *then]

    async def _splice(self, call: Call, rendered: list[int]) -> Spliced | None:
        found = self.conversations.find(ATTEMPT, self.messages)
        if found is None:
            self.reasons.append("unknown_turn")
            return None
        closing = await self.ends.closing(call, found.form, FOR_EVER, follows=found.follows, sampled=found.turn.end)
        try:
            spliced = splice(found.turn, tokens(rendered), closing)
        except NotContinued as error:
            self.reasons.append(error.reason)
            return None
        self.reasons.append("continues")
        at, before, end = next(each for each in self.calls if each[1] == [*found.turn.prompt, *found.turn.response])
        prompt = spliced.prompt.tolist()
        assert prompt[: len(before)] == before
        assert self.server.decode(prompt[len(before) :]) == self.server.after(self.messages, at, end)
        return spliced

    def _call(self) -> Call:
        caller = Caller(rollout_id="r", attempt_id="a", authorization="", key="", headers={}, query="")
        arguments = dict(self.server.trait.arguments)
        body: Json = {"model": "policy", "messages": self.messages, "chat_template_kwargs": arguments}
        return Call(CHAT, caller, (1,), "1" * 32, "", ("1" * 16,), "", 0, 1, 0.0, body, b"", b"")


def answered(number: int, *, text: bool, calls: int, reasons: bool) -> Json:
    answer: Json = {"role": "assistant", "content": f"it is {number}" if text else None}
    if calls:
        function = {"name": "f", "arguments": f'{{"x": "{number}"}}'}
        answer["tool_calls"] = [{"id": f"c{at}", "type": "function", "function": function} for at in range(calls)]
    return answer | ({"reasoning": "hm"} if reasons else {})


def results(number: int, calls: int) -> list[Json]:
    return [{"role": "tool", "tool_call_id": f"c{at}", "content": f"got {number}"} for at in range(calls)]


def without_reasoning(answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name != "reasoning"}


async def converse(trait: str, *, calls: int, reasons: bool, loses: bool = False) -> Agent:
    agent = Agent(trait)
    own = agent.server.trait
    for number in range(4):
        answer = answered(number, text=not calls, calls=calls, reasons=reasons)
        then = results(number, calls) or [{"role": "user", "content": f"and {number}?"}]
        end = own.end_of_calls or own.end if calls else own.end
        await agent.turn(answer, end, sends_back=without_reasoning(answer) if loses else answer, then=then)
    return agent


@pytest.mark.parametrize("reasons", [False, True])
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("trait", TRAITS)
async def test_turns_go_on_with_their_own_tokens_whatever_the_template(trait: str, calls: int, reasons: bool):
    agent = await converse(trait, calls=calls, reasons=reasons)
    assert agent.reasons == ["unknown_turn", "continues", "continues", "continues"]


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("trait", TRAITS)
async def test_an_agent_that_loses_reasoning_goes_on_with_what_was_sampled(trait: str, calls: int):
    agent = await converse(trait, calls=calls, reasons=True, loses=True)
    assert agent.reasons == ["unknown_turn", "continues", "continues", "continues"]


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("trait", TRAITS)
async def test_reasoning_that_the_template_or_the_agent_drops_with_the_next_question_stays(trait: str, loses: bool):
    agent = await converse(trait, calls=1, reasons=True)
    answer = answered(9, text=True, calls=0, reasons=True)
    for _ in range(2):
        end = agent.server.trait.end
        await agent.turn(answer, end, sends_back=answer, then=[{"role": "user", "content": "and then?"}])
        if loses:
            agent.messages = [without_reasoning(message) for message in agent.messages]
    assert agent.reasons == ["unknown_turn", *["continues"] * 5]


async def test_text_and_call_that_are_closed_each_are_written_again():
    agent = Agent("closed twice")
    answer = answered(1, text=True, calls=1, reasons=False)
    for _ in range(2):
        await agent.turn(answer, "<|end|>", sends_back=answer, then=results(1, 1))
    assert agent.reasons == ["unknown_turn", "form"]


TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.booleans(),
            "calls": st.integers(0, 2),
            "reasons": st.booleans(),
            "loses": st.booleans(),
            "end": st.sampled_from(["", "", "own", "own", "own", "own", "<|end|>", "<|eos|>", "<|user|>", "<|tool|>"]),
            "then": st.lists(st.sampled_from(["user", "tool", "system", "assistant"]), max_size=2),
        }
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(trait=st.sampled_from(sorted(TRAITS)), turns=TURNS)
def test_no_prompt_is_put_together_wrongly(trait: str, turns: list[dict[str, Any]]):
    async def run() -> None:
        agent = Agent(trait)
        own = agent.server.trait
        for number, each in enumerate(turns):
            answer = answered(number, text=each["text"], calls=each["calls"], reasons=each["reasons"])
            then = [{"role": role, "content": f"{role} {number}.{at}"} for at, role in enumerate(each["then"])]
            end = each["end"]
            if end == "own":
                end = own.end_of_calls or own.end if each["calls"] else own.end
            sends_back = without_reasoning(answer) if each["loses"] else answer
            await agent.turn(answer, end, sends_back=sends_back, then=then or results(number, each["calls"]))

    asyncio.run(run())
