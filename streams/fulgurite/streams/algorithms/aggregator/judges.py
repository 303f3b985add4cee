"""A judge: a model that is asked, over OpenAI's chat completions, what an attempt is worth.

Promises: the same question is asked once, as long as its verdict is kept and gives a number; a judge that is away (no
connection, 429, 502, 503, 504) is waited for, for ever, visibly; any other failure (another status, no answer in time,
an answer without a clear number, see `answers`) is tried aggregator.tries times and is then a PartFailed. At
temperature 0, if its source says no other, so that asking again says the same where the server can. Does not know what
the number is good for.

The question is the source's template with these in place of their names:
    {input}        what the agent was given: the input of its root span, or of its first call
    {output}       what it said in the end: the output of its last call, or of its root span
    {transcript}   every call and tool, in their order, with input and output
    {agent}, {status}
Other braces stay as they are. A word alone in them is refused at the start, as it is a place misspelt; not one that
follows a letter, a backslash, a brace, ^, _ or $, as in \\boxed{answer}.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from weakref import WeakValueDictionary

import httpx

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.patterns import portable
from fulgurite.schemas.settings import AggregatorSettings, RewardSource
from fulgurite.schemas.trajectories import FinishedAttempt
from fulgurite.streams.algorithms.aggregator.answers import number_in
from fulgurite.streams.algorithms.aggregator.combine import Part
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.chat import ChatModel, NoAnswer
from fulgurite.streams.algorithms.expressions import Expression
from fulgurite.streams.algorithms.transcript import shortened, texts_of

MAX_ANSWER_CHARS = 4_000
"""Of an answer, in the audit."""

_TOLD = ("input", "output", "transcript")
"""At least one of them is in every question: without, all attempts would have the same verdict."""
_PLACES = (*_TOLD, "agent", "status")
_PLACE = re.compile(rf"\{{({'|'.join(_PLACES)})\}}")
_WORD = re.compile(r"(?<![\w\\}^$])\{([A-Za-z_]\w*)\}")


class PartFailed(Exception):
    """A part of a reward could not be had."""


class Judge:
    """One source that is asked over HTTP."""

    def __init__(
        self,
        source: RewardSource,
        settings: AggregatorSettings,
        client: httpx.AsyncClient,
        verdicts: Verdicts,
        room: asyncio.Semaphore,
    ) -> None:
        assert source.url, "the settings' validator sees to it"
        assert source.template, "the settings' validator sees to it"
        self._source = source
        self._settings = settings
        self._verdicts = verdicts
        self._room = room
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._model = ChatModel(client, source.url, source.model, source.api_key, settings.timeout_seconds)
        self._number = Expression(portable(source.answer))
        try:
            self._template = source.template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"aggregator.sources: template of {source.name}: {error}") from None
        if fault := template_fault(self._template):
            raise SettingsError(f"aggregator.sources: template of {source.name} ({source.template}): {fault}")

    async def score(self, attempt: FinishedAttempt) -> Part:
        """Raises PartFailed."""
        question = question_of(self._template, attempt, self._settings.max_transcript_chars)
        asked = [self._source.url, self._source.model, question]
        identity = json.dumps(asked if self._source.temperature == 0 else [*asked, self._source.temperature])
        turn = self._turns.setdefault(identity, asyncio.Lock())
        async with turn:  # the same question asked meanwhile waits for this one's verdict
            return await self._verdict(question, identity)

    async def _verdict(self, question: str, identity: str) -> Part:
        kept = self._verdicts.get(identity)
        if kept is not None:
            with suppress(NoAnswer):  # kept by a source with another `answer`, or before this one's was changed
                return self._part(kept)
        problem = ""
        for _ in range(self._settings.tries):
            try:
                async with self._room:
                    answer = await self._model.ask(question, self._source.temperature)
                part = self._part(answer)
            except NoAnswer as error:
                problem = str(error)
                continue
            self._verdicts.put(identity, answer)
            return part
        raise PartFailed(f"judge {self._source.name} ({self._source.url}): {problem} ({self._settings.tries} tries)")

    def _part(self, answer: str) -> Part:
        """Raises NoAnswer."""
        metadata = {"answer": answer[:MAX_ANSWER_CHARS], "model": self._source.model}
        return Part(self._source.name, {self._source.name: number_in(self._number, answer)}, metadata)


def template_fault(template: str) -> str:
    """Why a template is of no use; empty where it is.

    >>> template_fault("Rate {ouput}")
    '{ouput} is no place: {input}, {output}, {transcript}, {agent}, {status} are; as a word write { ouput }'
    """
    known = ", ".join(f"{{{place}}}" for place in _PLACES)
    if wrong := [word for word in _WORD.findall(template) if word not in _PLACES]:
        return f"{{{wrong[0]}}} is no place: {known} are; as a word write {{ {wrong[0]} }}"
    if not set(_TOLD) & set(_PLACE.findall(template)):
        return "it needs {input}, {output} or {transcript}: without, the judge is told nothing of what it judges"
    return ""


def question_of(template: str, attempt: FinishedAttempt, max_chars: int) -> str:
    """The template filled in. What the attempt says is never taken for a part of the template."""
    texts = {**texts_of(attempt.spans), "agent": attempt.agent, "status": attempt.status}
    return _PLACE.sub(lambda place: shortened(texts[place[1]], max_chars), template)
