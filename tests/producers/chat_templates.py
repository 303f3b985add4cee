"""Small chat templates with the traits of real ones, and a server that writes conversations with them.

A character is a token, twice: the server writes the one, and the policy of the tests samples the other, so that what
was sampled is never what is written of its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import Environment

from fulgurite.producers.gateway.asking import Asked
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import RENDER

Json = dict[str, Any]

SPECIAL: Final = re.compile(r"(<\|[a-z_]+\|>|</?[a-z_]+>)")

_CALLS: Final = (
    '{% for call in message.tool_calls or () %}<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}"
)
_LAST_QUESTION: Final = (
    "{% set last = namespace(at=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
)
_OTHERS: Final = "<|start|>{{ 'user' if message.role == 'tool' else message.role }}\n{{ message.content }}<|end|>\n"

PLAIN: Final = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}" + _CALLS + "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKING: Final = (
    _LAST_QUESTION + "{% for message in messages %}{% if message.role == 'assistant' %}<|start|>assistant\n"
    "{% if loop.index0 > last.at and (loop.last or message.reasoning or always) %}"
    "<think>\n{{ message.reasoning }}\n</think>\n\n{% endif %}{{ message.content }}" + _CALLS + "<|end|>\n"
    "{% else %}" + _OTHERS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif always %}<think>\n{% endif %}{% endif %}"
)
AFTER_TOOLS: Final = (
    "{% set now = namespace(tool=false) %}{% for message in messages %}"
    "{% if message.role == 'tool' %}<|output|>{{ message.content }}{% set now.tool = true %}"
    "{% elif message.role == 'assistant' %}{{ '<|outputs_end|>' if now.tool else '<|assistant|>' }}"
    "{% set now.tool = false %}{{ message.content }}" + _CALLS + "<|eos|>"
    "{% else %}{% set now.tool = false %}<|{{ message.role }}|>{{ message.content }}"
    "{% endif %}{% endfor %}{% if now.tool %}<|outputs_end|>{% endif %}"
    "{% if add_generation_prompt and not now.tool %}<|assistant|><think>\n{% endif %}"
)
ROLES: Final = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\n<think></think>\n"
    "{{ message.content }}" + _CALLS + "{% elif message.role == 'tool' %}"
    "{{ '<|tool|>' if messages[loop.index0 - 1].role != 'tool' }}\n<output>{{ message.content }}</output>"
    "{% else %}<|{{ message.role }}|>\n{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHANNELS: Final = (
    "{% for message in messages %}<|start|>{{ message.role }}{% if message.tool_calls %} to=f<|message|>"
    "{{ message.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|message|>{{ message.content }}"
    "{{ '<|return|>' if loop.last and message.role == 'assistant' and not add_generation_prompt else '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
WITHOUT_CALLS: Final = PLAIN.replace(_CALLS, "")
TWICE: Final = PLAIN.replace(
    _CALLS,
    "{% if message.tool_calls and message.content %}<|end|>\n<|more|>{% endif %}" + _CALLS,
)


RESULTS_WITHIN: Final = (
    "{% set now = namespace(calls=false) %}{% for message in messages %}{% if message.role == 'tool' and now.calls %}"
    "{% else %}{% set now.calls = message.role == 'assistant' and message.tool_calls | length > 0 %}"
    "<|start|>{{ message.role }}\n" + _CALLS + "{% set on = namespace(results=now.calls) %}"
    "{% for later in messages[loop.index:] %}{% set on.results = on.results and later.role == 'tool' %}"
    "{% if on.results %}<|result|>{{ later.content }}{% endif %}{% endfor %}{{ message.content }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@dataclass(slots=True, frozen=True)
class Trait:
    template: str
    end: str = "<|end|>"
    """With which the policy ends texts."""
    end_of_calls: str = ""
    """Calls; empty: as texts."""
    opens: str = r"<\|start\|>assistant"
    """Answers."""
    closes: str = r"<\|end\|>|<\|call\|>|<\|return\|>|<\|eos\|>"
    """What of an answer comes last."""
    before: str = r"(?!)"
    """What comes after an answer that no end closes."""
    arguments: tuple[tuple[str, Any], ...] = ()


TRAITS: Final = {
    "plain": Trait(PLAIN),
    "thinking": Trait(THINKING),
    "no thinking": Trait(THINKING, arguments=(("enable_thinking", False),)),
    "always thinking": Trait(THINKING, arguments=(("always", True),)),
    "always without thinking": Trait(THINKING, arguments=(("always", True), ("enable_thinking", False))),
    "after tools": Trait(AFTER_TOOLS, end="<|eos|>", opens=r"<\|assistant\|>|<\|outputs_end\|>"),
    "roles": Trait(ROLES, "<|user|>", "<|tool|>", r"<\|assistant\|>", r"(?!)", r"<\|(user|tool|system|assistant)\|>"),
    "channels": Trait(CHANNELS, "<|return|>", "<|call|>"),
    "without calls": Trait(WITHOUT_CALLS),
    "results within": Trait(RESULTS_WITHIN, end_of_calls="<|result|>", before=r"<\|result\|>"),
    "closed twice": Trait(TWICE, closes=r"<\|end\|>(?!\n<\|more\|>)"),
}


class Server(TokenAsker):
    def __init__(self, trait: Trait) -> None:
        self.trait = trait
        self._template = Environment().from_string(trait.template)
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}

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
        if route != RENDER:
            return {"prompt": self.decode(body["tokens"])}
        return {"token_ids": self.encode(self.write(body["messages"], to_answer=body["add_generation_prompt"]))}

    def write(self, messages: list[Json], *, to_answer: bool) -> str:
        read = [self._read(message) for message in messages]
        return self._template.render(messages=read, add_generation_prompt=to_answer, **dict(self.trait.arguments))

    def _read(self, message: Json) -> Json:
        calls = [
            {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        return message | {"content": message.get("content") or "", "tool_calls": calls}

    def encode(self, text: str, *, as_sampled: bool = False) -> list[int]:
        parts = (part for each in SPECIAL.split(text) for part in ([each] if SPECIAL.fullmatch(each) else each))
        return [self._id(part if SPECIAL.fullmatch(part) or not as_sampled else f"{part}\0") for part in parts]

    def _id(self, part: str) -> int:
        if part not in self._ids:
            self._ids[part] = len(self._texts)
            self._texts.append(part.removesuffix("\0"))
        return self._ids[part]

    def decode(self, ids: list[int]) -> str:
        return "".join(self._texts[token] for token in ids)

    def after(self, messages: list[Json], answer: int, end: str) -> str:
        """What is to follow the answer (a place in the messages) that the policy ended with `end`, or did not end."""
        text = self.write(messages, to_answer=True)
        number = sum(message["role"] == "assistant" for message in messages[:answer])
        opened = list(re.finditer(self.trait.opens, text))[number].end()
        closed = re.compile(f"{self.trait.closes}|{self.trait.before}").search(text, opened)
        assert closed
        is_own = not re.fullmatch(self.trait.before, closed[0])
        return text[closed.end() if end and (is_own or end == closed[0]) else closed.start() :]
