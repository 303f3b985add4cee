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
from fulgurite.producers.gateway.continuation import Form
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import RENDER
from fulgurite.producers.gateway.turn_ends import MAX_TRIES, MAX_VARIANTS, MAX_VARIANTS_OF_ROLLOUT, TEXT, TurnEnds

Json = dict[str, Any]
USER, ASSISTANT, TOOL, CALL, NEWLINE, END = range(1, 7)
SPELLED = {NEWLINE: "\n", END: "<|end|>"}
FOR_EVER = float("inf")
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
    assert await ends.closing(call(), form, FOR_EVER) == END
    asked = template.asked
    for _ in range(3):
        assert await ends.closing(call(), form, FOR_EVER) == END
    assert ends.known("policy") == {END: "<|end|>"}
    assert template.asked == asked


async def test_a_template_that_closes_text_and_call_each_has_no_closing_for_both():
    ends = TurnEnds(Template([END], twice=True))
    assert await ends.closing(call(), TEXT, FOR_EVER) == END
    assert await ends.closing(call(), BOTH, FOR_EVER) is None


async def test_a_template_that_closes_calls_otherwise_than_texts_has_no_closing_for_them():
    ends = TurnEnds(Template([END], of_calls=[NEWLINE]))
    assert await ends.closing(call(), TEXT, FOR_EVER) == END
    assert await ends.closing(call(), CALLED, FOR_EVER) is None


async def test_what_a_text_may_hold_closes_nothing():
    assert await TurnEnds(Template([NEWLINE, END])).closing(call(), TEXT, FOR_EVER) is None
    assert await TurnEnds(Template([])).closing(call(), TEXT, FOR_EVER) is None


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
    assert await ends.closing(call(), TEXT, FOR_EVER) == END
    assert template.asked == 5


@pytest.mark.parametrize("status", [429, 503, 504])
async def test_a_server_that_is_away_or_slow_is_asked_again(status: int):
    ends = TurnEnds(Template([END], failing=RENDER, failures=3 * MAX_TRIES, status=status))
    for _ in range(3 * MAX_TRIES):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, FOR_EVER)
    assert await ends.closing(call(), TEXT, FOR_EVER) == END


async def test_tries_that_failed_expire(monkeypatch: pytest.MonkeyPatch):
    ends = TurnEnds(Template([END], failing=RENDER, failures=MAX_TRIES))
    for _ in range(MAX_TRIES):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, FOR_EVER)
    assert await ends.closing(call(), TEXT, FOR_EVER) is None
    monkeypatch.setattr(turn_ends, "TRIES_SECONDS", 0.0)
    assert await ends.closing(call(), TEXT, FOR_EVER) == END


def varied(number: int, rollout: str) -> Call:
    given = call()
    body = given.body | {"chat_template_kwargs": {"now": number}}
    return replace(given, body=body, caller=replace(given.caller, rollout_id=rollout))


async def test_other_template_arguments_with_each_call_are_few_questions_and_switch_nothing_off():
    template = Template([END])
    ends = TurnEnds(template)
    found = [await ends.closing(varied(number, "r"), TEXT, FOR_EVER) for number in range(1_000)]
    assert found == [END] * MAX_VARIANTS_OF_ROLLOUT + [None] * (1_000 - MAX_VARIANTS_OF_ROLLOUT)
    assert await ends.closing(varied(-1, "another"), BOTH, FOR_EVER) == END
    for number in range(2_000, 2_300):
        await ends.closing(varied(number, f"r{number}"), TEXT, FOR_EVER)
    assert template.asked <= 4 * MAX_VARIANTS + 4
    assert await ends.closing(varied(0, "r"), TEXT, FOR_EVER) == END
    assert await ends.closing(call(), CALLED, FOR_EVER) == END


async def test_the_form_not_asked_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turn_ends, "MAX_FORMS", 2)
    template = Template([END])
    ends = TurnEnds(template)
    for number in (1, 2, 1, 3):
        assert await ends.closing(varied(number, "r"), TEXT, FOR_EVER) == END
    asked = template.asked
    assert await ends.closing(varied(1, "r"), TEXT, FOR_EVER) == END
    assert template.asked == asked
    assert await ends.closing(varied(2, "r"), TEXT, FOR_EVER) == END
    assert template.asked == asked + 4
