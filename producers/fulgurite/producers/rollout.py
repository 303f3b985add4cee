"""What an agent function is given: its rollout, and the means to record what it does.

    async def agent(task, rollout):                      # or: def agent(task, rollout), which runs in a thread
        client = AsyncOpenAI(base_url=rollout.base_url, api_key="none")
        ...                                              # LLM calls are recorded by the gateway, exactly
        with rollout.tool("calculator", input="2+3") as span:
            span.output = calculate("2+3")
        return 1.0                                       # the reward; or rollout.reward(1.0) and return None

Everything emitted (spans, rewards) goes out at once and is acknowledged before the attempt's end is reported: an agent
never has to wait or flush. The same calls work in coroutines and in threads. Spans nest through context variables.

Agents in other processes and languages need no import of ours: `rollout.environment()` is what to start them with.
Does not know Kafka, nor how the attempt came here or ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fulgurite.producers.outbox import Outbox
from fulgurite.producers.prompts import PromptTemplate, PromptTemplates
from fulgurite.schemas.coordinator import AttemptedRollout
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.event import MAX_TEXT_CHARS
from fulgurite.schemas.ids import attempt_trace_id, new_id, new_span_id, now_ns
from fulgurite.schemas.rewards import FINAL_REWARD, Reward
from fulgurite.schemas.rollouts import Mode
from fulgurite.schemas.spans import OPERATION_AGENT, OPERATION_TOOL, Span, SpanKind
from fulgurite.schemas.topics import REWARDS, SPANS

ATTRIBUTE_ROLLOUT_ID = "agentlightning.rollout_id"
ATTRIBUTE_ATTEMPT_ID = "agentlightning.attempt_id"

ATTRIBUTE_PROMPT_TEMPLATE = "fulgurite.prompt_template"
"""With the template's name behind it, on the root span: which version the agent was given, as resource@version."""

SERVICE = "runner"

MAX_ERROR_CHARS = 4_096
"""Of a status message; the bound of the field."""

MAX_NAME_CHARS = 512
"""Of a span's name; the bound of the field."""

MAX_REWARDS = 10_000
"""Of one attempt: far more than one per step, few enough for whoever collects them until the rollout ends."""

_current_rollout: ContextVar[RolloutContext | None] = ContextVar("fulgurite_rollout", default=None)
_current_span: ContextVar[ActiveSpan | None] = ContextVar("fulgurite_span", default=None)


def current_rollout() -> RolloutContext | None:
    """The rollout this code runs for; None outside of an agent."""
    return _current_rollout.get()


@dataclass
class ActiveSpan:
    """A span that has begun. Set what is known before it ends; it is published then."""

    span_id: str
    trace_id: str
    name: str
    operation: str
    kind: SpanKind
    parent_span_id: str = ""
    start_ns: int = field(default_factory=now_ns)
    input: Any = ""
    output: Any = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """What the agent knew at the start, by name."""
    error: str = ""
    """Why it failed; an exception that leaves the span sets it."""

    @property
    def traceparent(self) -> str:
        """W3C trace context: send it as header `traceparent` and what happens there becomes a child of this span."""
        return f"00-{self.trace_id}-{self.span_id}-01"


class RolloutContext:
    """One attempt at one rollout, as the agent sees it."""

    def __init__(
        self,
        attempted: AttemptedRollout,
        *,
        gateway_url: str,
        agent: str,
        outbox: Outbox,
        prompts: PromptTemplates | None = None,
    ) -> None:
        self.rollout_id = attempted.rollout_id
        self.attempt_id = attempted.attempt.attempt_id
        self.attempt_number = attempted.attempt.sequence_id
        """1 for the first attempt."""
        self.task = attempted.input
        self.task_id = attempted.task_id
        self.group_id = attempted.group_id
        self.run_id = attempted.run_id
        self.mode: Mode = attempted.mode
        self.agent = attempted.agent or agent
        self.metadata = dict(attempted.metadata)
        self.sampling_parameters: dict[str, Any] = dict(attempted.config.sampling_parameters)
        """Pass these to every LLM call: client.chat.completions.create(..., **rollout.sampling_parameters)."""
        self.timeout_seconds = attempted.config.timeout_seconds
        self.base_url = f"{gateway_url.rstrip('/')}/rollout/{self.rollout_id}/attempt/{self.attempt_id}/v1"
        """OpenAI base URL; calls through it are recorded with tokens, logprobs and policy versions."""
        self.trace_id = attempt_trace_id(self.rollout_id, self.attempt_id)
        self.resources_id = attempted.resources_id or ""
        """What it is pinned to: see prompt_template."""
        self._outbox = outbox
        self._prompts = prompts
        self._loop = asyncio.get_running_loop() if prompts is not None else None
        self._root: ActiveSpan | None = None
        self._rewards_left = MAX_REWARDS

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        *,
        operation: str = "",
        kind: SpanKind = "internal",
        input: Any = "",
        attributes: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
    ) -> Generator[ActiveSpan]:
        """Records one step: `with rollout.span("plan", input=question) as span: span.output = ...`.

        input and output are text, or anything JSON can hold. An exception is recorded and goes on.
        """
        parent = _current_span.get()
        active = ActiveSpan(
            span_id=new_span_id(),
            trace_id=self.trace_id,
            name=name,
            operation=operation,
            kind=kind,
            parent_span_id=parent.span_id if parent is not None and parent.trace_id == self.trace_id else "",
            input=input,
            attributes=dict(attributes or {}),
            state=dict(state or {}),
        )
        token = _current_span.set(active)
        try:
            yield active
        except BaseException as error:
            active.error = active.error or describe(error)
            raise
        finally:
            _current_span.reset(token)
            self._outbox.put(SPANS, self.rollout_id, self._span_event(active))

    def tool(
        self, name: str, *, input: Any = "", attributes: dict[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[ActiveSpan]:
        """Records a call of a tool: a span with gen_ai.operation.name = execute_tool."""
        return self.span(
            f"{OPERATION_TOOL} {name}",
            operation=OPERATION_TOOL,
            input=input,
            attributes={"gen_ai.tool.name": name, **(attributes or {})},
        )

    def reward(
        self,
        value: float,
        *,
        name: str = FINAL_REWARD,
        span_id: str = "",
        dimensions: dict[str, float] | None = None,
        reward_id: str = "",
        source: str = "",
        metadata: dict[str, str] | None = None,
    ) -> Reward:
        """Gives a reward: to the rollout (name `reward`; the last one counts), or to one span. Returns the event.

        The same reward_id given twice counts once. Raises FulguriteError beyond MAX_REWARDS.
        """
        if self._rewards_left <= 0:
            raise FulguriteError(
                f"attempt {self.attempt_id} gave {MAX_REWARDS} rewards, the bound of one attempt: "
                "sum them up, or put the parts of one into its dimensions"
            )
        reward = Reward(
            reward_id=reward_id or new_id(),
            rollout_id=self.rollout_id,
            attempt_id=self.attempt_id,
            span_id=span_id,
            name=clean(name),
            value=value,
            dimensions={as_text(part): number for part, number in (dimensions or {}).items()},
            source=clean(source or self.agent or SERVICE),
            metadata=as_json(metadata or {}),
        )
        self._outbox.put(REWARDS, self.rollout_id, reward)
        self._rewards_left -= 1
        return reward

    async def prompt_template(self, name: str) -> PromptTemplate:
        """The newest version of a prompt template, or the one this rollout is pinned to; noted on its root span.

        Raises NoTemplate: what there is instead.
        """
        if self._prompts is None:
            raise FulguriteError("this rollout has no prompt templates: it does not run under a runner")
        template = await self._prompts.get(name, self.resources_id)
        if self._root is not None:
            self._root.attributes[f"{ATTRIBUTE_PROMPT_TEMPLATE}.{name}"] = template.pin
        return template

    def prompt_template_sync(self, name: str) -> PromptTemplate:
        """The same, for plain functions, which run in threads."""
        if self._loop is None:
            raise FulguriteError("this rollout has no prompt templates: it does not run under a runner")
        return asyncio.run_coroutine_threadsafe(self.prompt_template(name), self._loop).result()

    def allow_final_reward(self) -> None:
        """For the runner: the reward that the agent returned is never refused, however many it gave before."""
        self._rewards_left += 1

    async def flush(self) -> None:
        """Waits until everything emitted so far is acknowledged. The runner does it at the end anyway."""
        await self._outbox.flush()

    @property
    def traceparent(self) -> str:
        """Of the current span; put it into the headers of LLM calls, and their spans become children of it."""
        active = _current_span.get()
        return active.traceparent if active is not None else ""

    def environment(self) -> dict[str, str]:
        """Environment variables for an agent in another process, in any language.

        OPENAI_BASE_URL and OPENAI_API_KEY are read by OpenAI's clients; OTEL_RESOURCE_ATTRIBUTES by every OpenTelemetry
        SDK, so that its spans belong to this attempt (and by `emit_reward`); TRACEPARENT is W3C trace context.
        """
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": "none",
            "OTEL_RESOURCE_ATTRIBUTES": (
                f"{ATTRIBUTE_ROLLOUT_ID}={self.rollout_id},{ATTRIBUTE_ATTEMPT_ID}={self.attempt_id}"
            ),
            "TRACEPARENT": self.traceparent,
        }

    @contextlib.contextmanager
    def active(self, root_input: str) -> Generator[ActiveSpan]:
        """For the runner: makes this the current rollout, under the root span of the attempt."""
        token = _current_rollout.set(self)
        try:
            with self.span(
                f"{OPERATION_AGENT} {self.agent}".strip(),
                operation=OPERATION_AGENT,
                input=root_input,
                attributes={"gen_ai.agent.name": self.agent, "fulgurite.attempt_number": self.attempt_number},
            ) as root:
                self._root = root
                yield root
        finally:
            self._root = None
            _current_rollout.reset(token)

    def _span_event(self, active: ActiveSpan) -> Span:
        return Span(
            rollout_id=self.rollout_id,
            attempt_id=self.attempt_id,
            trace_id=active.trace_id,
            span_id=active.span_id,
            parent_span_id=active.parent_span_id,
            name=clean(active.name[:MAX_NAME_CHARS]),
            kind=active.kind,
            status="error" if active.error else "ok",
            status_message=clean(active.error[:MAX_ERROR_CHARS]),
            start_ns=active.start_ns,
            # The wall clock may be set back; a span never ends before it began.
            end_ns=max(now_ns(), active.start_ns),
            service=SERVICE,
            agent=self.agent,
            operation=clean(active.operation),
            input=as_text(active.input),
            output=as_text(active.output),
            attributes=as_json(active.attributes),
            state=as_json(active.state),
        )


def describe(error: BaseException) -> str:
    """An error in one line, for status messages and events. Never raises."""
    try:
        text = str(error)
    except Exception:  # an exception of the agent's own, that cannot even say what is wrong
        text = ""
    name = type(error).__name__
    return clean(f"{name}: {text}"[:MAX_ERROR_CHARS] if text else name)


def as_text(value: Any) -> str:
    """Text as it is; anything else as JSON, what JSON cannot hold by its repr. Cut at the bound of a span's field.

    Never raises.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value[:MAX_TEXT_CHARS])
    try:
        text = json.dumps(value, ensure_ascii=False, default=_repr)
    except _NO_JSON:
        text = _repr(value)
    return clean(text[:MAX_TEXT_CHARS])


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, as far as JSON can hold them; the others by their repr. Never raises.

    NaN and infinities stay: events write them as strings.
    """
    try:
        return json.loads(clean(json.dumps(values, ensure_ascii=False, default=_repr)))
    except _NO_JSON:
        return {as_text(name): as_text(value) for name, value in values.items()}


def clean(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair, which a cut string may end with, becomes `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_NO_JSON = (TypeError, ValueError, RecursionError)
"""What json says of keys that are no text, of circles, of integers too long to print, of values too deep."""


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
