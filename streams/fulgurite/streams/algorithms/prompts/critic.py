"""The critic: says what is wrong with a template by its worst rollouts, and writes one that heeds it.

Promises: any server with OpenAI's chat completions will do; one that is away is waited for (chat.py); an answer that is
none costs the edit, not the search. What templates and agents say is never taken for a part of the question.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import PromptSettings
from fulgurite.streams.algorithms.chat import ChatModel, NoAnswer
from fulgurite.streams.algorithms.prompts.search import Candidate, Example

logger = logging.getLogger(__name__)

GRADIENT = """You review the prompt template of an agent. Values are put into the places in braces.

<template>
{template}
</template>

Some of what came of it, the worst first. A higher reward is better.

{examples}

In a few sentences: what in the template leads to the low rewards, and what should it say instead? Do not write a new
template yet.
"""

EDIT = """Improve the prompt template of an agent. Values are put into the places in braces: keep these places.

<template>
{template}
</template>

A reviewer says:

{critique}

Answer with the whole improved template between <template> and </template>, and nothing else.
"""

_PLACE = re.compile(r"\{(template|examples|critique)\}")
_ANSWER = re.compile(r"<template>\n?((?:(?!</?template>).)*?)\n?</template>", re.DOTALL)
"""No mark between the two: some models say first that they will answer within <template> tags."""


class Critic:
    """One model."""

    def __init__(self, model: ChatModel, settings: PromptSettings) -> None:
        """Raises SettingsError for a question's file that cannot be read, or lacks a place."""
        self._model = model
        self._settings = settings
        self._gradient = _read(settings.gradient_template, "gradient_template", GRADIENT, ("template", "examples"))
        self._edit = _read(settings.edit_template, "edit_template", EDIT, ("template", "critique"))

    async def edit(self, parent: Candidate, branch: int, round_number: int) -> str | None:
        """A new template; None where the critic gave none."""
        shown = chosen(parent.examples, self._settings, f"{self._settings.run_id}/{round_number}/{branch}")
        try:
            critique = await self._ask(self._gradient, {"template": parent.text, "examples": told(shown)})
            answer = await self._ask(self._edit, {"template": parent.text, "critique": critique})
        except NoAnswer as error:
            logger.warning("no edit of candidate %d: the critic: %s", parent.number, error)
            return None
        found = template_in(answer)
        if found is None:
            logger.warning(
                "no edit of candidate %d: the critic's answer has nothing between <template> and </template>: %r",
                parent.number, answer[:200],
            )  # fmt: skip
        return found

    async def _ask(self, question: str, values: Mapping[str, str]) -> str:
        filled_in = _PLACE.sub(lambda place: values.get(place[1], ""), question)
        return await self._model.ask(filled_in, self._settings.critic_temperature)


def chosen(examples: Sequence[Example], settings: PromptSettings, seed: str) -> list[Example]:
    """Some of the worst, the worst first; the same for the same seed."""
    count = min(len(examples), settings.gradient_batch)
    places = sorted(random.Random(seed).sample(range(len(examples)), count))
    return [examples[place] for place in places]


def told(examples: Sequence[Example]) -> str:
    return "\n\n".join(
        f"reward {example.reward:g}\ngiven: {example.input}\nanswered: {example.output}" for example in examples
    )


def template_in(answer: str) -> str | None:
    """What stands between the last two marks that belong together; None without: an excuse, or an answer cut off.

    >>> template_in("Sure: <template>Be brief: {question}</template>")
    'Be brief: {question}'
    """
    found = _ANSWER.findall(answer)
    return str(found[-1]) if found else None


def _read(path: Path | None, name: str, ours: str, places: Sequence[str]) -> str:
    """Every place is needed, so one misspelt is missed; other words in braces may be those of the prompt template."""
    if path is None:
        return ours
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"prompt.{name} = {path}: {error}") from None
    found = set(_PLACE.findall(text))
    if missing := [f"{{{place}}}" for place in places if place not in found]:
        raise SettingsError(
            f"prompt.{name} = {path}: needs {' and '.join(missing)}: without, the critic is not told it"
        )
    if strange := sorted(found - set(places)):
        raise SettingsError(f"prompt.{name} = {path}: {{{strange[0]}}} has no value here; take it out")
    return text
