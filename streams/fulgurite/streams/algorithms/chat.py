"""A question to a model over OpenAI's chat completions, and its answer as text.

Promises: a model that is away (no connection, 429, 502, 503, 504), or whose server knows neither the key, nor who pays,
nor the model (401, 402, 404), is waited for, for ever, visibly: no question of many could be answered. Anything else
that is no answer (another status, none in time, no text) raises NoAnswer. timeout_seconds bounds a whole call, however
slowly it comes; a connection that is not there after half of it counts as away. Does not know what is asked.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from fulgurite.producers.backoff import Backoff
from fulgurite.schemas.algorithm_settings import Temperature

logger = logging.getLogger(__name__)

AWAY = frozenset({429, 502, 503, 504})
NOT_US = frozenset({401, 402, 404})
"""Of the settings, not of the question; 403 is what some servers answer to questions they will not have."""


class NoAnswer(Exception):
    """The model is there and gave no answer that can be used."""


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A model by the base URL of its server."""

    client: httpx.AsyncClient
    url: str
    model: str
    api_key: SecretStr
    timeout_seconds: float

    async def ask(self, question: str, temperature: Temperature) -> str:
        """Raises NoAnswer."""
        url = f"{self.url.rstrip('/')}/chat/completions"
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        if temperature != "default":
            body["temperature"] = temperature
        key = self.api_key.get_secret_value()
        headers = {"authorization": f"Bearer {key}"} if key else {}
        backoff = Backoff(logger)
        # httpx bounds each step of a call for itself. No connection must show before the whole time is over.
        steps = httpx.Timeout(self.timeout_seconds, connect=self.timeout_seconds / 2, pool=self.timeout_seconds / 2)
        while True:
            try:
                async with asyncio.timeout(self.timeout_seconds):
                    response = await self.client.post(url, json=body, headers=headers, timeout=steps)
            except (TimeoutError, httpx.ReadTimeout):
                raise NoAnswer(f"no answer within {self.timeout_seconds:g} s") from None
            except httpx.DecodingError as error:
                raise NoAnswer(f"an answer that is not encoded as it says: {error}") from None
            except httpx.TransportError as error:
                await backoff.wait(f"{self.model} at {self.url} does not answer: {error!r}")
                continue
            status = response.status_code
            if status not in AWAY | NOT_US:
                return _content(response)
            said = response.text.replace(key, "…") if key else response.text
            advice = f": {said[:200]}; look at its key, url and model in the settings" if status in NOT_US else ""
            await backoff.wait(f"{self.model} at {self.url} answers {status}{advice}")


def _content(response: httpx.Response) -> str:
    """The text of a chat completion. Raises NoAnswer."""
    if not response.is_success:
        raise NoAnswer(f"status {response.status_code}: {response.text[:500]}")
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise NoAnswer(f"no chat completion: {response.text[:500]}") from None
    if not isinstance(content, str):
        raise NoAnswer(f"an answer without text: {response.text[:500]}")
    # JSON may have half a character ("\ud83d"), which no record can: such a half becomes U+FFFD, two that fit one.
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
