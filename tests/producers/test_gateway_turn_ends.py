"""With which token a template closes answers: found out by what it writes, of the backend's routes, once a form."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from fulgurite.producers.gateway import turn_ends
from fulgurite.producers.gateway.asking import Asked
from fulgurite.producers.gateway.calls import Call, Caller
from fulgurite.producers.gateway.continuation import Closing, Form
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import RENDER
from fulgurite.producers.gateway.turn_ends import MAX_TRIES, MAX_VARIANTS, MAX_VARIANTS_OF_ROLLOUT, TEXT, TurnEnds

Json = dict[str, Any]
USER, ASSISTANT, TOOL, CALL, NEWLINE, END, END_OF_CALL = range(1, 8)
SPELLED = {NEWLINE: "\n", END: "<|end|>", END_OF_CALL: "<|call|>", USER: "<|user|>", TOOL: "<|tool|>"}
FOR_EVER = float("inf")
CLOSED = Closing(END, own=True)
OF_TEXTS = 6
"""Questions that finding out takes, and one more for how a token is written."""
CALLED: Form = (False, 1, False)
BOTH: Form = (True, 1, False)


def call() -> Call:
    caller = Caller(rollout_id="r", attempt_id="a", authorization="", key="", headers={}, query="")
    body: Json = {"model": "policy", "messages": []}
    return Call(CHAT, caller, (1,), "1" * 32, "", ("1" * 16,), "", 0, 1, 0.0, body, b"", b"")


class Template(TokenAsker):
    """A backend that writes messages, each closed by `closing`; with `twice`, a text before a call as well."""

    def __init__(
        self,
        closing: list[int],
        *,
        twice: bool = False,
        failing: str = "",
        failures: int = 0,
        status: int = 502,
        of_calls: list[int] | None = None,
    ) -> None:
        self.closing = closing
        self.of_calls = closing if of_calls is None else of_calls
        self.twice = twice
        self.failing = failing
        self.failures = failures
        self.status = status
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def ask(
        self,
        call: Call,
        route: str,
        body: Mapping[str, Any],
        deadline: float,
        asked: Asked | None = None,
        *,
        whole_deadline: float = 0.0,
        without: frozenset[str] = frozenset(),
    ) -> Json | None:
        self.asked += 1
        await self.may_answer.wait()
        if self.failures and route == self.failing:
            self.failures -= 1
            raise ApiError(self.status, "backend_broken", "it broke")
        if route != RENDER:
            return {"prompt": SPELLED.get(body["tokens"][0], "a")}
        ids: list[int] = []
        for message in body["messages"]:
            ids.append({"user": USER, "assistant": ASSISTANT, "tool": TOOL}[message["role"]])
            ids += [100 + ord(letter) for letter in message["content"]]
            for each in message.get("tool_calls", ()):
                ids += [*(self.closing if self.twice and message["content"] else ()), CALL]
                ids += [100 + ord(letter) for letter in each["function"]["arguments"]]
            ids += self.of_calls if message.get("tool_calls") else self.closing
        return {"token_ids": [*ids, ASSISTANT] if body["add_generation_prompt"] else ids}


@pytest.mark.parametrize("form", [TEXT, CALLED, BOTH])
async def test_the_closing_token_of_a_form_is_asked_once(form: Form):
    template = Template([END, NEWLINE])
    ends = TurnEnds(template)
    assert await ends.closing(call(), form, FOR_EVER) == CLOSED
    asked = template.asked
    for _ in range(3):
        assert await ends.closing(call(), form, FOR_EVER) == CLOSED
    assert ends.known("policy") == {END: "<|end|>"}
    assert template.asked == asked


async def test_a_template_that_closes_text_and_call_each_has_no_closing_for_both():
    ends = TurnEnds(Template([END], twice=True))
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED
    assert await ends.closing(call(), BOTH, FOR_EVER) is None


def ended_with(token: int) -> list[Json]:
    return [{"index": 0, "token_ids": [120, token], "finish_reason": "stop"}]


async def test_how_calls_are_closed_otherwise_than_texts_is_known_once_the_policy_did_it():
    ends = TurnEnds(Template([END], of_calls=[END_OF_CALL]))
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED
    assert await ends.closing(call(), CALLED, FOR_EVER) is None
    await ends.learn(call(), ended_with(END_OF_CALL), FOR_EVER)
    assert await ends.closing(call(), CALLED, FOR_EVER) == Closing(END_OF_CALL, own=True)
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED


async def test_a_role_closes_answers_only_where_it_comes_next():
    template = Template([])
    ends = TurnEnds(template)
    of_users, of_tools = Closing(USER, own=False), Closing(TOOL, own=False)
    assert await ends.closing(call(), TEXT, FOR_EVER, follows="user") == of_users
    assert await ends.closing(call(), CALLED, FOR_EVER, follows="tool") is None
    await ends.learn(call(), ended_with(TOOL), FOR_EVER)
    assert await ends.closing(call(), CALLED, FOR_EVER, follows="tool") == of_tools
    assert await ends.closing(call(), CALLED, FOR_EVER, follows="user") == of_users
    assert await ends.closing(call(), TEXT, FOR_EVER, follows="tool") == of_tools
    assert await ends.closing(call(), TEXT, FOR_EVER, follows="assistant") is None
    asked = template.asked
    assert await ends.closing(call(), TEXT, FOR_EVER, follows="of my own") is None
    assert template.asked == asked


async def test_an_end_after_the_first_makes_doubtful_which_one_closes():
    ends = TurnEnds(Template([END, END_OF_CALL]))
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED
    await ends.learn(call(), ended_with(END_OF_CALL), FOR_EVER)
    assert await ends.closing(call(), TEXT, FOR_EVER, sampled=END_OF_CALL) is None
    assert await ends.closing(call(), TEXT, FOR_EVER, sampled=END) == CLOSED


async def test_what_a_text_may_hold_closes_nothing():
    assert await TurnEnds(Template([NEWLINE, END])).closing(call(), TEXT, FOR_EVER) is None


@pytest.mark.parametrize("route", [RENDER, "/detokenize"])
async def test_a_failure_is_tried_again_and_not_for_ever(route: str):
    ends = TurnEnds(Template([END], failing=route, failures=2))
    for _ in range(2):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, FOR_EVER)
    await ends.closing(call(), TEXT, FOR_EVER)
    assert ends.known("policy") == {END: "<|end|>"}
    template = Template([END], failing=route, failures=1_000)
    ends = TurnEnds(template)
    for _ in range(MAX_TRIES):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, FOR_EVER)
    before = template.asked
    await ends.closing(call(), TEXT, FOR_EVER)
    assert template.asked == before


async def test_agents_that_give_up_end_no_question_and_count_for_nothing():
    template = Template([END])
    template.may_answer.clear()
    ends = TurnEnds(template)
    gone = [asyncio.create_task(ends.closing(call(), TEXT, FOR_EVER)) for _ in range(10)]
    now = asyncio.get_running_loop().time()
    assert await ends.closing(call(), TEXT, now + 0.1) is None  # it waits for less
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    assert template.asked == 1, "they share one question"
    template.may_answer.set()
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED
    assert template.asked == OF_TEXTS + 1


@pytest.mark.parametrize("status", [429, 503, 504])
async def test_a_server_that_is_away_or_slow_is_asked_again(status: int):
    ends = TurnEnds(Template([END], failing=RENDER, failures=3 * MAX_TRIES, status=status))
    for _ in range(3 * MAX_TRIES):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, FOR_EVER)
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED


async def test_tries_that_failed_expire(monkeypatch: pytest.MonkeyPatch):
    ends = TurnEnds(Template([END], failing=RENDER, failures=MAX_TRIES))
    for _ in range(MAX_TRIES):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, FOR_EVER)
    assert await ends.closing(call(), TEXT, FOR_EVER) is None
    monkeypatch.setattr(turn_ends, "TRIES_SECONDS", 0.0)
    assert await ends.closing(call(), TEXT, FOR_EVER) == CLOSED


def varied(number: int, rollout: str) -> Call:
    given = call()
    body = given.body | {"chat_template_kwargs": {"now": number}}
    return replace(given, body=body, caller=replace(given.caller, rollout_id=rollout))


async def test_other_template_arguments_with_each_call_are_few_questions_and_switch_nothing_off():
    template = Template([END])
    ends = TurnEnds(template)
    found = [await ends.closing(varied(number, "r"), TEXT, FOR_EVER) for number in range(1_000)]
    assert found == [CLOSED] * MAX_VARIANTS_OF_ROLLOUT + [None] * (1_000 - MAX_VARIANTS_OF_ROLLOUT)
    assert await ends.closing(varied(-1, "another"), BOTH, FOR_EVER) == CLOSED
    for number in range(2_000, 2_300):
        await ends.closing(varied(number, f"r{number}"), TEXT, FOR_EVER)
    assert template.asked <= OF_TEXTS * MAX_VARIANTS + 1
    assert await ends.closing(varied(0, "r"), TEXT, FOR_EVER) == CLOSED
    assert await ends.closing(call(), CALLED, FOR_EVER) == CLOSED


async def test_the_form_not_asked_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turn_ends, "MAX_FORMS", 2)
    template = Template([END])
    ends = TurnEnds(template)
    for number in (1, 2, 1, 3):
        assert await ends.closing(varied(number, "r"), TEXT, FOR_EVER) == CLOSED
    asked = template.asked
    assert await ends.closing(varied(1, "r"), TEXT, FOR_EVER) == CLOSED
    assert template.asked == asked
    assert await ends.closing(varied(2, "r"), TEXT, FOR_EVER) == CLOSED
    assert template.asked == asked + OF_TEXTS
