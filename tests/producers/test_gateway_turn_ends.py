"""With which token a template closes answers: found out by what it writes, of the backend's routes, once a form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fulgurite.producers.gateway.asking import Asked
from fulgurite.producers.gateway.calls import Call, Caller
from fulgurite.producers.gateway.continuation import Form
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import RENDER
from fulgurite.producers.gateway.turn_ends import MAX_TRIES, TEXT, TurnEnds

Json = dict[str, Any]
USER, ASSISTANT, TOOL, CALL, NEWLINE, END = range(1, 7)
SPELLED = {NEWLINE: "\n", END: "<|end|>"}
CALLED: Form = (False, 1, False)
BOTH: Form = (True, 1, False)


def call() -> Call:
    caller = Caller(rollout_id="r", attempt_id="a", authorization="", key="")
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
        of_calls: list[int] | None = None,
    ) -> None:
        self.closing = closing
        self.of_calls = closing if of_calls is None else of_calls
        self.twice = twice
        self.failing = failing
        self.failures = failures
        self.asked = 0

    async def ask(
        self, call: Call, route: str, body: Mapping[str, Any], deadline: float, asked: Asked | None = None
    ) -> Json | None:
        self.asked += 1
        if self.failures and route == self.failing:
            self.failures -= 1
            raise ApiError(502, "backend_broken", "it broke")
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
    assert await ends.closing(call(), form, 0.0) == END
    asked = template.asked
    for _ in range(3):
        assert await ends.closing(call(), form, 0.0) == END
    assert ends.known("policy") == {END: "<|end|>"}
    assert template.asked == asked


async def test_a_template_that_closes_text_and_call_each_has_no_closing_for_both():
    ends = TurnEnds(Template([END], twice=True))
    assert await ends.closing(call(), TEXT, 0.0) == END
    assert await ends.closing(call(), BOTH, 0.0) is None


async def test_a_template_that_closes_calls_otherwise_than_texts_has_no_closing_for_them():
    ends = TurnEnds(Template([END], of_calls=[NEWLINE]))
    assert await ends.closing(call(), TEXT, 0.0) == END
    assert await ends.closing(call(), CALLED, 0.0) is None


async def test_what_a_text_may_hold_closes_nothing():
    assert await TurnEnds(Template([NEWLINE, END])).closing(call(), TEXT, 0.0) is None
    assert await TurnEnds(Template([])).closing(call(), TEXT, 0.0) is None


@pytest.mark.parametrize("route", [RENDER, "/detokenize"])
async def test_a_failure_is_tried_again_and_not_for_ever(route: str):
    ends = TurnEnds(Template([END], failing=route, failures=2))
    for _ in range(2):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, 0.0)
    await ends.closing(call(), TEXT, 0.0)
    assert ends.known("policy") == {END: "<|end|>"}
    template = Template([END], failing=route, failures=1_000)
    ends = TurnEnds(template)
    for _ in range(MAX_TRIES):
        with pytest.raises(ApiError):
            await ends.closing(call(), TEXT, 0.0)
    before = template.asked
    await ends.closing(call(), TEXT, 0.0)
    assert template.asked == before
