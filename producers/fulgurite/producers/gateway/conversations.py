"""Remembers the turns of running attempts, and finds the one that a new call continues.

Promises: a turn is found only for messages that are the turn's own, then its answer as the agent got it, then whatever
came after; of several, the longest. What may differ on the way through an agent's framework without a difference in
meaning does not count (null or empty content, spaces in the JSON of a tool call, fields that no template reads). Nor
does it where all reasoning is gone, for which most clients have no field: the turn is found by what was said and
called, if it is the only one with that. Everything else counts, so an answer that was shortened or reworded, or whose
reasoning is another, is not found. Whatever stands in a message, finding and remembering never raise: at worst nothing
is found.

Memory is bounded in tokens: the attempt silent for longest is forgotten first. A restart, or another gateway, knows
nothing of the turns before: prompts are then as the template writes them. Knows neither HTTP nor chat templates.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from os import urandom
from types import MappingProxyType
from typing import Any, Final

import orjson

from fulgurite.producers.gateway.continuation import Form, Place, Turn, tokens

MAX_TOKENS: Final = 64_000_000
"""Over all attempts: 256 MB."""
OF_AN_ATTEMPT: Final = 256
OF_A_TURN: Final = 256
"""What remembering one takes beside its tokens, in tokens of four bytes: short turns are many."""
OF_AN_ANSWER: Final = 32
"""Its place in a turn, the same."""
MAX_TURNS: Final = 256
"""Of one attempt; the oldest is forgotten first."""

Messages = Sequence[Any]
"""As the agent sent them: whether they are messages, the backend says."""


@dataclass(slots=True)
class _Attempt:
    turns: OrderedDict[bytes, tuple[bytes, Turn]] = field(default_factory=OrderedDict[bytes, tuple[bytes, Turn]])
    """By all that was said; beside each what it is without reasoning."""
    unreasoned: dict[bytes, set[bytes]] = field(default_factory=dict[bytes, set[bytes]])
    """Which turns are the same without reasoning."""
    ends: dict[int, str] = field(default_factory=dict[int, str])
    """End-of-turn tokens that its responses closed with, and how they are written."""
    tokens: int = 0


@dataclass(slots=True, frozen=True)
class Found:
    """A turn that a call continues, and how its answer stands in the call's messages."""

    turn: Turn
    form: Form
    follows: str
    """The role of the message after it; empty where it is the last one."""


class Conversations:
    """Of one gateway. `attempt` is whatever names an attempt and a model: turns of one are never found for another."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._attempts: OrderedDict[tuple[str, ...], _Attempt] = OrderedDict()
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """What all that is remembered takes."""
        return self._tokens

    def find(self, attempt: tuple[str, ...], messages: Messages) -> Found | None:
        """The longest turn that the messages continue."""
        known = self._attempts.get(attempt)
        if known is None:
            return None
        self._attempts.move_to_end(attempt)
        found = None
        for at, (digest, unreasoned) in enumerate(_digests(messages)):
            if digest == unreasoned:  # which one it was, must be beyond doubt
                alike = known.unreasoned.get(digest, ())
                digest = next(iter(alike)) if len(alike) == 1 else b""
            if kept := known.turns.get(digest):
                found = at, kept[1]
        if found is None:
            return None
        at, turn = found
        return Found(turn, _form(messages[at]), _role(messages[at + 1]) if at + 1 < len(messages) else "")

    def remember(
        self,
        attempt: tuple[str, ...],
        messages: Messages,
        answer: Mapping[str, Any],
        *,
        rendered: list[int],
        prompt: list[int],
        response: list[int],
        end_text: str | None,
        ends: Mapping[int, str] = MappingProxyType({}),
        answers: tuple[Place, ...] = (),
    ) -> None:
        """One choice's answer, as the agent got it. `answers`: those in `rendered` whose own tokens stand in `prompt`.
        `end_text` is how the response's last token is written, where that
        ended the turn; None for a response that was cut off. `ends`: what is known of such tokens otherwise."""
        known = self._attempt(attempt)
        self._shrink()
        known.ends.update(ends)
        if end_text and response:
            known.ends[response[-1]] = end_text
        if _spells_out(answer, known.ends.values()):
            return  # where the template closes this answer could not be told from what it says
        try:
            before = tokens(rendered)
            turn = Turn(
                rendered=before,
                prompt=before if prompt == rendered else tokens(prompt),
                response=tokens(response),
                finished=bool(end_text and response),
                ends=frozenset(known.ends),
                answers=answers,
            )
        except (TypeError, OverflowError):
            return  # no token ids: the recording has said so
        *_, (digest, unreasoned) = _digests([*messages, answer])
        self._forget(known, digest)
        known.turns[digest] = unreasoned, turn
        known.unreasoned.setdefault(unreasoned, set()).add(digest)
        self._count(known, _size(turn))
        if len(known.turns) > MAX_TURNS:
            self._forget(known, next(iter(known.turns)))
        self._shrink()

    def _attempt(self, attempt: tuple[str, ...]) -> _Attempt:
        """It counts from here on, also where nothing of it is remembered but how it writes the ends of turns."""
        known = self._attempts.get(attempt)
        if known is None:
            known = self._attempts[attempt] = _Attempt()
            self._count(known, OF_AN_ATTEMPT)
        self._attempts.move_to_end(attempt)
        return known

    def _shrink(self) -> None:
        """The attempt that was used last stays until another one is."""
        while self._tokens > self._max_tokens and len(self._attempts) > 1:
            _, oldest = self._attempts.popitem(last=False)
            self._tokens -= oldest.tokens

    def _forget(self, attempt: _Attempt, digest: bytes) -> None:
        if kept := attempt.turns.pop(digest, None):
            unreasoned, turn = kept
            attempt.unreasoned[unreasoned].discard(digest)
            if not attempt.unreasoned[unreasoned]:
                del attempt.unreasoned[unreasoned]
            self._count(attempt, -_size(turn))

    def _count(self, attempt: _Attempt, more: int) -> None:
        attempt.tokens += more
        self._tokens += more


def _form(answer: Mapping[str, Any]) -> Form:
    calls = answer.get("tool_calls")
    reasoning = answer.get("reasoning") or answer.get("reasoning_content")
    return bool(_content(answer.get("content"))), len(calls) if isinstance(calls, list) else 0, bool(reasoning)


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    return role if isinstance(role, str) else "?"


def _size(turn: Turn) -> int:
    prompt = 0 if turn.prompt is turn.rendered else len(turn.prompt)
    return OF_A_TURN + len(turn.rendered) + len(turn.response) + prompt + OF_AN_ANSWER * len(turn.answers)


def _digests(messages: Messages) -> Iterator[tuple[bytes, bytes]]:
    """Two for each beginning of the list, the shortest first: of all that it says, and without reasoning."""
    whole, without = blake2b(digest_size=16), blake2b(digest_size=16)
    for message in messages:
        meaning = _meaning(message)
        part = unreasoned = _written(meaning)
        if len(meaning) > 1 and meaning[-1]:
            unreasoned = _written([*meaning[:-1], ""])
        whole.update(len(part).to_bytes(8, "little") + part)
        without.update(len(unreasoned).to_bytes(8, "little") + unreasoned)
        yield whole.copy().digest(), without.copy().digest()


def _meaning(message: Any) -> list[Any]:
    """What a chat template may make a difference of; of a message, reasoning comes last."""
    if not isinstance(message, Mapping):
        return [message]
    return [
        message.get("role"),
        _content(message.get("content")),
        _tool_calls(message.get("tool_calls")),
        message.get("tool_call_id"),
        message.get("name"),
        message.get("reasoning") or message.get("reasoning_content") or "",
    ]


def _content(content: Any) -> Any:
    match content:
        case None:
            return ""
        case [{"type": "text", "text": str(text)}]:
            return text
        case _:
            return content


def _tool_calls(calls: Any) -> Any:
    if not calls:
        return []
    return [_tool_call(call) for call in calls] if isinstance(calls, list) else calls


def _tool_call(call: Any) -> Any:
    match call:
        case {"function": {"name": name, "arguments": str(arguments)}}:
            return [call.get("id"), name, _arguments(arguments)]
        case _:
            return call


def _arguments(text: str) -> str:
    """JSON with its spaces and the order of its fields taken out; other texts as they are."""
    try:
        return orjson.dumps(orjson.loads(text), option=orjson.OPT_SORT_KEYS).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # orjson reads deeper than it writes
        return text


def _written(meaning: Any) -> bytes:
    """The same bytes for the same meaning."""
    try:
        return orjson.dumps(meaning, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:
        pass
    try:
        return json.dumps(meaning, sort_keys=True, ensure_ascii=False, default=repr).encode("utf-8", "replace")
    except (TypeError, ValueError, RecursionError):
        return urandom(16)  # like no other message


def _spells_out(answer: Mapping[str, Any], ends: Iterable[str]) -> bool:
    """Whether the answer spells out an end-of-turn token, which the template's tokenizer would take for one."""
    said = _written(_meaning(answer))
    return any(orjson.dumps(end)[1:-1] in said for end in ends)
