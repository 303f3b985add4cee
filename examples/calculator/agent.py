"""An agent that answers word problems with a calculator. Plain code on OpenAI's client: this file is the place for
your own.

To train an agent of yours, write `async def agent(task, rollout) -> float` (or a plain `def`, which runs in a thread)
in any importable module and name it:

    FULGURITE_RUNNER__AGENT=my_package.my_module:agent fulgurite runner

 1. Send your LLM calls to `rollout.base_url`. That is an OpenAI base URL; any client or framework takes one. The calls
    are recorded there, token by token, so nothing else in your agent changes.
 2. Return the reward, a number. An exception makes the attempt a failure, which is retried; it is no reward of 0.

Optional: pass `rollout.sampling_parameters` on (training samples at temperature 1, evaluation may be greedy), and
record tools with `rollout.tool(...)` so that they stand in the trace. `task` is what your function of tasks returned,
here tasks.py.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final
from weakref import WeakKeyDictionary

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from examples.calculator.calculator import calculate
from examples.calculator.reward import reward_of
from examples.calculator.tasks import Task
from fulgurite.producers.rollout import RolloutContext

MAX_TOKENS: Final = 32
"""The longest right message, CALC((37+56)*74), takes 16."""
CALL = re.compile(r"CALC\((.*)\)", re.DOTALL)

# One client, and so one pool of connections, for all rollouts of an event loop: making one costs more than a call.
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = WeakKeyDictionary()


async def agent(task: Task, rollout: RolloutContext) -> float:
    """Two turns: `CALC(expression)`, the tool's result, `ANS number`. Who answers at once gets no tool."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": task["question"]}]
    text = await _ask(rollout, messages)
    call = CALL.fullmatch(text)
    if call is not None:
        with rollout.tool("calculator", input=call.group(1)) as span:
            span.output = calculate(call.group(1))
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "tool", "tool_call_id": "calculator", "content": str(span.output)})
        text = await _ask(rollout, messages)
    return reward_of(text, task["answer"])


async def _ask(rollout: RolloutContext, messages: list[ChatCompletionMessageParam]) -> str:
    client = _client().with_options(base_url=rollout.base_url)
    completion = await client.chat.completions.create(
        model="policy",
        messages=messages,
        max_tokens=MAX_TOKENS,
        extra_headers={"traceparent": rollout.traceparent} if rollout.traceparent else None,
        **rollout.sampling_parameters,
    )
    return completion.choices[0].message.content or ""


def _client() -> AsyncOpenAI:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        # The key is the client's demand, the gateway needs none. Retries carry calls over a busy or starting server.
        _clients[loop] = AsyncOpenAI(api_key="none", base_url="http://unused.invalid", max_retries=8, timeout=120.0)
    return _clients[loop]
